"""`apply_steering`: a prompt's continuation with and without a published steering vector."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mechint.config.registry import ApplySteeringConfig
from mechint.errors import MechintError
from mechint.hub.steering_loading import open_steering_vector
from mechint.models import load_model
from mechint.steering import Steered, check_direction, edits_of, prompt_activations, steer


@dataclass(frozen=True)
class Applied:
    """What `apply_steering` found.

    Attributes:
        results: a list for each prompt, its baseline first.
        scale: activation units of one coefficient.
    """

    results: list[list[Steered]]
    metadata: dict[str, Any]
    scale: float


def apply_steering(config: ApplySteeringConfig, *, on_note: Callable[[str], None] = lambda note: None) -> Applied:
    """Add `coefficient * scale` times the unit direction at the vector's hook, taking the likeliest token each time.

    Raises:
        MechintError: what `load_steering_vector` and `load_model` raise, a vector that does not fit the model, a prompt
            that is too long, or a unit that nothing tells.
    """
    opened = open_steering_vector(
        config.vector, base_dir=config.base_dir, revision=config.revision, registry=config.registry
    )
    direction, metadata = opened.direction, opened.metadata
    name, hook_name = config.model or metadata["model_name"], metadata["hook_site"]
    for what, value in (("model", name), ("hook", hook_name)):
        if not value or not isinstance(value, str):
            raise MechintError(
                f"nothing says which {what} steering vector {metadata['name']} belongs to: its sidecar or a registry"
                " entry should"
            )
    processing = direction.info.get("processing", "raw")
    prepend_bos = bool(direction.info.get("prepend_bos", True))
    scale = 1.0
    if config.unit == "vector":
        norm = metadata["direction_norm"]
        if not isinstance(norm, (int, float)) or not norm > 0 or not math.isfinite(norm):
            raise MechintError(
                f"nothing says which norm steering vector {metadata['name']} had before it was divided by it: give"
                " --unit norm or --unit raw"
            )
        scale = float(norm)
    model = load_model(name, device=config.device, processing=processing, hook_name=hook_name)
    check_direction(direction, model, hook_name)
    if config.unit == "norm":
        norm = direction.info.get("mean_activation_norm")
        if not isinstance(norm, (int, float)) or not norm > 0:
            norm = prompt_activations(model, list(config.prompt), hook_name, prepend_bos=prepend_bos).mean_norm
            on_note(f"nothing says how large activations are: coefficients count in the prompts' mean norm, {norm:.4g}")
        scale = float(norm)
    results = steer(
        model,
        list(config.prompt),
        hook_name,
        edits_of(direction, "add", config.coefficient, scale),
        positions=config.positions,
        prepend_bos=prepend_bos,
        max_new_tokens=config.max_new_tokens,
    )
    return Applied(results, metadata, scale)
