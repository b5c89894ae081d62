"""SAELens 6: a folder with cfg.json and sae_weights.safetensors. Reads what came before 6 too (`saelens_pre6`).

    pre = (norm_in(x) - b_dec * apply_b_dec_to_input) @ W_enc + b_enc

`batchtopk` and `matryoshka_batchtopk` stand only in checkpoints of a training; applied, they are jumprelu with one cut.
Names and meaning of keys: SAELens 6.54.12.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechint.errors import MechintError
from mechint.formats.base import Format, Loaded, Normalize, checked
from mechint.formats.files import read_safetensors, read_settings, whole_number, write_safetensors
from mechint.formats.folds import fold_norms
from mechint.formats.limits import beyond, refuse
from mechint.formats.mistudio import k_of_percent
from mechint.provenance import make_dir, write_json
from mechint.sae.io import CFG_FILE, OUR_MARKS, WEIGHTS_FILE, own_metadata, reshape_activations

# SAELens's names of what is done to each input; ours. Its constant scale is a number that is not in the files.
NORMALIZE: dict[str, Normalize] = {"none": "none", "constant_norm_rescale": "sqrt_d", "layer_norm": "layer_norm"}
AVERAGE = "expected_average_only_in"
# Beside the plain names of mechint's architectures.
TRANSCODERS = {"transcoder": "standard", "skip_transcoder": "standard"} | {
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
BY_BATCH = ("batchtopk", "matryoshka_batchtopk")
PLAIN = ("standard", "topk", "jumprelu", "gated")
ARCHITECTURES = (*PLAIN, *TRANSCODERS)
# What a pre-6 file holds at the top that 6 keeps under `metadata`.
OLD_METADATA = {
    **{name: name for name in ("model_name", "hook_name", "hook_layer", "hook_head_index", "model_class_name")},
    **{name: name for name in ("model_from_pretrained_kwargs", "prepend_bos", "exclude_special_tokens")},
    **{name: name for name in ("neuronpedia_id", "context_size", "seqpos_slice", "dataset_path")},
    **{"hook_point": "hook_name", "hook_point_layer": "hook_layer", "hook_point_head_index": "hook_head_index"},
}
# Beside the weights of a trained SAE: log10 of how often each latent fired.
SPARSITY_FILE = "sparsity.safetensors"
# Largest cfg.json that is looked into: real ones have some KB.
CFG_BYTES = 1 << 22


def sniff(path: Path) -> bool:
    cfg = peek_cfg(path)
    return cfg is not None and not is_pre_6(cfg)


def peek_cfg(path: Path) -> dict[str, Any] | None:
    """cfg.json in or beside `path`, if it is that of an SAE in this layout; None if not, or if it cannot be read."""
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and path.name not in (CFG_FILE, WEIGHTS_FILE):
        return None
    config = folder / CFG_FILE
    try:
        if not (folder / WEIGHTS_FILE).is_file() or not config.is_file() or config.stat().st_size > CFG_BYTES:
            return None
        cfg = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return cfg if isinstance(cfg, dict) and "d_in" in cfg and "d_sae" in cfg else None


def is_pre_6(cfg: dict[str, Any]) -> bool:
    """Whether it is from before SAELens 6, as SAELens decides it: by the version that the file names, if any."""
    metadata = cfg.get("metadata")
    version = cfg.get("sae_lens_version") or (metadata.get("sae_lens_version") if isinstance(metadata, dict) else None)
    major = str(version or "").split(".")[0]
    return not (major.isdigit() and int(major) >= 6)


def read(path: Path) -> Loaded:
    folder = path if path.is_dir() else path.parent
    config = folder / CFG_FILE
    cfg = read_settings(config, "SAE configuration")
    pre_6 = is_pre_6(cfg)
    tensors = read_safetensors(folder / WEIGHTS_FILE)[0]
    if pre_6:
        cfg = as_6(cfg, config)
    metadata = own_metadata(cfg.get("metadata") or {})
    if (said := cfg.get("reshape_activations", "none")) != reshape_activations(metadata):
        metadata["reshape_activations"] = said
    notes = list(cfg.get("notes", ()))
    extras = read_sparsity(folder, cfg.get("d_sae"), notes)
    architecture = cfg.get("architecture", "standard")
    if architecture not in (*ARCHITECTURES, *BY_BATCH):
        raise MechintError(
            f"{config}: the architecture {architecture!r} does not open here; these do: {', '.join(ARCHITECTURES)}"
        )
    normalize, scale = input_normalisation(cfg, metadata, config)
    transcoder = architecture in TRANSCODERS
    tensors = without_finetuning(tensors, notes, config)
    if "log_threshold" in tensors:  # training checkpoints of SAELens's first jumprelu
        tensors["threshold"] = tensors.pop("log_threshold").float().exp()
    rescale = bool(cfg.get("rescale_acts_by_decoder_norm", False))
    options: dict[str, Any] = {}
    if architecture == "topk":
        if "k" not in cfg:
            raise MechintError(f'{config}: topk without k; write the number of active latents as "k" into the file')
        options["k"] = cfg["k"]
    loaded = Loaded(
        TRANSCODERS.get(architecture, architecture),
        tensors,
        options,
        apply_b_dec_to_input=bool(cfg.get("apply_b_dec_to_input", True)) and not transcoder,
        normalize=normalize,
        scale=scale,
        rescale_acts_by_decoder_norm=rescale and architecture == "topk",
        transcoder=transcoder,
        metadata=metadata,
        notes=tuple(notes),
        extras=extras,
    )
    if architecture in BY_BATCH:
        loaded = by_one_cut(loaded, rescale, config)
    loaded = checked(loaded, folder / WEIGHTS_FILE)
    if ("W_skip" in loaded.tensors) != ("skip" in architecture):
        raise MechintError(f"{config}: {architecture} and {WEIGHTS_FILE} disagree about W_skip")
    for name, found in {"d_in": loaded.d_in, "d_sae": loaded.d_sae, "d_out": loaded.d_out}.items():
        if cfg.get(name, found) != found and (name != "d_out" or transcoder):
            raise MechintError(f"{config} says {name} {cfg[name]}, but the weights have {found}")
    return loaded


def read_sparsity(folder: Path, d_sae: Any, notes: list[str]) -> dict[str, Tensor]:
    """`sparsity [d_sae]` of the file beside the weights; one that is broken is said in `notes`, for it changes nothing
    that the SAE computes."""
    place = folder / SPARSITY_FILE
    if not place.is_file():
        return {}
    try:
        sparsity = read_safetensors(place)[0].get("sparsity")
    except MechintError as error:
        notes.append(f"left aside: {error}")
        return {}
    if sparsity is None or not sparsity.is_floating_point() or tuple(sparsity.shape) != (d_sae,):
        notes.append(f"left aside: {place} holds no sparsity [{d_sae}]")
        return {}
    return {"sparsity": sparsity.float()}


def as_6(cfg: dict[str, Any], source: Path) -> dict[str, Any]:
    """A cfg.json from before 6 in the keys of 6. Raises `MechintError` for an activation function that 6 has not."""
    new = dict(cfg)
    old = {OLD_METADATA[name]: value for name, value in cfg.items() if name in OLD_METADATA and value is not None}
    recorded = cfg.get("metadata")
    new["metadata"] = {**old, **(recorded if isinstance(recorded, dict) else {})}
    name = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    if name == "topk" or cfg.get("architecture") == "topk":
        k = _k_of_pre_6(cfg, source)
        if k is None:
            raise MechintError(
                f'{source}: a topk activation without k; write activation_fn_kwargs {{"k": ...}} into the file'
            )
        new |= {"architecture": "topk", "k": k}
    elif name not in ("relu", "jumprelu"):
        raise MechintError(f"{source}: the activation function {name!r} does not open here; relu, topk, jumprelu do")
    if isinstance(new.get("normalize_activations"), bool):
        new["normalize_activations"] = AVERAGE if new["normalize_activations"] else "none"
    hook = new["metadata"].get("hook_name")
    new.setdefault("reshape_activations", "hook_z" if "hook_z" in str(hook) else "none")
    said = "processing" in new["metadata"]
    new["notes"] = [] if said else [f"{CFG_FILE} does not say how the model's weights were processed"]
    return new


def _k_of_pre_6(cfg: dict[str, Any], source: Path) -> Any:
    """k of a topk from wherever it is, None if it is nowhere. miStudio's exports have a percentage instead."""
    kwargs, extra = cfg.get("activation_fn_kwargs"), cfg.get("extra_metadata")
    k = cfg.get("k", kwargs.get("k") if isinstance(kwargs, dict) else None)
    percent = extra.get("top_k_sparsity") if isinstance(extra, dict) else None
    if k is None and percent is not None:
        return k_of_percent(percent, whole_number(cfg.get("d_sae"), "d_sae", source), source)
    return k


