"""OpenAI's sparse_autoencoder: one `.pt`, a state dict that also names the activation function.

    pre_bias [d_in]   encoder.weight [d_sae, d_in]   latent_bias [d_sae]   decoder.weight [d_in, d_sae]
    stats_last_nonzero [d_sae]   activation "ReLU" or "TopK"   activation_state_dict {k, postact_fn}

`pre_bias` is subtracted from the input and added to the reconstruction. An SAE is layer-normalised (no weights, eps
1e-5, the reconstruction scaled back) if and only if its activation is TopK: the library decides so when it loads one.
Tied decoders (`decoder.linear.weight`) are the encoder's transpose.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechint.errors import MechintError
from mechint.formats.base import Format
from mechint.formats.files import peek_pt, read_pt, refuse_unknown, take_tensors, whole_number, write_pt
from mechint.formats.limits import beyond, refuse
from mechint.sae.base import SAE

NAMES = {"pre_bias": "b_dec", "encoder.weight T": "W_enc", "latent_bias": "b_enc", "decoder.weight T": "W_dec"}
WEIGHTS_FILE = "autoencoder.pt"  # where we choose; OpenAI's own are numbered by layer
TIED = "decoder.linear.weight"
OTHERS = {"stats_last_nonzero", "activation", "activation_state_dict"}


def _file(path: Path) -> Path:
    return path / WEIGHTS_FILE if path.is_dir() else path


def sniff(path: Path) -> bool:
    return _file(path).is_file() and peek_pt(_file(path)) >= {"pre_bias", "encoder.weight", "latent_bias"}


def read(path: Path) -> SAE:
    path = _file(path)
    state = read_pt(path)
    activation = state.get("activation", "ReLU")
    if activation not in ("ReLU", "TopK"):
        raise MechintError(f"{path}: activation {activation!r} is not one of ReLU, TopK")
    if TIED in state:
        state = {**state, "decoder.weight": state["encoder.weight"].t().clone() if _is_matrix(state) else None}
        del state[TIED]
    known = {name.removesuffix(" T") for name in NAMES} | OTHERS
    refuse_unknown(state, known, path)
    tensors = take_tensors(state, NAMES, path)
    if activation == "ReLU":
        return SAE.from_tensors("standard", tensors, path, metadata={"processing": "raw"})
    settings = state.get("activation_state_dict")
    if not isinstance(settings, dict) or "k" not in settings:
        raise MechintError(f"{path}: TopK without k; the file should have it in activation_state_dict")
    after = settings.get("postact_fn", "ReLU")
    if after not in ("ReLU", "Identity"):
        raise MechintError(f"{path}: postact_fn {after!r} is not one of ReLU, Identity")
    return SAE.from_tensors(
        "topk",
        tensors,
        path,
        k=whole_number(settings["k"], "k", path),
        relu=after == "ReLU",
        normalize_activations="layer_norm",
        metadata={"processing": "raw"},
    )


def _is_matrix(state: dict[str, Any]) -> bool:
    weight = state.get("encoder.weight")
    return isinstance(weight, Tensor) and weight.ndim == 2


def holds(sae: SAE) -> str | None:
    needed = ("layer_norm",) if sae.architecture == "topk" else ("none",)
    if sae.architecture == "topk" and sae.cfg.normalize_activations == "none":
        return "a topk on inputs as they are (the library layer-normalises those of every TopK that it loads)"
    return beyond(sae, architectures=("standard", "topk"), subtracts_b_dec=True, normalize=needed, relu=None)


def write(sae: SAE, path: Path) -> None:
    refuse(FORMAT, sae)
    t = sae.weights()
    state: dict[str, Any] = {
        "pre_bias": t["b_dec"],
        "latent_bias": t["b_enc"],
        "stats_last_nonzero": torch.zeros(sae.d_sae, dtype=torch.long),
        "encoder.weight": t["W_enc"].t(),
        "decoder.weight": t["W_dec"].t(),
        "activation": "ReLU" if sae.architecture == "standard" else "TopK",
    }
    if sae.architecture == "topk":
        after = "ReLU" if sae.relu else "Identity"
        state["activation_state_dict"] = {"k": sae.k, "postact_fn": after}
    write_pt(path, state)


FORMAT = Format(
    name="openai",
    title="OpenAI sparse_autoencoder",
    marks="a `.pt` with `pre_bias`, `encoder.weight`, `latent_bias`, `decoder.weight`, `activation`",
    sniff=sniff,
    read=read,
    write=write,
    holds=holds,
    file_name=WEIGHTS_FILE,
)
