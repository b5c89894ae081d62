"""dictionary_learning: a folder with `ae.pt` and `config.json`, whose `trainer.dict_class` says what the tensors are.

    AutoEncoder             bias  encoder.{weight,bias}  decoder.weight               ReLU, bias subtracted
    AutoEncoderNew          encoder.{weight,bias}  decoder.{weight,bias}              ReLU, not subtracted
    GatedAutoEncoder        decoder_bias  encoder.weight  r_mag  gate_bias  mag_bias  decoder.weight
    AutoEncoderTopK         encoder.{weight,bias}  decoder.weight  b_dec  k  threshold      top-k of ReLU
    BatchTopKSAE            the same names; applied as ReLU(pre) above the one threshold
    MatryoshkaBatchTopKSAE  W_enc  b_enc  W_dec  b_dec  k  threshold  group_sizes     as BatchTopKSAE
    JumpReluAutoEncoder     W_enc  b_enc  W_dec  b_dec  threshold [d_sae]             JumpReLU, b_dec not subtracted

`.weight` tensors are torch.nn.Linear's: the transposes of ours. The library divides the decoder rows of an AutoEncoder
by their norms when it loads one, and multiplies the latents; an SAE whose rows are not of unit norm is therefore
written as AutoEncoderNew, which it leaves alone. Activations come from the model as it is.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechint.errors import MechintError, nearest
from mechint.formats.base import Format
from mechint.formats.files import peek_pt, read_pt, read_settings, refuse_unknown, take_tensors, whole_number, write_pt
from mechint.formats.folds import fold_threshold
from mechint.formats.limits import beyond, layer_of, refuse
from mechint.provenance import make_dir, write_json
from mechint.sae.base import SAE

WEIGHTS_FILE, CONFIG_FILE = "ae.pt", "config.json"
LINEAR = {"encoder.weight T": "W_enc", "encoder.bias": "b_enc", "decoder.weight T": "W_dec"}
PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
# Their names to ours, by dict_class.
NAMES: dict[str, dict[str, str]] = {
    "AutoEncoder": {**LINEAR, "bias": "b_dec"},
    "AutoEncoderNew": {**LINEAR, "decoder.bias": "b_dec"},
    "GatedAutoEncoder": {
        "encoder.weight T": "W_enc",
        "decoder.weight T": "W_dec",
        "decoder_bias": "b_dec",
        "r_mag": "r_mag",
        "gate_bias": "b_gate",
        "mag_bias": "b_mag",
    },
    "AutoEncoderTopK": {**LINEAR, "b_dec": "b_dec"},
    "BatchTopKSAE": {**LINEAR, "b_dec": "b_dec"},
    "MatryoshkaBatchTopKSAE": PLAIN,
    "JumpReluAutoEncoder": {**PLAIN, "threshold": "threshold"},
}
# Beside the tensors: what these classes keep as numbers.
NUMBERS = {
    "AutoEncoderTopK": {"k", "threshold"},
    "BatchTopKSAE": {"k", "threshold"},
    "MatryoshkaBatchTopKSAE": {"k", "threshold", "group_sizes"},
}
BATCH = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")
UNSUBTRACTED = ("AutoEncoderNew", "JumpReluAutoEncoder")
# The library's test for leaving an AutoEncoder's decoder as it is.
UNIT_RTOL, UNIT_ATOL = 1e-5, 1e-8
HOOKS = {"resid_post": "hook_resid_post", "resid_pre": "hook_resid_pre", "mlp_out": "hook_mlp_out"}
HOOKS |= {"attn_out": "hook_attn_out", "attention_out": "hook_attn_out"}


def _file(path: Path) -> Path:
    return path / WEIGHTS_FILE if path.is_dir() else path


def _config_file(file: Path) -> Path | None:
    """Beside the weights; for those in `checkpoints/`, one folder up."""
    return next(
        (place / CONFIG_FILE for place in (file.parent, file.parent.parent) if (place / CONFIG_FILE).is_file()), None
    )


def sniff(path: Path) -> bool:
    file = _file(path)
    if not file.is_file() or not (path.is_dir() or re.fullmatch(r"ae\w*\.pt", file.name)):
        return False
    return _classes(peek_pt(file)) != []


def read(path: Path) -> SAE:
    file = _file(path)
    state = read_pt(file)
    config_file = _config_file(file)
    config = read_settings(config_file, "dictionary_learning configuration") if config_file else {}
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    kind = _class(file, state, trainer)
    names, numbers = NAMES[kind], NUMBERS.get(kind, set())
    refuse_unknown(state, {name.removesuffix(" T") for name in names} | numbers, file)
    tensors = take_tensors(state, names, file)
    architecture, notes = "standard", ()
    options: dict[str, Any] = {}
    metadata = _metadata(config, trainer)
    if numbers:
        k = _k(file, state, trainer)
        if kind in BATCH:
            architecture = "jumprelu"
            tensors["threshold"] = _one_threshold(file, state, tensors["b_enc"])
            training = "batchtopk" if kind == "BatchTopKSAE" else "matryoshka_batchtopk"
            metadata |= {"training_architecture": training, "training_options": {"k": k}}
        else:
            architecture, options = "topk", {"k": k}
    elif kind == "JumpReluAutoEncoder":
        architecture = "jumprelu"
    elif kind == "GatedAutoEncoder":
        architecture = "gated"
    subtracts = kind not in UNSUBTRACTED
    if kind == "AutoEncoder" and not _unit_rows(tensors["W_dec"]):
        notes = ("rows of W_dec are not of unit norm: the library multiplies latents by their norms when it loads it",)
    said: dict[str, Any] = {"metadata": metadata, "notes": notes, **options}
    return fold_threshold(SAE.from_tensors(architecture, tensors, file, apply_b_dec_to_input=subtracts, **said))


def _classes(names: frozenset[str]) -> list[str]:
    """The dict_classes that have these names in their files."""
    return [
        kind
        for kind, tensors in NAMES.items()
        if {name.removesuffix(" T") for name in tensors}
        <= names
        <= {name.removesuffix(" T") for name in tensors} | NUMBERS.get(kind, set())
    ]


def _class(file: Path, state: Mapping[str, Any], trainer: Mapping[str, Any]) -> str:
    """By config.json if there is one, else by the names, if only one class has them."""
    stated = trainer.get("dict_class")
    if stated is not None:
        if stated not in NAMES:
            raise MechintError(f"{file}: unknown dict_class {stated!r}; {nearest(str(stated), NAMES)}")
        return stated
    fitting = _classes(frozenset(state))
    if not fitting:
        found = ", ".join(sorted(state)[:8]) or "nothing"
        raise MechintError(f"{file} is not a dictionary of dictionary_learning: found {found}")
    if len(fitting) > 1:
        raise MechintError(
            f"{file} may be {' or '.join(fitting)}: expected {CONFIG_FILE} beside it, with trainer.dict_class"
        )
    return fitting[0]


def _k(file: Path, state: Mapping[str, Any], trainer: Mapping[str, Any]) -> int:
    found = {whole_number(place["k"], "k", file) for place in (state, trainer) if place.get("k") is not None}
    if len(found) != 1:
        raise MechintError(
            f"{file}: k is {' and '.join(map(str, sorted(found))) or 'nowhere'} in weights and {CONFIG_FILE}"
        )
    return found.pop()


def _one_threshold(file: Path, state: Mapping[str, Any], b_enc: Tensor) -> Tensor:
    """`[d_sae]` from the one number; -1 stands for none learned, which leaves ReLU: 0."""
    value = state.get("threshold")
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise MechintError(f"{file}: threshold should be one number; without it one vector cannot be encoded")
    return value.float().reshape(()).clamp_min(0.0).expand(b_enc.shape)


def _unit_rows(W_dec: Tensor) -> bool:
    norms = W_dec.norm(dim=1)
    return torch.allclose(norms, torch.ones_like(norms), rtol=UNIT_RTOL, atol=UNIT_ATOL)


def _metadata(config: Mapping[str, Any], trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Model, layer and hook as the trainer names them; the library reads activations from the model as it is."""
    ours = config.get("mechint")
    if isinstance(ours, dict):
        return dict(ours)
    metadata: dict[str, Any] = {"processing": "raw"}
    if isinstance(trainer.get("lm_name"), str):
        metadata["model_name"] = trainer["lm_name"]
    if isinstance(layer := trainer.get("layer"), int):
        metadata["layer"] = layer
    found = re.fullmatch(r"(\w+)_layer_(\d+)", str(trainer.get("submodule_name")))
    if found and found[1] in HOOKS:
        metadata["hook_name"] = f"blocks.{found[2]}.{HOOKS[found[1]]}"
    return metadata


