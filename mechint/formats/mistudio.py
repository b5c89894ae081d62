"""miStudio checkpoints: `checkpoint.safetensors`, in a folder or in its `layer_<i>[_<hook type>]` folders.

    model.encoder.weight [d_sae, d_in]   model.encoder.bias   model.decoder.weight [d_in, d_sae]
    model.decoder.bias [d_in]   model.decoder_bias [d_in]     (tied: no model.decoder.weight; either bias may be absent)
or, JumpReLU,
    model.W_enc [d_sae, d_in]   model.b_enc   model.W_dec [d_in, d_sae]   model.b_dec   model.activation.log_threshold

and `optimizer.*`, which is left out. b_dec is not subtracted from the input; both decoder biases are added. Two
settings change the function but are not in the checkpoint: `top_k_sparsity` (percent of d_sae, after ReLU) and
`normalize_activations`. They are taken from `metadata.json` beside it or from its string metadata. A checkpoint of a
training (it has a `step`) that names no normalisation was trained with miStudio's default, constant_norm_rescale.

Thresholds are kept as their logarithms in float32, which cannot say every float32 threshold: outside of 1/e to e the
exponentials of two neighbouring logarithms may be more than one float32 number apart. Where one of ours lies between
them, the exact thresholds go into `thresholds.safetensors` beside the checkpoint, which miStudio does not look into; it
is believed as long as it fits the logarithms.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.errors import MechintError
from mechint.formats.base import Format
from mechint.formats.files import (
    parse_settings,
    peek_safetensors,
    read_safetensors,
    read_settings,
    refuse_unknown,
    take_tensors,
    write_safetensors,
)
from mechint.formats.limits import beyond, layer_of, refuse
from mechint.provenance import make_dir, write_json
from mechint.sae.base import SAE
from mechint.sae.config import NORMALIZE

CHECKPOINT_FILE, METADATA_FILE = "checkpoint.safetensors", "metadata.json"
STANDARD = {
    "encoder.weight T": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight T?": "W_dec",
    "decoder.bias?": "decoder.bias",
    "decoder_bias?": "decoder_bias",
}
JUMPRELU = {"W_enc T": "W_enc", "b_enc": "b_enc", "W_dec T": "W_dec", "b_dec": "b_dec"}
LOG_THRESHOLD = "activation.log_threshold"
EXACT_FILE = "thresholds.safetensors"
HOOKS = {"residual": "hook_resid_post", "mlp": "hook_mlp_out", "attention": "hook_attn_out"}


def _candidates(path: Path) -> list[Path]:
    """The checkpoints at a path: the file itself, the folder's, or those of its layer folders."""
    if not path.is_dir():
        return [path]
    if (path / CHECKPOINT_FILE).is_file():
        return [path / CHECKPOINT_FILE]
    return sorted(path.glob(f"layer_*/{CHECKPOINT_FILE}"))


def sniff(path: Path) -> bool:
    files = _candidates(path)
    names = set(peek_safetensors(files[0])) if files else set()
    return bool(names) and (names >= {"model.encoder.weight"} or names >= {"model.W_enc", "model.W_dec"})


def read(path: Path) -> SAE:
    files = _candidates(path)
    if len(files) != 1:
        inside = f" give one of its folders: {', '.join(file.parent.name for file in files)}" if files else ""
        raise MechintError(f"{path} holds {len(files) or 'no'} miStudio checkpoints, expected one;{inside}".rstrip(";"))
    file = files[0]
    state, strings = read_safetensors(file)
    model = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    refuse_unknown({name: 0 for name in state if not name.startswith(("model.", "optimizer."))}, set(), file)
    settings = _settings(file, strings)
    kind = str(settings.get("architecture", ""))
    transcoder = "transcoder" in kind.lower()
    if "skip" in kind.lower():
        raise MechintError(f"{file} is a {kind}: what its skip connection computes is not known here")
    architecture, tensors = _tensors(file, model)
    exact_notes = _take_exact_thresholds(file, tensors)
    options: dict[str, Any] = {}
    if (percent := settings.get("top_k_sparsity")) is not None and architecture == "standard":
        architecture, options = "topk", {"k": k_of_percent(percent, tensors["W_enc"].shape[1], file)}
    elif "topk" in (kind.lower(), settings.get("activation_fn")):
        raise MechintError(f"{file} is said to be top-k, without k: write top_k_sparsity (percent) to {METADATA_FILE}")
    normalize, notes = _normalisation(file, settings)
    return SAE.from_tensors(
        architecture,
        tensors,
        file,
        apply_b_dec_to_input=False,
        normalize_activations=normalize,
        transcoder=transcoder,
        metadata=_metadata(file, settings),
        notes=(*notes, *exact_notes),
        **options,
    )


