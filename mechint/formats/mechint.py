"""Our own: a run directory, or a checkpoint.pt as the first version of the pipeline wrote it (`b_pre`).

A run directory holds its SAE twice: `sae/` in SAELens's layout, with what it was trained on, is what is read; without
it, checkpoint.pt. A checkpoint.pt whose file of metadata is missing is the first pipeline's, whose setting is known.
"""

from pathlib import Path
from typing import Any

from mechint.errors import MechintError
from mechint.formats import saelens
from mechint.formats.base import Format
from mechint.formats.files import peek_pt, read_pt
from mechint.formats.limits import beyond, refuse
from mechint.provenance import make_dir, read_json, write_json
from mechint.sae.base import ARCHITECTURES, SAE
from mechint.sae.checkpoint import holds_tensors, metadata_path, sae_from_state, save_checkpoint

CHECKPOINT = "checkpoint.pt"
# How the original pipeline collected (compare TransformerLens's old default): residual minus its mean, BOS prepended.
LEGACY_SETTING = {"processing": "centred", "prepend_bos": True, "legacy": True}
# In every config.json that a training of ours wrote, and in none of the originals'.
OUR_KEYS = {"split_by", "processing"}


def sniff(path: Path) -> bool:
    if path.is_dir():
        return (path / CHECKPOINT).is_file() or _is_run_with_sae(path)
    return holds_tensors(peek_pt(path))


def _is_run_with_sae(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "sae" / saelens.CFG_FILE).is_file()


def read(path: Path) -> SAE:
    return read_with_config(path)


def read_with_config(path: Path, config: Path | None = None) -> SAE:
    """`config`: the config.json that names hook and model, of a checkpoint that has none beside it."""
    if path.is_dir() and _is_run_with_sae(path):
        return saelens.read(path / "sae")
    file = path / CHECKPOINT if path.is_dir() else path
    if not file.is_file():
        raise MechintError(f"checkpoint not found: {file}; `ls runs/*/checkpoint.pt` shows those of your runs")
    state = read_pt(file)
    metadata, notes = _metadata_beside(file), ()
    if metadata is None and "b_pre" in state:  # no other tool calls it so
        said = read_json(place, "config file") if (place := config or file.parent / "config.json").is_file() else {}
        names = ("hook_name", "model_name", "model_source", "processing", "prepend_bos")
        metadata = {name: said[name] for name in names if said.get(name) is not None}
        if not OUR_KEYS & said.keys():  # the originals' own: they recorded no more than that
            metadata |= LEGACY_SETTING
            notes = (
                f"{file}: nothing says how its activations were processed; taken as the original pipeline's setting"
                " (centred residual, BOS prepended)",
            )
    sae = sae_from_state(state, file, metadata)
    sae.notes = notes
    return sae


def _metadata_beside(checkpoint: Path) -> dict[str, Any] | None:
    """What the files beside a checkpoint say of its training; None if there are none."""
    if (cfg := checkpoint.parent / "sae" / saelens.CFG_FILE).is_file():
        return saelens.own_metadata(read_json(cfg).get("metadata") or {})
    if (beside := metadata_path(checkpoint)).is_file():
        return saelens.own_metadata(read_json(beside).get("sae_metadata") or {}, ours=True)
    return None


def holds(sae: SAE) -> str | None:
    if sae.architecture == "jumprelu" and bool((sae.get_parameter("threshold") < 0).any()):
        return "thresholds below 0"
    kinds = tuple(name for name, kind in ARCHITECTURES.items() if kind.saved_tensors)
    return beyond(sae, architectures=kinds, subtracts_b_dec=True, relu=None)


def write(sae: SAE, path: Path) -> None:
    refuse(FORMAT, sae)
    if path.suffix == ".pt":
        save_checkpoint(sae, path)
        write_json(metadata_path(path), {"sae_metadata": sae.metadata})
        return
    make_dir(path)
    checkpoint = path / CHECKPOINT
    save_checkpoint(sae, checkpoint)
    if saelens.holds(sae) is not None:  # topk without ReLU
        write_json(metadata_path(checkpoint), {"sae_metadata": sae.metadata})
    else:
        saelens.write(sae, path / "sae")


FORMAT = Format(
    name="mechint",
    title="mechint: a run directory, or a checkpoint.pt (also of the first pipeline)",
    marks="checkpoint.pt and sae/cfg.json in a folder, or a .pt of W_enc, b_enc, W_dec and b_pre",
    sniff=sniff,
    read=read,
    write=write,
    holds=holds,
    suffixes=(".pt",),
)
