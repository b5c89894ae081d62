"""The same SAE in other tensors: what a setting says moves into the weights, or out of them.

A fold changes the tensors and a setting together so that `feature_acts` and reconstructions stay what they were, up to
one rounding to float32. Each returns the SAE itself where there is nothing to fold.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mechint.errors import MechintError
from mechint.formats.oracle import decoder_norms, times
from mechint.sae.base import SAE


def fold_scale(sae: SAE) -> SAE:
    """`input_scale` 1: `W_enc *= s`, `W_dec /= s`, `b_dec /= s`. No change where the input is normalised anyway."""
    s = sae.cfg.input_scale
    if s == 1.0:
        return sae
    if sae.cfg.normalize_activations != "none":
        raise MechintError("a constant input scale under a normalisation is not folded")
    t = sae.weights()
    b_dec = _rounded(t["b_dec"].double() / s)
    tensors = {**t, "W_enc": _rounded(t["W_enc"].double() * s), "W_dec": _rounded(t["W_dec"].double() / s)}
    return sae.variant({**tensors, "b_dec": b_dec}, input_scale=1.0)


def fold_norms(sae: SAE) -> SAE:
    """Without `rescale_acts_by_decoder_norm`: decoder rows of unit norm, their norms in the encoder."""
    if not sae.cfg.rescale_acts_by_decoder_norm:
        return sae
    return sae.variant(with_unit_decoder(sae), rescale_acts_by_decoder_norm=False)


def with_unit_decoder(sae: SAE) -> dict[str, Tensor]:
    """The weights of an SAE that has `b_enc`, the norms of its decoder rows moved into the encoder."""
    norms, t = decoder_norms(sae), sae.weights()
    folded = {
        "W_enc": _rounded(t["W_enc"].double() * norms),
        "b_enc": _rounded(t["b_enc"].double() * norms),
        "W_dec": _rounded(t["W_dec"].double() / norms[:, None]),
    }
    return {**t, **folded}


def fold_b_dec(sae: SAE, *, apply_b_dec_to_input: bool) -> SAE:
    """With the setting as asked for: `b_dec @ W_enc` moves into the encoder's biases, or out of them."""
    if sae.cfg.apply_b_dec_to_input == apply_b_dec_to_input or sae.is_transcoder:
        return sae
    t = sae.weights()
    moved = times(t["b_dec"].double()[None], t["W_enc"])[0] * (1 if apply_b_dec_to_input else -1)
    if sae.architecture == "gated":
        by_mag = moved * t["r_mag"].double().exp()
        biases = {"b_gate": t["b_gate"].double() + moved, "b_mag": t["b_mag"].double() + by_mag}
    else:
        biases = {"b_enc": t["b_enc"].double() + moved}
    tensors = {**t, **{name: _rounded(bias) for name, bias in biases.items()}}
    return sae.variant(tensors, apply_b_dec_to_input=apply_b_dec_to_input)


def fold_threshold(sae: SAE) -> SAE:
    """Thresholds below 0 as 0: what lies between them and 0 is dropped by the ReLU anyway."""
    if sae.architecture != "jumprelu" or bool((sae.get_parameter("threshold") >= 0).all()):
        return sae
    t = sae.weights()
    return sae.variant({**t, "threshold": t["threshold"].clamp_min(0.0)})


def as_standard(sae: SAE) -> SAE:
    """A jumprelu SAE whose thresholds are all 0 as what it is: ReLU."""
    sae = fold_threshold(sae)
    if sae.architecture != "jumprelu" or bool(sae.get_parameter("threshold").any()):
        return sae
    tensors = {name: tensor for name, tensor in sae.weights().items() if name != "threshold"}
    return sae.variant(tensors, "standard")


def as_jumprelu(sae: SAE) -> SAE:
    """A standard SAE as jumprelu with thresholds 0, for formats that have no other."""
    if sae.architecture != "standard":
        return sae
    return sae.variant({**sae.weights(), "threshold": torch.zeros(sae.d_sae)}, "jumprelu")


def silent_latents(sae: SAE) -> int:
    """How many latents have the pre-activation 0 for every input."""
    t = sae.weights()
    return int((~t["W_enc"].any(dim=0) & (t["b_enc"] == 0)).sum()) if "b_enc" in t else 0


def as_other_topk(sae: SAE) -> SAE:
    """A topk with ReLU as one without it, or back, where that is the same.

    With k latents that are always 0, no negative entry is ever among the k largest.
    """
    if sae.architecture != "topk" or silent_latents(sae) < sae.k:
        return sae
    return sae.variant(relu=not sae.relu)


def pad_topk(sae: SAE) -> SAE:
    """A topk with ReLU and k more latents, of zeros, at the end: formats whose top-k has no ReLU can hold it then.

    Raises:
        MechintError: for an SAE whose function that would change, or that is no topk.
    """
    if sae.architecture != "topk" or not sae.relu:
        kind = "topk without ReLU" if sae.architecture == "topk" else sae.architecture
        raise MechintError(f"--pad-topk is for a topk with ReLU, whose format of destination has none; this is {kind}")
    t = sae.weights()
    tensors = {
        "W_enc": torch.cat([t["W_enc"], torch.zeros(sae.d_in, sae.k)], dim=1),
        "b_enc": torch.cat([t["b_enc"], torch.zeros(sae.k)]),
        "W_dec": torch.cat([t["W_dec"], torch.zeros(sae.k, sae.d_out)]),
    }
    return sae.variant({**t, **tensors}, sparsity=None)


def variants(sae: SAE) -> Iterator[tuple[SAE, tuple[str, ...]]]:
    """`(SAE, names of the folds)`: the same function in other tensors, least changed first."""
    steps: list[tuple[str, Callable[[SAE], SAE]]] = [
        ("input scale", fold_scale if sae.cfg.normalize_activations == "none" else lambda given: given),
        ("decoder norms", fold_norms),
        ("thresholds below 0", fold_threshold),
    ]
    bare: list[tuple[SAE, tuple[str, ...]]] = [(sae, ())]
    for name, fold in steps:
        done = fold(bare[-1][0])
        if done is not bare[-1][0]:
            bare.append((done, (*bare[-1][1], name)))
    for other in (False, True):
        for found, folds in bare:
            if other:
                found = fold_b_dec(found, apply_b_dec_to_input=not found.cfg.apply_b_dec_to_input)
                folds = (*folds, "b_dec")
            yield found, folds
            if (kind := as_standard(found)).architecture != found.architecture:
                yield kind, folds
            if (kind := as_jumprelu(found)) is not found:
                yield kind, folds
            if (kind := as_other_topk(found)) is not found:
                yield kind, folds


def plain_form(sae: SAE) -> SAE:
    """The same function with as little done to the input as can be: `b_dec` subtracted, and nothing else unless inputs
    are normalised one by one. What readers of models work with, and what checkpoint.pt holds."""
    if sae.cfg.normalize_activations == "none":
        sae = fold_scale(sae)
    return fold_b_dec(fold_threshold(fold_norms(sae)), apply_b_dec_to_input=True)


def not_plain(sae: SAE) -> str | None:
    """What of it weights alone cannot say, even in its plain form, in a phrase; None if they can."""
    if sae.is_transcoder:
        return "another output than its input (a transcoder)"
    if sae.cfg.normalize_activations != "none":
        return f"inputs normalised one by one ({sae.cfg.normalize_activations})"
    return None


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.float()
