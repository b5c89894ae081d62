"""SAELens 6: a folder with cfg.json and sae_weights.safetensors. Reads what came before 6 too (`saelens_pre6`).

    pre = (norm_in(x) - b_dec * apply_b_dec_to_input) @ W_enc + b_enc

`batchtopk` and `matryoshka_batchtopk` stand only in checkpoints of a training; applied, they are jumprelu with one cut.
Names and meaning of keys: SAELens 6.54.12.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechint import __version__
from mechint.errors import MechintError, nearest
from mechint.formats.base import Format
from mechint.formats.files import read_safetensors, read_settings, whole_number, write_safetensors
from mechint.formats.folds import with_unit_decoder
from mechint.formats.limits import beyond, held_variant, refuse
from mechint.formats.mistudio import k_of_percent
from mechint.provenance import make_dir, scratch_folder, write_json
from mechint.sae.base import ARCHITECTURES, SAE
from mechint.sae.config import NORMALIZE, SAEConfig, reshape_activations

CFG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
# Beside the weights of a trained SAE: log10 of how often each latent fired.
SPARSITY_FILE = "sparsity.safetensors"
# The layout that cfg.json follows. SAELens keeps a file's metadata only beside a version of its own, from 6 on.
SAELENS_VERSION = "6.54.12"
# What every cfg.json of ours says of itself, in its metadata. Not kept when it is read.
OUR_MARKS = {"sae_lens_version": SAELENS_VERSION, "mechint_version": __version__}
# Of the note on a file without a record of processing.
ASSUMED = "does not say how the model's weights were processed"
# SAELens's constant scale, which is a number that is not in the files.
AVERAGE = "expected_average_only_in"
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
BY_BATCH = ("batchtopk", "matryoshka_batchtopk")
PLAIN = ("standard", "topk", "jumprelu", "gated")
# Names that mean the same: the field's many spellings.
SPELLINGS = {"batch_topk": "batchtopk", "jump_relu": "jumprelu", "top_k": "topk", "relu": "standard"}
# What a pre-6 file holds at the top that 6 keeps under `metadata`.
OLD_METADATA = {
    **{name: name for name in ("model_name", "hook_name", "hook_layer", "hook_head_index", "model_class_name")},
    **{name: name for name in ("model_from_pretrained_kwargs", "prepend_bos", "exclude_special_tokens")},
    **{name: name for name in ("neuronpedia_id", "context_size", "seqpos_slice", "dataset_path")},
    **{"hook_point": "hook_name", "hook_point_layer": "hook_layer", "hook_point_head_index": "hook_head_index"},
}
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


def read(path: Path, said: dict[str, Any] | None = None) -> SAE:
    """`said`: what is known of it from elsewhere, where cfg.json does not say it or is not there."""
    folder = path if path.is_dir() else path.parent
    config = folder / CFG_FILE
    cfg = said if said and not config.is_file() else {**(said or {}), **read_settings(config, "SAE configuration")}
    # under another name it is a file that only a registry says anything of
    weights = folder / WEIGHTS_FILE if path.is_dir() or path.name == CFG_FILE else path
    tensors = read_safetensors(weights)[0]
    refuse_contradictions(cfg, config)
    if is_pre_6(cfg):
        cfg = as_6(cfg, config)
    metadata = own_metadata(cfg.get("metadata") or {})
    if (said := cfg.get("reshape_activations", "none")) != reshape_activations(metadata):
        metadata["reshape_activations"] = said
    notes = list(cfg.get("notes", ()))
    sparsity = read_sparsity(folder, cfg.get("d_sae"), notes)
    architecture = str(cfg.get("architecture", "standard"))
    architecture = SPELLINGS.get(architecture, architecture)
    kind = SAEConfig(1, 1, architecture)
    known = (*PLAIN, *TRANSCODERS, *BY_BATCH, *ARCHITECTURES)
    if architecture not in known:
        raise MechintError(f"{config}: unknown architecture {architecture!r}; {nearest(architecture, known)}")
    normalize, scale = input_normalisation(cfg, metadata, config)
    tensors = without_finetuning(tensors, notes, config)
    if "log_threshold" in tensors:  # training checkpoints of SAELens's first jumprelu
        tensors["threshold"] = tensors.pop("log_threshold").float().exp()
    rescale = bool(cfg.get("rescale_acts_by_decoder_norm", False))
    if architecture in BY_BATCH:
        architecture, tensors = "jumprelu", with_one_cut(tensors, architecture, rescale, config)
    cls = ARCHITECTURES[SAEConfig(1, 1, architecture).base_architecture]
    wanted = [name for name in cls.saved_tensors if name in cls.options]
    if missing := [name for name in wanted if name not in cfg]:
        raise MechintError(f'{config}: {architecture} without {missing[0]}; write it as "{missing[0]}" into the file')
    sae = SAE.from_tensors(
        cls.architecture,
        tensors,
        folder / WEIGHTS_FILE,
        apply_b_dec_to_input=bool(cfg.get("apply_b_dec_to_input", True)),
        normalize_activations=normalize,
        input_scale=scale,
        rescale_acts_by_decoder_norm=rescale and cls.architecture == "topk",
        transcoder=kind.is_transcoder,
        metadata=metadata,
        notes=tuple(notes),
        sparsity=sparsity,
        **{name: cfg[name] for name in wanted},
    )
    if sae.cfg.has_skip != kind.has_skip:
        raise MechintError(f"{config}: {architecture} and {WEIGHTS_FILE} disagree about W_skip")
    for name, found in {"d_in": sae.d_in, "d_sae": sae.d_sae, "d_out": sae.d_out}.items():
        if cfg.get(name, found) != found and (name != "d_out" or sae.is_transcoder):
            raise MechintError(f"{config} says {name} {cfg[name]}, but the weights have {found}")
    return sae


def refuse_contradictions(cfg: dict[str, Any], source: Path) -> None:
    """Raise `MechintError` where two keys say different things of what the SAE computes: none of them is believed."""
    architecture = cfg.get("architecture")
    if architecture is not None and not isinstance(architecture, str):
        raise MechintError(f"{source}: architecture should be a name, found {architecture!r}")
    plain = SPELLINGS.get(architecture or "", architecture or "standard")
    # before 6 a topk was a "standard" with an activation function; relu was that of all others
    allowed = {"standard": {"standard", "topk"} if is_pre_6(cfg) else {"standard"}, "topk": {"topk"}}
    said: dict[str, str] = {}
    for name in ("activation_fn_str", "activation_fn"):
        if (value := cfg.get(name)) is None:
            continue
        said[name] = SPELLINGS.get(str(value), str(value))
        if said[name] not in (*PLAIN, *BY_BATCH):
            raise MechintError(
                f"{source}: the activation function {value!r} does not open here; relu, topk, jumprelu do"
            )
        if said[name] not in allowed.get(plain, {plain, "standard"}):
            raise MechintError(
                f"{source}: architecture {architecture!r} and {name} {value!r} contradict each other: remove the one"
                " that is wrong"
            )
    if len(set(said.values())) > 1:
        raise MechintError(
            f"{source}: activation_fn_str {cfg['activation_fn_str']!r} and activation_fn {cfg['activation_fn']!r}"
            " contradict each other: remove the one that is wrong"
        )
    kwargs = cfg.get("activation_fn_kwargs")
    k_of_kwargs = kwargs.get("k") if isinstance(kwargs, dict) else None
    if None not in (cfg.get("k"), k_of_kwargs) and cfg["k"] != k_of_kwargs:
        raise MechintError(
            f"{source}: k {cfg['k']!r} and activation_fn_kwargs {{'k': {k_of_kwargs!r}}} contradict each other:"
            " remove the one that is wrong"
        )
    metadata = cfg.get("metadata")
    for name in ("hook_name", "model_name", "hook_head_index", "prepend_bos"):
        inner = metadata.get(name) if isinstance(metadata, dict) else None
        if None not in (cfg.get(name), inner) and cfg[name] != inner:
            raise MechintError(
                f"{source}: {name} is {cfg[name]!r} at the top and {inner!r} in metadata: remove the one that is wrong"
            )


def read_sparsity(folder: Path, d_sae: Any, notes: list[str]) -> Tensor | None:
    """`sparsity [d_sae]` of the file beside the weights; one that is broken is said in `notes`, for it changes nothing
    that the SAE computes."""
    place = folder / SPARSITY_FILE
    if not place.is_file():
        return None
    try:
        sparsity = read_safetensors(place)[0].get("sparsity")
    except MechintError as error:
        notes.append(f"left aside: {error}")
        return None
    if sparsity is None or not sparsity.is_floating_point() or tuple(sparsity.shape) != (d_sae,):
        notes.append(f"left aside: {place} holds no sparsity [{d_sae}]")
        return None
    return sparsity.float()


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
    if isinstance(new.get("normalize_activations"), bool):
        new["normalize_activations"] = AVERAGE if new["normalize_activations"] else "none"
    hook = new["metadata"].get("hook_name")
    new.setdefault("reshape_activations", "hook_z" if "hook_z" in str(hook) else "none")
    if "processing" not in new["metadata"] and not new["metadata"].get("model_from_pretrained_kwargs"):
        new["notes"] = [f"{CFG_FILE} {ASSUMED}: raw, as SAELens loads models"]
    return new


def own_metadata(metadata: Any, *, ours: bool = False) -> dict[str, Any]:
    """The metadata of a cfg.json without the marks of its writer, which says how activations were processed: SAELens
    loads its models without processing unless `model_from_pretrained_kwargs` asks for it."""
    if not isinstance(metadata, dict):
        raise MechintError(f"metadata of an SAE should be a JSON object, found {type(metadata).__name__}")
    if ours or "mechint_version" in metadata:  # names the processing wherever it is known
        return {name: value for name, value in metadata.items() if name not in OUR_MARKS}
    return {"processing": processing_of(metadata), **metadata}


def processing_of(metadata: dict[str, Any]) -> str:
    """What SAELens's own loading of the model did to the residual stream."""
    kwargs = metadata.get("model_from_pretrained_kwargs")
    return "centred" if isinstance(kwargs, dict) and kwargs.get("center_writing_weights") else "raw"


