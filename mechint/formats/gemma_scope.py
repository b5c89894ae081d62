"""Gemma Scope: one `params.npz`.

    W_enc [d_in, d_sae]   b_enc [d_sae]   W_dec [d_sae, d_in]   b_dec [d_in]   threshold [d_sae]

JumpReLU without subtraction of `b_dec`; files without `threshold` are plain ReLU, those without `b_dec` have none.
Names are also written `w_enc`, `w_dec`. A file says nothing of its model or hook; folders named `layer_20/...` name the
layer.
"""

import re
from pathlib import Path
from typing import Any

import torch

from mechint.formats.base import Format
from mechint.formats.files import peek_npz, read_npz, refuse_unknown, take_tensors, write_npz
from mechint.formats.folds import fold_threshold
from mechint.formats.limits import beyond, refuse
from mechint.sae.base import SAE

PARAMS_FILE = "params.npz"


def _file(path: Path) -> Path:
    return path / PARAMS_FILE if path.is_dir() else path


def sniff(path: Path) -> bool:
    names = {name.lower() for name in peek_npz(_file(path))}
    return names >= {"w_enc", "w_dec"}


def read(path: Path) -> SAE:
    file = _file(path)
    state = {re.sub("^w_", "W_", name): tensor for name, tensor in read_npz(file).items()}
    names = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec?": "b_dec", "threshold?": "threshold"}
    refuse_unknown(state, {name.removesuffix("?") for name in names}, file)
    tensors, notes = take_tensors(state, names, file), ()
    if "b_dec" not in tensors:
        tensors["b_dec"], notes = torch.zeros(tensors["W_dec"].shape[-1]), ("no b_dec in the file: taken as 0",)
    # Gemma Scope's transcoders lie in files of the same names, with nothing inside that tells them apart.
    transcoder = any(re.search("gemma-scope.*transcoder", part) for part in file.absolute().parts)
    if transcoder:
        notes = (*notes, "a transcoder, by the name of its folder")
    layer = re.search(r"layer_(\d+)(?:/|$)", file.absolute().parent.as_posix())
    metadata = {"processing": "raw", **({"layer": int(layer[1])} if layer else {})}
    architecture = "jumprelu" if "threshold" in tensors else "standard"
    said: dict[str, Any] = {"metadata": metadata, "notes": notes}
    sae = SAE.from_tensors(architecture, tensors, file, apply_b_dec_to_input=False, transcoder=transcoder, **said)
    if (folded := fold_threshold(sae)) is not sae:
        folded.notes = (*notes, "thresholds below 0 taken as 0: the same function")
    return folded


def holds(sae: SAE) -> str | None:
    return beyond(sae, architectures=("standard", "jumprelu"), subtracts_b_dec=False)


def write(sae: SAE, path: Path) -> None:
    refuse(FORMAT, sae)
    write_npz(path, sae.weights())


FORMAT = Format(
    name="gemma_scope",
    title="Gemma Scope params.npz",
    marks="`params.npz` with `W_enc`, `b_enc`, `W_dec`, `b_dec` and `threshold`",
    sniff=sniff,
    read=read,
    write=write,
    holds=holds,
    file_name=PARAMS_FILE,
)