def input_normalisation(cfg: dict[str, Any], metadata: dict[str, Any], source: Path) -> tuple[Normalize, float]:
    """`(normalize, scale)`. Raises `MechintError` where the files do not say what is done to the input."""
    name = str(cfg.get("normalize_activations") or "none")
    if name in NORMALIZE:
        return NORMALIZE[name], 1.0
    if name == AVERAGE:
        factor = cfg.get("norm_scaling_factor", metadata.get("norm_scaling_factor"))
        if isinstance(factor, (int, float)) and not isinstance(factor, bool):
            return "none", float(factor)
        raise MechintError(
            f"{source}: inputs are scaled by a constant ({AVERAGE}) that is not in the files; write it into cfg.json"
            " as norm_scaling_factor (SAELens's registry has those of its releases)"
        )
    raise MechintError(f"{source}: the input normalisation {name!r} does not open here; {', '.join(NORMALIZE)} do")


def without_finetuning(tensors: dict[str, Tensor], notes: list[str], source: Path) -> dict[str, Tensor]:
    """Without `scaling_factor [d_sae]`, by which old files multiply activations before decoding: it goes into W_dec."""
    tensors = dict(tensors)
    factor = tensors.pop("scaling_factor", tensors.pop("finetuning_scaling_factor", None))
    if factor is None or bool((factor == 1).all()):
        return tensors
    W_dec = tensors.get("W_dec")
    if W_dec is None or W_dec.ndim != 2 or factor.shape != W_dec.shape[:1]:
        raise MechintError(f"{source}: scaling_factor has shape {list(factor.shape)}, expected [d_sae]")
    notes.append("the finetuned scaling_factor of each latent is folded into W_dec")
    tensors["W_dec"] = (W_dec.double() * factor.double()[:, None]).float()
    return tensors


