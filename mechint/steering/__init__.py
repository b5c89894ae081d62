"""Steering: directions from prompts, probes and latents; adding, ablating and clamping them while a text is made."""

from mechint.steering.command import Extracted, Steering, edits_of, extract, run_activation_norm, steer_texts
from mechint.steering.direction import (
    Direction,
    check_direction,
    load_direction,
    make_direction,
    save_direction,
    sidecar_path,
)
from mechint.steering.edits import (
    ablate_direction,
    ablate_latent,
    add_direction,
    clamp_direction,
    clamp_latent,
)
from mechint.steering.extract import (
    direction_from_latent,
    direction_from_prompts,
    extraction_quality,
    heldout_accuracy,
    mean_difference,
    probe_weights,
    prompt_activations,
    score_direction,
)
from mechint.steering.show import beside
from mechint.steering.steer import Steered, next_log_probs, steer

__all__ = [
    "Direction",
    "Extracted",
    "Steered",
    "Steering",
    "ablate_direction",
    "ablate_latent",
    "add_direction",
    "beside",
    "check_direction",
    "clamp_direction",
    "clamp_latent",
    "direction_from_latent",
    "direction_from_prompts",
    "edits_of",
    "extract",
    "extraction_quality",
    "heldout_accuracy",
    "load_direction",
    "make_direction",
    "mean_difference",
    "next_log_probs",
    "probe_weights",
    "prompt_activations",
    "run_activation_norm",
    "save_direction",
    "score_direction",
    "sidecar_path",
    "steer",
    "steer_texts",
]
