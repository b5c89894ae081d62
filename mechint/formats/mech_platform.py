"""The mech platform's bundle: `sae_weights.safetensors` beside `sae_weights.safetensors.json`.

    encoder.weight [d_sae, d_in]   encoder.bias [d_sae]   decoder.weight [d_in, d_sae]   decoder.bias [d_in]

Top-k of x @ W_enc + b_enc without ReLU: negative entries can be among the k largest, and stay. `decoder.bias` is not
subtracted from the input. `k` is in the sidecar only. A run's folder may hold `spec.json`, which names model and hook.
"""

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

WEIGHTS_FILE = "sae_weights.safetensors"
NAMES = {"encoder.weight T": "W_enc", "encoder.bias": "b_enc", "decoder.weight T": "W_dec", "decoder.bias": "b_dec"}


def _file(path: Path) -> Path:
    return path / WEIGHTS_FILE if path.is_dir() else path


def _sidecar(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def sniff(path: Path) -> bool:
    return set(peek_safetensors(_file(path))) == {name.removesuffix(" T") for name in NAMES}


def read(path: Path, said: dict[str, Any] | None = None) -> SAE:
    """`said`: the sidecar's keys from elsewhere, where there is no sidecar."""
    file = _file(path)
    state, _ = read_safetensors(file)
    refuse_unknown(state, {name.removesuffix(" T") for name in NAMES}, file)
    if said is None and not _sidecar(file).is_file():
        raise MechintError(f"{file}: top-k without k; expected {_sidecar(file).name} beside it, with a number k")
    sidecar = said or read_settings(_sidecar(file), "sidecar of the weights")
    k = whole_number(sidecar.get("k"), "k", _sidecar(file))
    tensors = take_tensors(state, NAMES, file)
    sae = SAE.from_tensors(
        "topk",
        tensors,
        file,
        k=k,
        relu=False,
        apply_b_dec_to_input=False,
        metadata=_metadata(file.parent),
        notes=("the bundle does not say how the model's weights were processed, nor whether BOS was prepended",),
    )
    stated = {"input_dim": sae.d_in, "n_features": sae.d_sae}
    for name, found in stated.items():
        if sidecar.get(name, found) != found:
            raise MechintError(f"{_sidecar(file)} says {name} {sidecar[name]!r}, the weights are {found}")
    return sae


def _metadata(folder: Path) -> dict[str, Any]:
    """Model and hook of the run in this folder, as its spec.json names them."""
    if not (folder / "spec.json").is_file():
        return {}
    parameters = read_settings(folder / "spec.json", "specification of the run").get("parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    named = {"model_name": parameters.get("model"), "hook_name": parameters.get("hook_site")}
    return {name: value for name, value in named.items() if isinstance(value, str)}


def holds(sae: SAE) -> str | None:
    return beyond(sae, architectures=("topk",), subtracts_b_dec=False, relu=False)


def write(sae: SAE, path: Path) -> None:
    refuse(FORMAT, sae)
    make_dir(path)
    t = sae.weights()
    tensors = {
        "encoder.weight": t["W_enc"].t(),
        "encoder.bias": t["b_enc"],
        "decoder.weight": t["W_dec"].t(),
        "decoder.bias": t["b_dec"],
    }
    file = path / WEIGHTS_FILE
    write_safetensors(file, tensors)
    sidecar = {
        "dtype": "torch.float32",
        "input_dim": sae.d_in,
        "k": sae.k,
        "n_features": sae.d_sae,
        "training": None,
    }
    write_json(_sidecar(file), sidecar, overwrite=False)


FORMAT = Format(
    name="mech_platform",
    title="the mech platform's bundle",
    marks="`sae_weights.safetensors` of `encoder.weight` ... `decoder.bias`, and `sae_weights.safetensors.json`",
    sniff=sniff,
    read=read,
    write=write,
    holds=holds,
)
