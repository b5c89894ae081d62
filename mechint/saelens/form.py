"""Between `SAEConfig`, which code sees, and `mechint.formats.base.Loaded`, which files hold; names; first weights."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mechint.errors import MechintError, nearest
from mechint.formats import Loaded, from_sae
from mechint.provenance import detect_device
from mechint.sae import build_sae
from mechint.sae.base import ARCHITECTURES
from mechint.sae.io import reshape_activations
from mechint.saelens.sae_config import SAEConfig, SAEMetadata

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Normalisations of an input: our name of what SAELens calls it, both ways.
NORMALIZATIONS = {"none": "none", "sqrt_d": "constant_norm_rescale", "layer_norm": "layer_norm"}
# What stands before "transcoder" and "skip_transcoder"; SAELens has no top-k ones, EleutherAI's sparsify has.
ACTIVATIONS = {"": "standard", "jumprelu_": "jumprelu", "topk_": "topk"}
TRANSCODERS = tuple(before + kind for before in ACTIVATIONS for kind in ("transcoder", "skip_transcoder"))


def architecture_of(loaded: Loaded) -> str:
    """SAELens's name of an SAE's or a transcoder's architecture."""
    if not loaded.transcoder:
        return loaded.architecture
    before = "" if loaded.architecture == "standard" else f"{loaded.architecture}_"
    return before + ("skip_transcoder" if "W_skip" in loaded.tensors else "transcoder")


def config_of(loaded: Loaded) -> SAEConfig:
    """`sae.cfg` of what a file said."""
    return SAEConfig(
        d_in=loaded.d_in,
        d_sae=loaded.d_sae,
        d_out=loaded.d_out if loaded.transcoder else None,
        architecture=architecture_of(loaded),
        apply_b_dec_to_input=loaded.apply_b_dec_to_input,
        normalize_activations=NORMALIZATIONS[loaded.normalize],
        reshape_activations=loaded.metadata.get("reshape_activations", reshape_activations(loaded.metadata)),
        k=loaded.options.get("k"),
        rescale_acts_by_decoder_norm=loaded.rescale_acts_by_decoder_norm,
        metadata=SAEMetadata(loaded.metadata),
    )


def drawn(cfg: SAEConfig) -> Loaded:
    """Initial weights from torch's global generator. Raises `MechintError` for a cfg that defines no SAE."""
    names = (*ARCHITECTURES, *TRANSCODERS)
    if cfg.architecture not in names:
        raise MechintError(f"unknown architecture {str(cfg.architecture)!r}; {nearest(cfg.architecture, names)}")
    by_name: dict[str, Any] = {theirs: ours for ours, theirs in NORMALIZATIONS.items()}
    normalize = by_name.get(cfg.normalize_activations)
    if normalize is None:
        raise MechintError(
            f"normalize_activations {cfg.normalize_activations!r} is not known; {', '.join(NORMALIZATIONS.values())}"
        )
    if cfg.is_transcoder:
        return _drawn_transcoder(cfg)
    options = {"k": cfg.k} if cfg.architecture == "topk" and cfg.k is not None else {}
    return replace(
        from_sae(build_sae(str(cfg.architecture), cfg.d_in, cfg.d_sae, options=options)),
        apply_b_dec_to_input=cfg.apply_b_dec_to_input,
        normalize=normalize,
        rescale_acts_by_decoder_norm=cfg.architecture == "topk" and cfg.rescale_acts_by_decoder_norm,
        metadata=dict(cfg.metadata),
    )


def _drawn_transcoder(cfg: SAEConfig) -> Loaded:
    """As SAELens draws them: uniform weights by He et al. 2015, biases, thresholds and the skip connection 0."""
    if cfg.normalize_activations != "none":
        raise MechintError(f"a transcoder with normalize_activations {cfg.normalize_activations!r} is not defined here")
    if not cfg.d_out:
        raise MechintError("a transcoder needs d_out, the width of what it writes")
    skips = cfg.architecture.endswith("skip_transcoder")
    plain = ACTIVATIONS[cfg.architecture.removesuffix("skip_transcoder" if skips else "transcoder")]
    tensors: dict[str, Tensor] = {
        "W_enc": torch.nn.init.kaiming_uniform_(torch.empty(cfg.d_in, cfg.d_sae)),
        "W_dec": torch.nn.init.kaiming_uniform_(torch.empty(cfg.d_sae, cfg.d_out)),
        "b_enc": torch.zeros(cfg.d_sae),
        "b_dec": torch.zeros(cfg.d_out),
    }
    if plain == "jumprelu":
        tensors["threshold"] = torch.zeros(cfg.d_sae)
    if skips:
        tensors["W_skip"] = torch.zeros(cfg.d_out, cfg.d_in)
    return Loaded(
        plain,
        tensors,
        {"k": cfg.k or 100} if plain == "topk" else {},
        apply_b_dec_to_input=False,
        transcoder=True,
        rescale_acts_by_decoder_norm=plain == "topk" and cfg.rescale_acts_by_decoder_norm,
        metadata=dict(cfg.metadata),
    )


def usable(device: str | torch.device | None) -> str:
    """The device, cpu for None. Raises `MechintError` if this machine has none such."""
    try:
        return detect_device(str(device or "cpu"))
    except MechintError as error:
        raise MechintError(str(error).replace("--device cpu", 'device="cpu"')) from None


def dtype_of(name: str | torch.dtype | None) -> torch.dtype:
    """A torch dtype from its name, with or without "torch.". float32 for None."""
    if isinstance(name, torch.dtype):
        return name
    plain = (name or "float32").removeprefix("torch.")
    if plain not in DTYPES:
        raise MechintError(f"dtype {name!r} is not known; {nearest(plain, DTYPES)}")
    return DTYPES[plain]
