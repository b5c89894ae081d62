"""Weights of an SAE on disk: checkpoint.pt (the old four-tensor state dict) and SAELens's folder layout.

`checkpoint.pt` keeps the key `b_pre` for the decoder bias, as the first version of the pipeline wrote it. Nothing here
ever unpickles code: `.pt` files are opened with `weights_only=True`.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechint import __version__
from mechint.errors import MechintError, one_line
from mechint.provenance import atomic_path, make_dir, read_json, write_json
from mechint.sae.architectures.standard import StandardSAE
from mechint.sae.base import ARCHITECTURES, MIN_DECODER_NORM, SAE
from mechint.sae.legacy import SparseAutoEncoder

CFG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
# The layout that cfg.json follows. SAELens keeps a file's metadata only beside a version of its own, from 6 on.
SAELENS_VERSION = "6.54.12"
# What every cfg.json of ours says of itself, in its metadata. Not kept when it is read.
OUR_MARKS = {"sae_lens_version": SAELENS_VERSION, "mechint_version": __version__}
# How the original pipeline collected (compare TransformerLens's old default): residual minus its mean, BOS prepended.
LEGACY_SETTING = {"processing": "centred", "prepend_bos": True, "legacy": True}


def save_checkpoint(sae: SAE, path: str | Path, *, overwrite: bool = True) -> None:
    """Write the float32 tensors as a `weights_only` state dict with the old key `b_pre`, atomically.

    Four tensors for a standard SAE; `threshold`, `k` or the gate's biases too for those that have them.
    """
    tensors = sae.tensors()
    tensors["b_pre"] = tensors.pop("b_dec")
    # Through a file object: torch writes a path's name into the archive, and equal weights should be equal bytes.
    with atomic_path(path, overwrite=overwrite) as temporary, open(temporary, "wb") as file:
        torch.save(tensors, file)


def save_sae_folder(sae: SAE, folder: str | Path) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` as SAELens 6 lays them out.

    Raises:
        MechintError: for an SAE that this layout would turn into another one (topk without ReLU).
    """
    if departing := sae.departing():
        said = ", ".join(f"{name}={value}" for name, value in departing.items())
        raise MechintError(
            f"SAELens's layout has no place for {sae.architecture} with {said}: whoever opens it would compute"
            " something else; a checkpoint.pt (save_checkpoint) holds it"
        )
    folder = Path(folder)
    make_dir(folder)
    tensors = {
        name: tensor for name, tensor in sae.tensors().items() if name not in sae.options
    }  # those are in cfg.json
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary)
    cfg = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": reshape_activations(sae.metadata),
        **sae.extra_cfg(),
        "metadata": {**sae.metadata, **OUR_MARKS},
    }
    write_json(folder / CFG_FILE, cfg)


def reshape_activations(metadata: dict[str, Any]) -> str:
    """`hook_z` for an SAE of all heads of a hook on single heads: SAELens is given those one by one, and lays them side
    by side only where cfg.json says so. Else `none`."""
    heads = str(metadata.get("hook_name")).endswith("hook_z") and metadata.get("hook_head_index") is None
    return "hook_z" if heads else "none"


def metadata_path(checkpoint: Path) -> Path:
    """`X.json` of `X.pt`: what an SAE was trained on, for a checkpoint in the legacy layout."""
    return checkpoint.with_suffix(".json")


def own_metadata(metadata: Any) -> dict[str, Any]:
    """The metadata of a cfg.json without the marks of its writer, which may say how activations were processed."""
    if not isinstance(metadata, dict):
        raise MechintError(f"metadata of an SAE should be a JSON object, found {type(metadata).__name__}")
    if "mechint_version" in metadata:  # ours: names the processing wherever it is known
        return {name: value for name, value in metadata.items() if name not in OUR_MARKS}
    if "sae_lens_version" in metadata:
        return {"processing": "raw", **metadata}  # SAELens loads its models without processing
    return dict(metadata)