def _class_for(sae: SAE) -> str:
    """The dict_class that can hold exactly this SAE, if `holds` says that there is one."""
    if sae.architecture == "standard":
        return "AutoEncoder" if sae.cfg.apply_b_dec_to_input else "AutoEncoderNew"
    if sae.architecture == "jumprelu":
        return "BatchTopKSAE" if sae.cfg.apply_b_dec_to_input else "JumpReluAutoEncoder"
    return {"topk": "AutoEncoderTopK", "gated": "GatedAutoEncoder"}[sae.architecture]


def _trained_k(sae: SAE) -> int | None:
    options = sae.metadata.get("training_options")
    k = options.get("k") if isinstance(options, dict) else None
    return int(k) if isinstance(k, (int, float)) and k == k // 1 and k >= 1 else None


def holds(sae: SAE) -> str | None:
    known = ("standard", "topk", "jumprelu", "gated")
    subtracts = True if sae.architecture in ("topk", "gated") else None
    if (reason := beyond(sae, architectures=known, subtracts_b_dec=subtracts)) is not None:
        return reason
    if sae.architecture == "standard" and sae.cfg.apply_b_dec_to_input and not _unit_rows(sae.W_dec.detach()):
        return "an AutoEncoder whose decoder rows are not of unit norm (the library rescales it when it loads it)"
    if sae.architecture == "jumprelu" and sae.cfg.apply_b_dec_to_input:
        threshold = sae.get_parameter("threshold").detach()
        if not bool((threshold == threshold[0]).all()) or float(threshold[0]) < 0 or _trained_k(sae) is None:
            return "a jumprelu that subtracts b_dec, unless as BatchTopK with one threshold and the k of its training"
    return None


