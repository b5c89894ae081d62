"""Gemma Scope 2: a folder with `params.safetensors`, and usually `config.json`.

    w_enc [d_in, d_sae]   b_enc [d_sae]   w_dec [d_sae, d_out]   b_dec [d_out]   threshold [d_sae]
    affine_skip_connection [d_in, d_out], in transcoders whose config says affine_connection

JumpReLU without subtraction of `b_dec`. config.json names the model and Hugging Face's names of the places that
activations are from (`hf_hook_point_in`); one that also names where they go to is of a transcoder. Where there is no
config.json, the folder's name says so, as in `transcoder_all/layer_5_width_16k_l0_small_affine`. Cross-layer
transcoders write to several layers, and are refused.
"""

import re
from collections.abc import Mapping
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
    write_safetensors,
)
from mechint.formats.folds import fold_threshold
from mechint.formats.limits import beyond, refuse
from mechint.provenance import make_dir, write_json
from mechint.sae.base import SAE

PARAMS_FILE, CONFIG_FILE = "params.safetensors", "config.json"
NAMES = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}
SKIP = "affine_skip_connection"
# Hugging Face's name of a place in a block (`model.layers.N.` before it) and TransformerLens's hook there, where it has
# one (not behind the norm that a transcoder reads, whose weights TransformerLens applies after its hook).
HOOKS = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}


def _file(path: Path) -> Path:
    return path / PARAMS_FILE if path.is_dir() else path


def sniff(path: Path) -> bool:
    return set(peek_safetensors(_file(path))) >= {"w_enc", "w_dec", "threshold"}


def read(path: Path) -> SAE:
    file = _file(path)
    state, _ = read_safetensors(file)
    config_file = file.with_name(CONFIG_FILE)
    config = read_settings(config_file, "Gemma Scope 2 configuration") if config_file.is_file() else {}
    if (kind := config.get("architecture", "jump_relu")) != "jump_relu":
        raise MechintError(f"{config_file}: the architecture {kind!r} does not open here, only jump_relu")
    if "w_dec" in state and state["w_dec"].ndim == 3:
        raise MechintError(f"{file} is a cross-layer transcoder: its decoder writes to several layers; not opened here")
    names = {**NAMES, f"{SKIP} T": "W_skip"} if SKIP in state else NAMES
    refuse_unknown(state, {*NAMES, SKIP}, file)
    transcoder, notes = SKIP in state or config.get("hf_hook_point_out") is not None, ()
    if not config and not transcoder and re.search("transcoder|clt", "/".join(file.absolute().parts[-4:-1])):
        transcoder, notes = True, ("a transcoder, by the name of its folder",)
    if config.get("affine_connection", SKIP in state) != (SKIP in state):
        raise MechintError(f"{config_file} and {file.name} disagree about {SKIP}")
    sae = SAE.from_tensors(
        "jumprelu",
        take_tensors(state, names, file),
        file,
        apply_b_dec_to_input=False,
        transcoder=transcoder,
        metadata=_metadata(config),
        notes=notes,
    )
    return fold_threshold(sae)


def hook_of(place: Any) -> str | None:
    """TransformerLens's hook for Hugging Face's name of a place; None where there is none."""
    found = re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d+)\.(.+)", str(place))
    hook = HOOKS.get(found[2]) if found else None
    return f"blocks.{found[1]}.{hook}" if found and hook else None


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Model and hooks as the config names them; activations are the model's as it is."""
    ours = config.get("mechint")
    if isinstance(ours, dict):
        return dict(ours)
    metadata: dict[str, Any] = {"processing": "raw"}
    if isinstance(model := config.get("model_name"), str):
        # as the Hub names them: they say gemma-v3 there
        named = model.replace("gemma-v3", "gemma-3")
        metadata["model_name"] = named if "/" in named else f"google/{named}"
    for theirs, name in (("hf_hook_point_in", "hook_name"), ("hf_hook_point_out", "hook_name_out")):
        if (place := config.get(theirs)) is not None:
            metadata[name.replace("hook", "hf_hook")] = place
            metadata |= {name: hook} if (hook := hook_of(place)) else {}
    if str(metadata.get("hook_name")).endswith("hook_z"):
        metadata["reshape_activations"] = "hook_z"
    return metadata


def holds(sae: SAE) -> str | None:
    return beyond(sae, architectures=("jumprelu",), subtracts_b_dec=False, transcoder=True)


def write(sae: SAE, path: Path) -> None:
    refuse(FORMAT, sae)
    make_dir(path)
    t = sae.weights()
    tensors = {theirs: t[ours] for theirs, ours in NAMES.items()}
    if "W_skip" in t:
        tensors[SKIP] = t["W_skip"].t()
    write_safetensors(path / PARAMS_FILE, tensors)
    said = sae.metadata
    config: dict[str, Any] = {
        "architecture": "jump_relu",
        "model_name": said.get("model_name"),
        "hf_hook_point_in": said.get("hf_hook_name") or said.get("hook_name"),
        "mechint": said,
    }
    if sae.is_transcoder:
        # what marks a transcoder has to be there even if nobody knows where it writes to
        config["hf_hook_point_out"] = said.get("hf_hook_name_out") or said.get("hook_name_out") or "unknown"
        config["affine_connection"] = sae.cfg.has_skip
    write_json(path / CONFIG_FILE, config, overwrite=False)


FORMAT = Format(
    name="gemma_scope_2",
    title="Gemma Scope 2",
    marks="a folder with `params.safetensors` of `w_enc`, `w_dec`, `b_enc`, `b_dec`, `threshold`, and `config.json`",
    sniff=sniff,
    read=read,
    write=write,
    holds=holds,
)