def _k_of_pre_6(cfg: dict[str, Any], source: Path) -> Any:
    """k of a topk from wherever it is, None if it is nowhere. miStudio's exports have a percentage instead."""
    kwargs, extra = cfg.get("activation_fn_kwargs"), cfg.get("extra_metadata")
    k = cfg.get("k", kwargs.get("k") if isinstance(kwargs, dict) else None)
    percent = extra.get("top_k_sparsity") if isinstance(extra, dict) else None
    if k is None and percent is not None:
        return k_of_percent(percent, whole_number(cfg.get("d_sae"), "d_sae", source), source)
    return k


def input_normalisation(cfg: dict[str, Any], metadata: dict[str, Any], source: Path) -> tuple[str, float]:
    """`(normalize_activations, input_scale)`. Raises `MechintError` where the files do not say what they are."""
    name = str(cfg.get("normalize_activations") or "none")
    if name in NORMALIZE:
        return name, 1.0
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


def with_one_cut(tensors: dict[str, Tensor], architecture: str, rescale: bool, source: Path) -> dict[str, Tensor]:
    """The tensors of a batchtopk checkpoint as it is applied: jumprelu with the learned cut for every latent."""
    tensors = dict(tensors)
    cut = tensors.pop("topk_threshold", None)
    if cut is None or cut.numel() != 1 or "b_enc" not in tensors:
        raise MechintError(f"{source}: {architecture} without its topk_threshold: save the inference model")
    if rescale:  # the cut is in units of activation times norm
        tensors = with_unit_decoder(SAE.from_tensors("standard", tensors, source))
    return {**tensors, "threshold": torch.full_like(tensors["b_enc"], float(cut))}