def write(sae: SAE, path: Path) -> None:
    refuse(FORMAT, sae)
    make_dir(path)
    kind = _class_for(sae)
    state, t = {}, sae.weights()
    for theirs, ours in NAMES[kind].items():
        tensor = t[ours]
        state[theirs.removesuffix(" T")] = tensor.t() if theirs.endswith(" T") else tensor
    k = sae.k if kind == "AutoEncoderTopK" else _trained_k(sae)
    if kind in NUMBERS:
        state["k"] = torch.tensor(k, dtype=torch.int)
        # AutoEncoderTopK: none learned
        state["threshold"] = t["threshold"][0].clone() if kind in BATCH else torch.tensor(-1.0)
    write_pt(path / WEIGHTS_FILE, state)
    trainer = {
        "dict_class": kind,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "layer": layer_of(sae.metadata),
        "lm_name": sae.metadata.get("model_name"),
        "submodule_name": _submodule(sae.metadata),
        **({"k": k} if kind in NUMBERS else {}),
    }
    write_json(path / CONFIG_FILE, {"trainer": trainer, "buffer": {}, "mechint": sae.metadata}, overwrite=False)


def _submodule(metadata: Mapping[str, Any]) -> str | None:
    hook = str(metadata.get("hook_name")).rpartition(".")[2]
    layer = layer_of(dict(metadata))
    return next((f"{name}_layer_{layer}" for name, known in HOOKS.items() if known == hook and layer is not None), None)


FORMAT = Format(
    name="dictionary_learning",
    title="dictionary_learning",
    marks="a folder with `ae.pt` and `config.json`, whose `trainer.dict_class` names the class",
    sniff=sniff,
    read=read,
    write=write,
    holds=holds,
)
