"""Our own: a run directory, or a checkpoint.pt as the first version of the pipeline wrote it (`b_pre`)."""

import warnings
from dataclasses import replace
from pathlib import Path

from mechint.formats.base import Format, Loaded
from mechint.formats.files import peek_pt
from mechint.formats.folds import from_sae, to_sae
from mechint.formats.limits import beyond, refuse
from mechint.provenance import make_dir, write_json
from mechint.sae.base import ARCHITECTURES
from mechint.sae.io import CFG_FILE, load_sae, metadata_path, save_checkpoint, save_sae_folder


def sniff(path: Path) -> bool:
    if path.is_dir():
        return (path / "checkpoint.pt").is_file() or all(
            (path / name).is_file() for name in ("config.json", f"sae/{CFG_FILE}")
        )
    return {"b_pre", "W_enc", "W_dec"} <= peek_pt(path)


def read(path: Path) -> Loaded:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sae = load_sae(path)
    return replace(from_sae(sae), notes=tuple(str(warning.message) for warning in caught))


def holds(loaded: Loaded) -> str | None:
    if loaded.architecture == "jumprelu" and bool((loaded.tensors["threshold"] < 0).any()):
        return "thresholds below 0"
    kinds = tuple(name for name, kind in ARCHITECTURES.items() if kind.saved_tensors)
    return beyond(loaded, architectures=kinds, subtracts_b_dec=True, topk_relu=None)


def write(loaded: Loaded, path: Path) -> None:
    refuse(FORMAT, loaded)
    sae = to_sae(loaded)
    # What is read without a record is taken as the first pipeline's, with centred activations: other tools' are not.
    sae.metadata = {"processing": "raw", **sae.metadata}
    if path.suffix == ".pt":
        save_checkpoint(sae, path)
        write_json(metadata_path(path), {"sae_metadata": sae.metadata})
        return
    make_dir(path)
    checkpoint = path / "checkpoint.pt"
    save_checkpoint(sae, checkpoint)
    if sae.departing():  # SAELens's layout cannot hold it
        write_json(metadata_path(checkpoint), {"sae_metadata": sae.metadata})
    else:
        save_sae_folder(sae, path / "sae")


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
