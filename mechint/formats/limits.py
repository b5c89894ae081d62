"""What a format cannot express: the phrase that its `holds` returns, which ends "it cannot hold ..."."""

import re
from typing import Any

from mechint.errors import MechintError
from mechint.formats.base import Format
from mechint.formats.folds import pad_topk, variants
from mechint.sae.base import SAE

NORMALISED = {
    "none": "inputs that are not normalised",
    "constant_norm_rescale": "inputs scaled to the norm sqrt(d_in)",
    "layer_norm": "layer-normalised inputs",
}


def beyond(
    sae: SAE,
    *,
    architectures: tuple[str, ...],
    subtracts_b_dec: bool | None,
    normalize: tuple[str, ...] = ("none",),
    relu: bool | None = True,
    rescales: bool = False,
    transcoder: bool = False,
) -> str | None:
    """What of this SAE a format with these limits cannot hold as it is; None if it can.

    `subtracts_b_dec`, `relu`: what the format always does; None where its files can say either.
    """
    if sae.architecture not in architectures:
        return f"{sae.architecture} (only {' and '.join(architectures)})"
    if sae.is_transcoder and not transcoder:
        return "a transcoder"
    if sae.cfg.normalize_activations not in normalize:
        return NORMALISED[sae.cfg.normalize_activations]
    if sae.cfg.input_scale != 1.0:
        return f"a constant input scale ({sae.cfg.input_scale:g})"
    if sae.cfg.rescale_acts_by_decoder_norm and not rescales:
        return "a top-k that weighs latents by their decoder norms"
    if sae.architecture == "topk" and relu is not None and sae.relu != relu:
        if relu:
            return "a top-k that keeps negative entries (it has ReLU after its top-k)"
        return "a top-k that drops negative entries (--pad-topk adds latents of zeros with which it can)"
    if not sae.is_transcoder and subtracts_b_dec is not None and sae.cfg.apply_b_dec_to_input != subtracts_b_dec:
        return f"an encoder that {'does not subtract' if subtracts_b_dec else 'subtracts'} b_dec"
    return None


def refuse(form: Format, sae: SAE) -> None:
    """Raise `MechintError` if the format cannot hold exactly this SAE."""
    if (reason := form.holds(sae)) is not None:
        raise MechintError(f"{form.title} cannot hold {reason}")


def held_variant(sae: SAE, target: Format, *, pad: bool = False) -> tuple[SAE, tuple[str, ...]]:
    """`(SAE, what was folded)`: the least changed tensors of the same function that the format can hold.

    `pad`: a topk that it cannot hold may get latents of zeros.

    Raises:
        MechintError: there are none; the reason is the format's about the most folded one.
    """
    reasons = []
    for variant, folded in variants(sae):
        reason = target.holds(variant)
        if reason is None:
            return variant, folded
        reasons.append(reason)
    if pad and sae.architecture == "topk" and sae.relu:
        return held_variant(pad_topk(sae), target)
    # what remains in every variant is what cannot be folded; without such a one, what the first lacks
    common = next((reason for reason in reasons if reasons.count(reason) == len(reasons)), reasons[0])
    raise MechintError(f"{target.title} cannot hold {common}; what the SAE computes would change, so it is not written")


def layer_of(metadata: dict[str, Any]) -> int | None:
    """The layer that `hook_name` in the metadata names, if it does."""
    found = re.search(r"(?:^|\.)blocks\.(\d+)\.", str(metadata.get("hook_name") or ""))
    return int(found[1]) if found else None
