"""What a format cannot express: the phrase that its `holds` returns, which ends "it cannot hold ..."."""

import re
from typing import Any

from mechint.errors import MechintError
from mechint.formats.base import Format, Loaded, Normalize

NORMALISED: dict[Normalize, str] = {
    "none": "inputs that are not normalised",
    "sqrt_d": "inputs scaled to the norm sqrt(d_in)",
    "layer_norm": "layer-normalised inputs",
}


def beyond(
    loaded: Loaded,
    *,
    architectures: tuple[str, ...],
    subtracts_b_dec: bool | None,
    normalize: tuple[Normalize, ...] = ("none",),
    topk_relu: bool | None = True,
    transcoder: bool = False,
) -> str | None:
    """What of this SAE a format with these limits cannot hold as it is; None if it can.

    `subtracts_b_dec`, `topk_relu`: what the format always does; None where its files can say either.
    """
    if loaded.architecture not in architectures:
        return f"{loaded.architecture} (only {' and '.join(architectures)})"
    if loaded.transcoder and not transcoder:
        return "a transcoder"
    if loaded.normalize not in normalize:
        return NORMALISED[loaded.normalize]
    if loaded.scale != 1.0:
        return f"a constant input scale ({loaded.scale:g})"
    if loaded.rescale_acts_by_decoder_norm:
        return "a top-k that weighs latents by their decoder norms"
    if loaded.architecture == "topk" and topk_relu is not None and loaded.topk_relu != topk_relu:
        if topk_relu:
            return "a top-k that keeps negative entries (it has ReLU after its top-k)"
        return "a top-k that drops negative entries (--pad-topk adds latents of zeros with which it can)"
    if not loaded.transcoder and subtracts_b_dec is not None and loaded.apply_b_dec_to_input != subtracts_b_dec:
        return f"an encoder that {'does not subtract' if subtracts_b_dec else 'subtracts'} b_dec"
    return None


def refuse(form: Format, loaded: Loaded) -> None:
    """Raise `MechintError` if the format cannot hold exactly this SAE."""
    if (reason := form.holds(loaded)) is not None:
        raise MechintError(f"{form.title} cannot hold {reason}")


def layer_of(metadata: dict[str, Any]) -> int | None:
    """The layer that `hook_name` in the metadata names, if it does."""
    found = re.search(r"(?:^|\.)blocks\.(\d+)\.", str(metadata.get("hook_name") or ""))
    return int(found[1]) if found else None