def by_one_cut(loaded: Loaded, rescale: bool, source: Path) -> Loaded:
    """A batchtopk checkpoint as it is applied: jumprelu with the learned cut for every latent."""
    tensors = dict(loaded.tensors)
    cut = tensors.pop("topk_threshold", None)
    if cut is None or cut.numel() != 1 or "b_enc" not in tensors:
        raise MechintError(f"{source}: {loaded.architecture} without its topk_threshold: save the inference model")
    # as a topk only while its norms are folded: the cut is in units of activation times norm
    held = replace(loaded, architecture="topk", tensors=tensors, options={"k": 1}, rescale_acts_by_decoder_norm=rescale)
    folded = fold_norms(checked(held, source))
    threshold = torch.full((folded.d_sae,), float(cut))
    return replace(folded, architecture="jumprelu", options={}, tensors={**folded.tensors, "threshold": threshold})


# --- writing ----------------------------------------------------------------------------------------------------------


def holds(loaded: Loaded) -> str | None:
    kinds = tuple(TRANSCODERS.values()) if loaded.transcoder else PLAIN
    return beyond(
        replace(loaded, rescale_acts_by_decoder_norm=False),  # it has that
        architectures=tuple(dict.fromkeys(kinds)),
        subtracts_b_dec=None,
        normalize=tuple(NORMALIZE.values()),
        transcoder=True,
    )


def architecture_name(loaded: Loaded) -> str:
    """SAELens's name of it."""
    if not loaded.transcoder:
        return loaded.architecture
    return ("jumprelu_" if loaded.architecture == "jumprelu" else "") + (
        "skip_transcoder" if "W_skip" in loaded.tensors else "transcoder"
    )


def common_cfg(loaded: Loaded) -> dict[str, Any]:
    """The keys that 6 and what came before it share."""
    names = {ours: theirs for theirs, ours in NORMALIZE.items()}
    return {
        "architecture": architecture_name(loaded),
        "d_in": loaded.d_in,
        "d_sae": loaded.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": loaded.apply_b_dec_to_input,
        "normalize_activations": names[loaded.normalize],
    }


def write(loaded: Loaded, path: Path) -> None:
    refuse(FORMAT, loaded)
    cfg = common_cfg(loaded)
    metadata = dict(loaded.metadata)
    cfg["reshape_activations"] = metadata.pop("reshape_activations", reshape_activations(metadata))
    if loaded.transcoder:
        cfg["d_out"] = loaded.d_out
    if loaded.architecture == "topk":
        cfg |= {**loaded.options, "rescale_acts_by_decoder_norm": loaded.rescale_acts_by_decoder_norm}
    cfg["metadata"] = {**metadata, **OUR_MARKS}
    write_folder(loaded, cfg, path)


def write_folder(loaded: Loaded, cfg: dict[str, Any], folder: Path) -> None:
    """cfg.json last: a folder without it is not taken for an SAE."""
    make_dir(folder)
    write_safetensors(folder / WEIGHTS_FILE, loaded.tensors)
    if "sparsity" in loaded.extras:
        write_safetensors(folder / SPARSITY_FILE, {"sparsity": loaded.extras["sparsity"]})
    write_json(folder / CFG_FILE, cfg)


FORMAT = Format(
    name="saelens",
    title="SAELens 6",
    marks="cfg.json with a sae_lens_version of 6 or above, and sae_weights.safetensors",
    sniff=sniff,
    read=read,
    write=write,
    holds=holds,
)
