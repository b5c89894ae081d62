"""saev: one `sae.pt`, a line of JSON and then the archive of `torch.save`.

    W_dec [d_sae, d_in]   b_dec [d_in]   W_enc [d_in, d_sae]   b_enc [d_sae]   (activation.threshold [], BatchTopK)

The line has had several shapes. Bare settings without `schema`, and schema 1, come from code that encoded
(x - b_dec) @ W_enc; since 2025-07-31 (schema 2 on) b_dec is not subtracted. Today's saev loads the old files without
it: other features than those that were trained. Activations: Relu; TopK, which keeps negative entries; BatchTopK, which
applies its running threshold as a JumpReLU.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mechint.errors import MechintError
from mechint.formats.base import Format
from mechint.formats.files import (
    MAX_HEADER,
    parse_settings,
    read_pt,
    refuse_unknown,
    require_file,
    take_tensors,
    whole_number,
    write_pt,
)
from mechint.formats.limits import beyond, refuse
from mechint.provenance import get_git_commit
from mechint.sae.base import SAE

WEIGHTS_FILE = "sae.pt"
SCHEMA = 5
# The first schema of files whose encoder does not subtract b_dec.
UNSUBTRACTED = 2
NAMES = {"W_dec": "W_dec", "b_dec": "b_dec", "W_enc": "W_enc", "b_enc": "b_enc"}
THRESHOLD = "activation.threshold"
KEYS = {"relu": "Relu", "top-k": "TopK", "batch-top-k": "BatchTopK"}
ZIP_START = b"PK\x03\x04"
# BatchTopK's setting for training, of no use when the SAE is applied; a file of schema 5 must have one.
DEFAULT_TOP_K = 32


def _file(path: Path) -> Path:
    return path / WEIGHTS_FILE if path.is_dir() else path


def sniff(path: Path) -> bool:
    path = _file(path)
    try:
        return path.is_file() and _header(path) is not None
    except MechintError:
        return False


def _header(path: Path) -> tuple[dict[str, Any], int] | None:
    """`(first line as JSON, its length)`, or None where the file does not begin with a line and an archive."""
    require_file(path)
    try:
        with open(path, "rb") as file:
            if file.read(1) != b"{":
                return None
            line = b"{" + file.readline(MAX_HEADER)
            if not line.endswith(b"\n") or file.read(len(ZIP_START)) != ZIP_START:
                return None
    except OSError as error:
        raise MechintError(f"{path} cannot be read: {error.strerror}") from error
    return parse_settings(line, f"{path}: its first line"), len(line)


def read(path: Path) -> SAE:
    path = _file(path)
    found = _header(path)
    if found is None:
        raise MechintError(f"{path} is not a saev checkpoint: expected a line of JSON and a torch archive after it")
    header, offset = found
    schema = header.get("schema", 0)
    if "schema" in header and (isinstance(schema, bool) or schema not in range(1, SCHEMA + 1)):
        raise MechintError(f"{path}: unknown schema {schema!r}; known are files without one and 1 to {SCHEMA}")
    cfg = header.get("cfg", {}) if schema else header
    if not isinstance(cfg, dict):
        raise MechintError(f"{path}: cfg should be a JSON object, found {type(cfg).__name__}")
    kind, params = _activation(path, header, cfg)
    state = read_pt(path, offset=offset)
    refuse_unknown(state, {*NAMES, THRESHOLD}, path)
    tensors = take_tensors(state, NAMES, path)
    _check_widths(path, cfg, tensors)
    architecture, notes = "standard", ()
    options: dict[str, Any] = {}
    if kind == "TopK":
        architecture, options = "topk", {"k": whole_number(params.get("top_k"), "top_k", path), "relu": False}
    elif kind == "BatchTopK":
        architecture = "jumprelu"
        tensors["threshold"] = _threshold(path, state, tensors["b_enc"])
    if schema == UNSUBTRACTED:
        notes = ("schema 2: taken as not subtracting b_dec; saev dropped the subtraction on the day of this schema",)
    metadata: dict[str, Any] = {"processing": "raw"}
    if kind == "BatchTopK" and "top_k" in params:
        metadata |= {"training_architecture": "batchtopk", "training_options": {"k": params["top_k"]}}
    subtracts = schema < UNSUBTRACTED
    return SAE.from_tensors(
        architecture, tensors, path, apply_b_dec_to_input=subtracts, metadata=metadata, notes=notes, **options
    )


def _activation(path: Path, header: Mapping[str, Any], cfg: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """`(Relu, TopK or BatchTopK; its settings)`, from whichever of the places a schema has them in."""
    nested = cfg.get("activation")
    if isinstance(nested, dict):
        params = nested.get("params")
        params = params if isinstance(params, dict) else {}
        # Named twice, by class and by key ("kind" before); a file that contradicts itself is read by neither.
        key = params.get("key", params.get("kind"))
        names = {nested["cls"]} if isinstance(nested.get("cls"), str) else set()
        names |= {KEYS.get(key, key)} if isinstance(key, str) else set()
        name = names.pop() if len(names) == 1 else " and ".join(sorted(names))
    else:  # bare settings and schema 1: flat, and the class is the activation's
        params, name = cfg, header.get("cls", "Relu")
    if name not in KEYS.values():
        raise MechintError(f"{path}: activation {name!r} is not one of {', '.join(KEYS.values())}")
    return name, params


def _threshold(path: Path, state: Mapping[str, Any], b_enc: Tensor) -> Tensor:
    """`[d_sae]` from the one that BatchTopK keeps; where none was learned it is below 0, and the activation ReLU."""
    if THRESHOLD not in state:
        raise MechintError(
            f"{path}: BatchTopK without its threshold (saved before saev kept it): no vector can be encoded alone"
        )
    value = state[THRESHOLD]
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise MechintError(f"{path}: {THRESHOLD} should be one number")
    return value.float().reshape(()).clamp_min(0.0).expand(b_enc.shape)


def _check_widths(path: Path, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    d_in = cfg.get("d_model", cfg.get("d_vit"))
    factor = cfg.get("exp_factor")
    if "d_sae" in cfg:
        d_sae = cfg["d_sae"]
    else:
        d_sae = d_in * factor if isinstance(d_in, int) and isinstance(factor, int) else None
    stated, found = (d_sae, d_in), tuple(tensors["W_dec"].shape)
    if len(found) == 2 and any(value is not None and value != real for value, real in zip(stated, found, strict=True)):
        raise MechintError(f"{path}: its first line says W_dec [{d_sae}, {d_in}], the weights are {list(found)}")


def holds(sae: SAE) -> str | None:
    reason = beyond(sae, architectures=("standard", "topk", "jumprelu"), subtracts_b_dec=False, relu=False)
    if reason is None and sae.architecture == "jumprelu":
        threshold = sae.weights()["threshold"]
        if not bool((threshold == threshold[0]).all()):
            return "different thresholds (it has one for all latents)"
        if float(threshold[0]) < 0:
            return "a threshold below 0"
    return reason


def write(sae: SAE, path: Path) -> None:
    refuse(FORMAT, sae)
    t = sae.weights()
    state = {name: t[name] for name in NAMES}
    if sae.architecture == "jumprelu":
        state[THRESHOLD] = t["threshold"][0].clone()
    header = {
        "schema": SCHEMA,
        "cfg": {
            "d_model": sae.d_in,
            "d_sae": sae.d_sae,
            "activation": _activation_header(sae),
            "reinit_blend": 0.8,
            "reinit_enc_dec_tranpose": True,  # saev spells it so
            "remove_parallel_grads": True,
            "normalize_w_dec": True,
        },
        "commit": get_git_commit(),
        "lib": "0.1.0",
    }
    write_pt(path, state, header=json.dumps(header, separators=(",", ":")).encode() + b"\n")


def _activation_header(sae: SAE) -> dict[str, Any]:
    none = {"sparsity": {"cls": "NoSparsity", "params": {"key": "no-sparsity"}}}
    aux = {"aux": {"cls": "NoAux", "params": {"key": "no-aux"}}}
    if sae.architecture == "standard":
        return {"cls": "Relu", "params": {"key": "relu", **none, **aux}}
    if sae.architecture == "topk":
        return {"cls": "TopK", "params": {"key": "top-k", "top_k": sae.k, **none, **aux}}
    trained = (sae.metadata.get("training_options") or {}).get("k", DEFAULT_TOP_K)
    top_k = max(1, round(trained)) if isinstance(trained, (int, float)) else DEFAULT_TOP_K
    return {"cls": "BatchTopK", "params": {"key": "batch-top-k", "top_k": top_k, **none, "momentum": 0.1, **aux}}


FORMAT = Format(
    name="saev",
    title="saev sae.pt",
    marks="`sae.pt`: a line of JSON, then a torch archive with `W_dec`, `b_dec`, `W_enc`, `b_enc`",
    sniff=sniff,
    read=read,
    write=write,
    holds=holds,
    file_name=WEIGHTS_FILE,
)
