"""EleutherAI sparsify: a folder with `cfg.json` and `sae.safetensors`.

    encoder.weight [d_sae, d_in]   encoder.bias [d_sae]   W_dec [d_sae, d_in]   b_dec [d_in]   (W_skip [d_in, d_in])

Always top-k of ReLU(pre), with b_dec subtracted from the input except in transcoders (`transcode`), which may have a
skip connection. cfg.json: d_in, k, num_latents (0: d_in * expansion_factor), activation. The folder's name is the
module that the activations are of: `layers.3` is the residual stream after block 3.
"""

import re
from pathlib import Path
from typing import Any

from mechint.errors import MechintError
from mechint.formats.base import Format
from mechint.formats.files import (
    peek_safetensors,
    read_safetensors,
    read_settings,
    refuse_unknown,
    take_tensors,
    whole_number,
    write_safetensors,
)
from mechint.formats.limits import beyond, refuse
from mechint.provenance import make_dir, write_json
from mechint.sae.base import SAE

CFG_FILE, WEIGHTS_FILE = "cfg.json", "sae.safetensors"
NAMES = {"encoder.weight T": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
# sparsify's module names (the last part, "" for the block itself) and TransformerLens's hooks.
HOOKS = {"": "hook_resid_post", "mlp": "hook_mlp_out", "attn": "hook_attn_out", "attention": "hook_attn_out"}


def sniff(path: Path) -> bool:
    path = path.parent if path.name == WEIGHTS_FILE else path
    names = set(peek_safetensors(path / WEIGHTS_FILE))
    return (path / CFG_FILE).is_file() and names >= {"encoder.weight", "encoder.bias", "b_dec"}


def read(path: Path) -> SAE:
    path = path.parent if path.name == WEIGHTS_FILE else path
    if not (path / CFG_FILE).is_file():
        inside = sorted(file.parent.name for file in path.glob(f"*/{CFG_FILE}"))
        raise MechintError(
            f"{path} has no {CFG_FILE}" + (f"; give one of its folders: {', '.join(inside[:8])}" if inside else "")
        )
    cfg, (state, _) = read_settings(path / CFG_FILE, "sparsify configuration"), read_safetensors(path / WEIGHTS_FILE)
    source = path / WEIGHTS_FILE
    if cfg.get("activation", "topk") != "topk":
        raise MechintError(f"{path}: activation {cfg['activation']!r} is not known here, only topk")
    if cfg.get("signed", False):
        raise MechintError(f"{path}: signed top-k (by absolute value) is not known here")
    if "W_dec" not in state:
        raise MechintError(f"{source} has no W_dec: an encoder alone is no SAE")
    names, transcoder = dict(NAMES), bool(cfg.get("transcode", False))
    if cfg.get("skip_connection", False):
        if not transcoder:
            raise MechintError(f"{path}: a skip connection around an autoencoder is not known here")
        names["W_skip"] = "W_skip"
    refuse_unknown(state, {name.removesuffix(" T") for name in names}, source)
    sae = SAE.from_tensors(
        "topk",
        take_tensors(state, names, source),
        source,
        k=whole_number(cfg.get("k"), "k", path / CFG_FILE),
        transcoder=transcoder,
        metadata=_metadata(path, cfg),
    )
    d_in = whole_number(cfg.get("d_in"), "d_in", path / CFG_FILE)
    stated = cfg.get("num_latents") or d_in * whole_number(cfg.get("expansion_factor"), "expansion_factor", path)
    if (d_in, stated) != (sae.d_in, sae.d_sae):
        found = f"{sae.d_in} and {sae.d_sae}"
        raise MechintError(f"{path}: {CFG_FILE} says d_in {d_in} and {stated} latents, the weights are {found}")
    return sae


def hook_of(module: str) -> str | None:
    """TransformerLens's hook for a module's name (`layers.3`, `gpt_neox.layers.3.mlp`, `transformer.h.3`)."""
    found = re.fullmatch(r"(?:[\w.]+\.)?(?:layers|h)[._](\d+)(?:\.(\w+))?", module)
    hook = HOOKS.get(found[2] or "") if found else None
    return f"blocks.{found[1]}.{hook}" if found and hook else None


def _metadata(path: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """What the file says of its origin; sparsify takes activations from a model as it is."""
    ours = cfg.get("mechint")
    if isinstance(ours, dict):
        return dict(ours)
    metadata: dict[str, Any] = {"processing": "raw"}
    if (hook := hook_of(path.absolute().name)) is not None:
        metadata["hook_name"] = hook
    run = path.absolute().parent / "config.json"
    if run.is_file():
        model = read_settings(run, "sparsify run configuration").get("model")
        metadata |= {"model_name": model} if isinstance(model, str) else {}
    return metadata


def holds(sae: SAE) -> str | None:
    if sae.is_transcoder and sae.d_out != sae.d_in:
        return "a transcoder between different widths"
    return beyond(sae, architectures=("topk",), subtracts_b_dec=None if sae.is_transcoder else True, transcoder=True)


def write(sae: SAE, path: Path) -> None:
    refuse(FORMAT, sae)
    make_dir(path)
    t = sae.weights()
    tensors = {
        "encoder.weight": t["W_enc"].t(),
        "encoder.bias": t["b_enc"],
        "W_dec": t["W_dec"],
        "b_dec": t["b_dec"],
        **({"W_skip": t["W_skip"]} if "W_skip" in t else {}),
    }
    write_safetensors(path / WEIGHTS_FILE, tensors)
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": not sae.is_transcoder,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": "W_skip" in t,
        "transcode": sae.is_transcoder,
        "d_in": sae.d_in,
        "mechint": sae.metadata,
    }
    write_json(path / CFG_FILE, cfg, overwrite=False)


FORMAT = Format(
    name="sparsify",
    title="EleutherAI sparsify",
    marks="a folder with `cfg.json` and `sae.safetensors` of `encoder.weight`, `encoder.bias`, `W_dec`, `b_dec`",
    sniff=sniff,
    read=read,
    write=write,
    holds=holds,
)
