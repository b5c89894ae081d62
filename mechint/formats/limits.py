"""What a format cannot express, as the phrase that its `holds` returns and its `write` refuses with."""

import re
from typing import Any

from mechint.errors import MechintError
from mechint.formats.base import Format, Loaded, Normalize


def beyond(
    loaded: Loaded,
    *,
    architectures: tuple[str, ...],
    subtracts_b_dec: bool | None,
    normalize: tuple[Normalize, ...] = ("none",),
    topk_relu: bool | None = True,
    transcoder: bool = False,
) -> str | None:
    """Why a format with these limits cannot hold exactly this SAE; None if it can.

    `subtracts_b_dec`, `topk_relu`: what the format always does; None where its files can say either.
    """
    if loaded.architecture not in architectures:
        return f"it holds {' and '.join(architectures)} only, not {loaded.architecture}"
    if loaded.transcoder and not transcoder:
        return "it has no transcoders"
    if loaded.normalize not in normalize:
        known = [value for value in normalize if value != "none"]
        what = f"inputs without {' or '.join(known)}" if loaded.normalize == "none" else f"{loaded.normalize} of inputs"
        return f"it has no place for {what}"
    if loaded.scale != 1.0:
        return f"it has no place for a constant input scale ({loaded.scale:g})"
    if loaded.rescale_acts_by_decoder_norm:
        return "its top-k does not weigh latents by their decoder norms"
    if loaded.architecture == "topk" and topk_relu is not None and loaded.topk_relu != topk_relu:
        return (
            "its top-k drops negative entries" if topk_relu else "its top-k keeps negative entries, this one's does not"
        )
    if not loaded.transcoder and subtracts_b_dec is not None and loaded.apply_b_dec_to_input != subtracts_b_dec:
        return (
            "it always subtracts b_dec from the input" if subtracts_b_dec else "it never subtracts b_dec from the input"
        )
    return None


def refuse(form: Format, loaded: Loaded) -> None:
    """Raise `MechintError` if the format cannot hold exactly this SAE."""
    if (reason := form.holds(loaded)) is not None:
        raise MechintError(f"{form.title} cannot hold this SAE: {reason}")


def layer_of(metadata: dict[str, Any]) -> int | None:
    """The layer that `hook_name` in the metadata names, if it does."""
    found = re.search(r"(?:^|\.)blocks\.(\d+)\.", str(metadata.get("hook_name") or ""))
    return int(found[1]) if found else None