def load_sae(path: str | Path, *, config: str | Path | None = None, device: str = "cpu") -> SAE:
    """Open an SAE: a run directory, a checkpoint.pt (old ones included), or a folder in SAELens's layout.

    The shapes come from the weights, so any width of dictionary opens, `d_sae` a multiple of `d_in` or not. What the
    SAE was trained on comes from `sae/cfg.json` (legacy layout: `X.json`) beside a checkpoint. Where nothing says how
    the activations were processed, they are taken as the original pipeline's, with a warning; `config` names the
    config.json that then holds hook and model.

    Raises:
        MechintError: missing, truncated, not an SAE, shapes that do not fit each other, or a value that is not finite.
    """
    path = Path(path)
    metadata: dict[str, Any] | None = None
    if path.is_dir():
        folder = next((place for place in (path, path / "sae") if (place / CFG_FILE).is_file()), None)
        if folder is not None:
            tensors, metadata = _read_folder(folder)
        elif (path / "checkpoint.pt").is_file():
            path = path / "checkpoint.pt"
            tensors, metadata = read_state_dict(path), _metadata_beside(path)
        else:
            raise MechintError(
                f"{path} holds neither checkpoint.pt nor {CFG_FILE}: not a run directory or an SAE folder;"
                f" {_if_of_another_tool(path)}"
            )
    else:
        if path.is_file() and _of_another_kind(path):
            raise MechintError(f"{path} is no checkpoint.pt of this package; {_if_of_another_tool(path)}")
        tensors, metadata = read_state_dict(path), _metadata_beside(path)
    sae = sae_from_tensors(tensors, source=str(path))
    metadata = metadata or {}
    sae.metadata = metadata if "processing" in metadata else {**_legacy_metadata(path, config), **metadata}
    return sae.to(device)


def _metadata_beside(checkpoint: Path) -> dict[str, Any] | None:
    """What the files beside a checkpoint say of its training; None if there are none."""
    if (cfg := checkpoint.parent / "sae" / CFG_FILE).is_file():
        return own_metadata(read_json(cfg).get("metadata") or {})
    if (beside := metadata_path(checkpoint)).is_file():
        return own_metadata(read_json(beside).get("sae_metadata") or {})
    return None


def load_sae_checkpoint(
    checkpoint_path: str | Path, activation_dim: int, expansion: int | None = None, device: str | torch.device = "cpu"
) -> SAE:
    """`load_sae` as the original had it: a plain checkpoint opens as the class whose call is `(x_hat, feature_acts)`.

    Raises:
        MechintError: as `load_sae`, and for weights of another width, or of another number of latents than
            `expansion * activation_dim` where an expansion is given.
    """
    sae = load_sae(checkpoint_path, device=str(device))
    if sae.d_in != activation_dim:
        raise MechintError(f"{checkpoint_path} has d_in {sae.d_in}, but activation_dim {activation_dim} was asked for")
    if expansion is not None and sae.d_sae != expansion * sae.d_in:
        raise MechintError(
            f"{checkpoint_path} has {sae.d_sae} latents for d_in {sae.d_in}, but expansion {expansion} was asked for"
        )
    return SparseAutoEncoder.of(sae) if type(sae) is StandardSAE else sae


def read_state_dict(path: str | Path) -> dict[str, Any]:
    """The tensors of a `.pt` state dict, without running any code that the file may carry."""
    path = Path(path)
    if not path.is_file():
        raise MechintError(f"checkpoint not found: {path}; `ls runs/*/checkpoint.pt` shows those of your runs")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch explains strange pickles at length; the error says enough
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MechintError(
            f"{path} is not a plain tensor file and was not executed; expected a state dict saved with torch.save"
            f" ({one_line(error, 90)})"
        ) from error
    except Exception as error:  # a broken pickle can fail in any way: IndexError, AttributeError, UnicodeError ...
        raise MechintError(f"{path} is truncated or not a checkpoint: {one_line(error, 120)}") from error
    if not isinstance(loaded, dict):
        raise MechintError(f"{path} holds a {type(loaded).__name__}, not the state dict of an SAE")
    return loaded