def _tensors(file: Path, model: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    if "W_enc" in model:
        refuse_unknown(model, {name.removesuffix(" T") for name in JUMPRELU} | {LOG_THRESHOLD}, file)
        tensors = take_tensors(model, {**JUMPRELU, LOG_THRESHOLD: "threshold"}, file)
        tensors["threshold"] = of_logs(tensors["threshold"])
        return "jumprelu", tensors
    refuse_unknown(model, {name.removesuffix("?").removesuffix(" T") for name in STANDARD}, file)
    tensors = take_tensors(model, STANDARD, file)
    if "W_dec" not in tensors:
        tensors["W_dec"] = tensors["W_enc"].t().clone()
    biases = [tensors.pop(name) for name in ("decoder.bias", "decoder_bias") if name in tensors]
    if not biases:
        raise MechintError(f"{file} has neither decoder.bias nor decoder_bias")
    if len({bias.shape for bias in biases}) > 1:
        raise MechintError(
            f"{file}: decoder.bias {list(biases[0].shape)} and decoder_bias {list(biases[1].shape)} differ"
        )
    tensors["b_dec"] = biases[0] if len(biases) == 1 else (biases[0].double() + biases[1].double()).float()
    return "standard", tensors


def of_logs(logs: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """Thresholds from their logarithms; -inf stands for 0. In float64, so that the only rounding is the last."""
    return logs.double().exp().float()


def nearest_logs(threshold: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """The float32 logarithms whose exponentials are nearest: through float64, so that no neighbour is nearer."""
    return threshold.double().log().float()


def _take_exact_thresholds(file: Path, tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """Put those of `thresholds.safetensors` into `tensors`, if there are any and the logarithms round to them."""
    place = file.with_name(EXACT_FILE)
    if "threshold" not in tensors or not place.is_file():
        return ()
    exact, rounded = read_safetensors(place)[0].get("threshold"), tensors["threshold"]
    if exact is None or not _round_to(exact, rounded):
        return (f"{place} does not fit the logarithms in {file.name}: they were changed since; it is left aside",)
    differ = exact != rounded
    tensors["threshold"] = exact
    largest = float(((exact - rounded).abs() / exact.abs())[differ].max()) if bool(differ.any()) else 0.0
    return (
        f"miStudio keeps logarithms of thresholds in float32: there {int(differ.sum())} of {len(exact)} thresholds"
        f" differ from these by up to {largest:.0e} of their value; the exact ones are in {EXACT_FILE}",
    )


def _round_to(exact: Tensor, rounded: Float[Tensor, " d_sae"]) -> bool:
    """Whether `rounded` is what a float32 logarithm leaves of the thresholds `exact`."""
    if exact.dtype != torch.float32 or exact.shape != rounded.shape:
        return False
    step = torch.finfo(torch.float32).eps * (1 + exact.double().log().abs()) * exact
    return bool(((exact == rounded) | ((exact - rounded).abs() <= step)).all())


def _settings(file: Path, strings: Mapping[str, str]) -> dict[str, Any]:
    """What is said beside the tensors: the checkpoint's string metadata, and metadata.json, which has the last word."""
    settings: dict[str, Any] = dict(strings)
    if (file.parent / METADATA_FILE).is_file():
        settings |= read_settings(file.parent / METADATA_FILE, "miStudio metadata")
    for name in ("hyperparameters", "training_hyperparameters"):  # as the service nests what the training was given
        nested = settings.get(name)
        if isinstance(nested, str):
            nested = parse_settings(nested, f"{file}: {name}")
        if isinstance(nested, dict):
            settings = {**nested, **settings}
    return settings


def _normalisation(file: Path, settings: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    named = settings.get("normalize_activations")
    if named is not None:
        if named not in NORMALIZE:
            raise MechintError(f"{file}: normalize_activations {named!r} is not one of {', '.join(NORMALIZE)}")
        return str(named), ()
    if "step" in settings and "original_format" not in settings:
        note = (
            "nothing says how inputs were normalised: taken as miStudio's default for training, constant_norm_rescale;"
            f' if it was not, write {{"normalize_activations": "none"}} to {METADATA_FILE} beside the checkpoint'
        )
        return "constant_norm_rescale", (note,)
    return "none", ()


def k_of_percent(percent: Any, d_sae: int, file: Path) -> int:
    """Latents kept a vector, as miStudio counts them. Raises `MechintError` for what is no percentage."""
    try:
        number = float(percent)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(percent, bool) or not 0 < number <= 100:
        raise MechintError(f"{file}: top_k_sparsity should be a percentage above 0, found {percent!r}")
    return min(d_sae, max(1, int(number / 100 * d_sae)))


def _metadata(file: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    ours = settings.get("mechint")
    if isinstance(ours, dict):
        return dict(ours)
    metadata: dict[str, Any] = {"processing": "raw"}  # it hooks Hugging Face's modules
    if isinstance(settings.get("model_name"), str):
        metadata["model_name"] = settings["model_name"]
    found = re.fullmatch(r"layer_(\d+)(?:_(\w+))?", file.absolute().parent.name)
    if found and (found[2] or "residual") in HOOKS:
        metadata["hook_name"] = f"blocks.{found[1]}.{HOOKS[found[2] or 'residual']}"
    return metadata


def holds(sae: SAE) -> str | None:
    if sae.architecture == "topk":
        return "the k of a top-k (miStudio keeps it with the training, not the checkpoint: it would apply ReLU alone)"
    reason = beyond(sae, architectures=("standard", "jumprelu"), subtracts_b_dec=False, normalize=NORMALIZE)
    if reason is None and sae.architecture == "jumprelu" and bool((sae.weights()["threshold"] < 0).any()):
        return "thresholds below 0 (it keeps their logarithms)"
    return reason


def write(sae: SAE, path: Path) -> None:
    refuse(FORMAT, sae)
    make_dir(path)
    t = sae.weights()
    if sae.architecture == "jumprelu":
        kind, activation = "JumpReLUSAE", "jumprelu"
        tensors = {"W_enc": t["W_enc"].t(), "b_enc": t["b_enc"], "W_dec": t["W_dec"].t(), "b_dec": t["b_dec"]}
        tensors[LOG_THRESHOLD] = nearest_logs(t["threshold"])
        if not torch.equal(of_logs(tensors[LOG_THRESHOLD]), t["threshold"]):
            write_safetensors(path / EXACT_FILE, {"threshold": t["threshold"]})
    else:
        kind, activation = "SparseAutoencoder", "relu"
        tensors = {
            "encoder.weight": t["W_enc"].t(),
            "encoder.bias": t["b_enc"],
            "decoder.weight": t["W_dec"].t(),
            "decoder.bias": torch.zeros_like(t["b_dec"]),
            "decoder_bias": t["b_dec"],
        }
    model = {f"model.{name}": tensor for name, tensor in tensors.items()}
    write_safetensors(path / CHECKPOINT_FILE, model, {"architecture": kind})
    metadata = {
        "format": "mistudio",
        "original_format": "mechint",
        "model_name": sae.metadata.get("model_name"),
        "layer": layer_of(sae.metadata),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "architecture": sae.architecture,
        "activation_fn": activation,
        "normalize_activations": sae.cfg.normalize_activations,
        "mechint": sae.metadata,
    }
    write_json(path / METADATA_FILE, metadata, overwrite=False)


FORMAT = Format(
    name="mistudio",
    title="miStudio checkpoint",
    marks="`checkpoint.safetensors` of `model.encoder.weight` ... or `model.W_enc` ..., also in `layer_*` folders",
    sniff=sniff,
    read=read,
    write=write,
    holds=holds,
)