# --- writing ----------------------------------------------------------------------------------------------------------


def holds(sae: SAE) -> str | None:
    if (departing := sae.departing()).keys() - {"relu"}:
        return ", ".join(f"{name}={value}" for name, value in departing.items())
    if not sae.is_transcoder and sae.architecture not in PLAIN and sae.saved_tensors:
        return None  # an architecture that was added here: SAELens does not know it, and its layout holds it
    if sae.is_transcoder and sae.cfg.architecture not in TRANSCODERS:
        return f"a {sae.cfg.architecture}"
    return beyond(
        sae,
        architectures=PLAIN,
        subtracts_b_dec=None,
        normalize=NORMALIZE,
        rescales=True,
        transcoder=True,
    )


def common_cfg(sae: SAE) -> dict[str, Any]:
    """The keys that 6 and what came before it share."""
    return {
        "architecture": str(sae.cfg.architecture),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
        "normalize_activations": sae.cfg.normalize_activations,
    }


def write(sae: SAE, path: Path) -> None:
    refuse(FORMAT, sae)
    cfg = common_cfg(sae)
    metadata = dict(sae.metadata)
    cfg["reshape_activations"] = reshape_activations(metadata)
    metadata.pop("reshape_activations", None)
    if sae.is_transcoder:
        cfg["d_out"] = sae.d_out
    cfg |= sae.saved_options()
    if sae.architecture == "topk":
        cfg["rescale_acts_by_decoder_norm"] = sae.cfg.rescale_acts_by_decoder_norm
    cfg["metadata"] = {**metadata, **OUR_MARKS}
    write_folder(sae, cfg, path)