def sae_from_tensors(tensors: dict[str, Any], *, source: str) -> SAE:
    """Build the module whose tensors these are (`b_pre` is the old name of `b_dec`); `source` names them in errors."""
    tensors = dict(tensors)
    if "b_pre" in tensors and "b_dec" not in tensors:
        tensors["b_dec"] = tensors.pop("b_pre")
    cls = next((kind for kind in ARCHITECTURES.values() if _has_the_tensors_of(kind, tensors)), None)
    if cls is None or not all(isinstance(value, Tensor) for value in tensors.values()):
        found = ", ".join(sorted(map(str, tensors))[:8]) or "nothing"
        raise MechintError(
            f"{source} is not an SAE: expected W_enc, b_enc, W_dec and b_pre (or b_dec), found {found};"
            f" {_if_of_another_tool(source)}"
        )
    W_dec = tensors["W_dec"]
    if W_dec.ndim != 2:
        raise MechintError(f"{source}: W_dec should be [d_sae, d_in], found shape {list(W_dec.shape)}")
    d_sae, d_in = W_dec.shape
    options = {
        name: _number(tensors.pop(name), name, source)
        for name in list(tensors)
        if name in cls.options or name in cls.departures
    }
    for name, tensor in tensors.items():
        expected = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}.get(name, (d_sae,))
        if tuple(tensor.shape) != expected:
            raise MechintError(
                f"{source}: {name} has shape {list(tensor.shape)}, expected {list(expected)} beside W_dec"
                f" {[d_sae, d_in]}"
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise MechintError(f"{source}: {name} holds values that are not finite floating-point numbers")
    # Shapes only: the drawn initial values are replaced at once.
    with torch.device("meta"):
        sae = cls.make(d_in, d_sae, **options)
    tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    # laid out as a new SAE's: products round by layout, and an SAE should compute the same bits before and after saving
    tensors["W_enc"] = tensors["W_enc"].t().contiguous().t()
    sae.load_state_dict(tensors, assign=True)
    return sae.requires_grad_(True)


def _of_another_kind(file: Path) -> bool:
    """Whether a file was never one of torch.save, by its suffix and its first bytes; a .pt may only be broken."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(2)
    except OSError:
        return False  # reading it says why
    by_torch = start == b"PK" or start[:1] == b"\x80"  # a zip; a pickle, as torch saved before 1.6
    return file.suffix in (".npz", ".safetensors") or start[:1] == b"{" or (file.suffix != ".pt" and not by_torch)


def _if_of_another_tool(path: str | Path) -> str:
    """The command that makes an SAE of another tool one that opens here."""
    return f"if it is another tool's, `mechint convert {path} NEW` writes it to NEW, which opens here"


def _has_the_tensors_of(kind: type[SAE], tensors: dict[str, Any]) -> bool:
    """Whether this is what the file of such an SAE holds; beside it may stand what it departs in."""
    return bool(kind.saved_tensors) and set(kind.saved_tensors) == set(tensors) - set(kind.departures)


def _number(value: Tensor, name: str, source: str) -> Any:
    if value.numel() != 1:
        raise MechintError(f"{source}: {name} should be one number, found shape {list(value.shape)}")
    return value.item()


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    cfg = read_json(folder / CFG_FILE, "SAE configuration")
    architecture = cfg.get("architecture", "standard")
    cls = ARCHITECTURES.get(architecture)
    plain = cls is not None and cls.saved_tensors and cfg.get("apply_b_dec_to_input", True)
    if cls is None or not plain or cfg.get("normalize_activations", "none") not in ("none", False):
        known = ", ".join(sorted(name for name, kind in ARCHITECTURES.items() if kind.saved_tensors))
        raise MechintError(
            f"{folder}: only {known} with apply_b_dec_to_input and without input normalisation open"
            f" here; this one is {architecture!r}, apply_b_dec_to_input {cfg.get('apply_b_dec_to_input', True)},"
            f" normalize_activations {cfg.get('normalize_activations', 'none')!r};"
            f" `mechint convert {folder} NEW` writes it anew if weights can say that"
        )
    activation = cfg.get("activation_fn_str") or cfg.get("activation_fn")  # SAELens's keys before 6
    if activation not in (None, "relu", architecture):
        raise MechintError(
            f"{folder}: {architecture} with the activation function {activation!r} does not open here;"
            f" `mechint convert {folder} NEW` writes it anew if it can"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        raise MechintError(f"{folder} has {CFG_FILE} but no {WEIGHTS_FILE}; {_if_of_another_tool(folder)}")
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise MechintError(f"{folder / WEIGHTS_FILE} cannot be read: {one_line(error, 120)}") from error
    for name in set(cls.saved_tensors) & set(cls.options):
        if not isinstance(cfg.get(name), (int, float)):
            raise MechintError(f"{folder / CFG_FILE}: {architecture} needs a number {name}, found {cfg.get(name)!r}")
        tensors[name] = torch.tensor(cfg[name])
    if cfg.get("rescale_acts_by_decoder_norm", False) and tensors.keys() >= {"W_enc", "b_enc", "W_dec"}:
        # selected by activation times norm: the same SAE with unit rows and the norms in the encoder
        norms = tensors["W_dec"].norm(dim=1).clamp_min(MIN_DECODER_NORM)
        tensors["W_enc"] = tensors["W_enc"] * norms
        tensors["b_enc"] = tensors["b_enc"] * norms
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    return tensors, own_metadata(cfg.get("metadata") or {})


def _legacy_metadata(path: Path, config: str | Path | None) -> dict[str, Any]:
    """What an original checkpoint was trained on: its config.json if there is one, and the original's processing."""
    folder = path if path.is_dir() else path.parent
    config_path = Path(config) if config is not None else folder / "config.json"
    recorded: dict[str, Any] = {}
    if config is not None or config_path.is_file():
        values = read_json(config_path, "config file")
        recorded = {key: values[key] for key in ("hook_name", "model_name", "model_source") if key in values}
    warnings.warn(
        f"{path}: nothing says how its activations were processed; taken as the original pipeline's setting"
        " (centred residual, BOS prepended)",
        stacklevel=3,
    )
    return {**recorded, **LEGACY_SETTING}