def write_folder(sae: SAE, cfg: dict[str, Any], folder: Path) -> None:
    """cfg.json last: a folder without it is not taken for an SAE."""
    make_dir(folder)
    write_safetensors(folder / WEIGHTS_FILE, sae.weights())
    if sae.sparsity is not None:
        write_safetensors(folder / SPARSITY_FILE, {"sparsity": sae.sparsity.detach().float().cpu()})
    write_json(folder / CFG_FILE, cfg)


def save_folder(sae: SAE, path: str | Path, sparsity: Tensor | None = None) -> tuple[Path, Path]:
    """`write` the saved form of an SAE into a folder, in place of an SAE that is there; other files stay.

    Returns the paths of weights and cfg. Raises `MechintError` where SAELens's files cannot hold what it computes.
    """
    folder = Path(path)
    held = held_variant(sae if sae.saved_tensors and sae.unit_decoder else sae.saved_form(), FORMAT)[0]
    make_dir(folder)
    with scratch_folder(folder / WEIGHTS_FILE) as scratch:
        made, known = scratch / "sae", held.sparsity
        held.sparsity = sparsity
        try:
            write(held, made)
        finally:
            held.sparsity = known
        # the cfg goes first and comes last: between, the folder is none of an SAE, and never one of two halves
        for name in (CFG_FILE, SPARSITY_FILE):
            (folder / name).unlink(missing_ok=True)
        for name in sorted((item.name for item in made.iterdir()), key=lambda name: (name == CFG_FILE, name)):
            os.replace(made / name, folder / name)
    return folder / WEIGHTS_FILE, folder / CFG_FILE


FORMAT = Format(
    name="saelens",
    title="SAELens 6",
    marks="cfg.json with a sae_lens_version of 6 or above, and sae_weights.safetensors",
    sniff=sniff,
    read=read,
    write=write,
    holds=holds,
)
