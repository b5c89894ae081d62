"""Named settings of a training, each with its source. A preset fills what neither a flag nor --config sets.

Weights of penalties and learning rates of the papers hold for their models and numbers of steps; where a preset leaves
one open, the default of the field applies and is a starting point, not a recommendation (docs/training.md).
"""

from typing import Any

# The original pipeline's settings, where ours differ. Used by `--preset mech-int`, and for a config.json that was
# written before these keys existed.
ORIGINAL_KEYS = {"activation_dim", "epochs", "l1_lambda", "legacy_layout", "max_chars", "model_source", "num_texts"}

# What a comparison of single changes led to (docs/performance.md); most of it concerns the first steps: a start that
# does not overshoot, Adam's second moments that have forgotten the first gradients after 100 steps. For any number of
# steps. At d_in 128, standard, --lam 0.6 gives an L0 near 32 and --lam 1 one near 16.
_MECHINT: dict[str, Any] = {
    "init": "fitted",
    "b_dec_init": "mean",
    "normalize_inputs": "mean-norm",
    "learning_rate": None,  # by the width, see `learning_rate_for`
    "adam_beta2": 0.99,
    "project_gradient": True,
    "schedule": "constant",
    "decay_share": 0.2,
    "warmup_steps": "5%",
    "revive": "auxk",
    "aux_coefficient": 1.0,
    "dead_after": "2%",
    "max_norm_multiple": 10.0,
}

# What `mechint` changes for an architecture (docs/log.md). At a constant 7e-3 latents of the topk family die late, and
# the more the larger k is beside d_in; a decay that begins earlier keeps them, at the same FVU.
_MECHINT_BY_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "standard": {"saturation": 1.0},
    "topk": {"decay_share": 0.6},
    "batchtopk": {"decay_share": 0.8},
    "matryoshka_batchtopk": {"decay_share": 0.8},
    # Weights that give an L0 near 32 at d_in 128. bandwidth is in units of the normalised pre-activations.
    "jumprelu": {"bandwidth": 0.5, "l1_lambda": 0.12},
    "gated": {"l1_lambda": 0.9},
}


def learning_rate_for(architecture: str, d_sae: int) -> float:
    """The peak learning rate of `mechint`: 7e-3 up to 1,024 latents, then falling with the square root of their number.
    Matryoshka's is 3e-3 at most: its narrow prefixes are small dictionaries with the gradients of all."""
    by_width = 7e-3 * min(1.0, (1024 / d_sae) ** 0.5)
    return float(f"{min(by_width, 3e-3 if architecture == 'matryoshka_batchtopk' else 1.0):.3g}")


TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # The repository that this one grew from: row split and one sequential generator, so its numbers can be reproduced.
    "mech-int": {"split_by": "row", "batch_order": "torch"},
    "mechint": {
        **_MECHINT,
        "l1_reduction": "sum",
        "l1_lambda": 0.6,
        "lambda_warmup_steps": "10%",
    },
    # `mechint` with topk chosen.
    "mechint-topk": {**_MECHINT, "architecture": "topk", "k": 32.0, "decay_share": 0.6},
    # Anthropic, "Circuits Updates - April 2024", section "Update on how we train SAEs": L1 times decoder norm, free
    # decoder rows, W_enc = W_dec^T, lambda 5 warmed up over the first 5 %, learning rate to 0 over the last 20 %.
    "anthropic-2024-04": {
        "architecture": "standard",
        "decoder": "free",
        "init": "tied",
        "init_decoder_norm": 0.1,
        "l1_reduction": "sum",
        "l1_lambda": 5.0,
        "learning_rate": 5e-5,
        "normalize_inputs": "mean-norm",
        "schedule": "constant",
        "decay_share": 0.2,
        "warmup_steps": 0,
        "lambda_warmup_steps": "5%",
        "batch_size": 2048,
    },
    # Anthropic, "Circuits Updates - January 2025", "Dictionary learning optimization techniques": tanh penalty with
    # scale 4, bandwidth 2, threshold from 0.1, pre-activation loss 3e-6 on dead latents, lambda warmed up over the
    # whole training, gradients through the step to all parameters.
    "anthropic-2025-01": {
        "architecture": "jumprelu",
        "penalty": "tanh",
        "tanh_scale": 4.0,
        "bandwidth": 2.0,
        "init_threshold": 0.1,
        "pre_act_coefficient": 3e-6,
        "ste_to_input": True,
        "decoder": "free",
        "init": "tied",
        "l1_lambda": 20.0,
        "learning_rate": 2e-4,
        "normalize_inputs": "mean-norm",
        "schedule": "constant",
        "decay_share": 0.2,
        "warmup_steps": 0,
        "lambda_warmup_steps": "100%",
    },
    # Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix A: TopK with AuxK 1/32 and k_aux about
    # d_in / 2, geometric-median b_dec, W_enc = W_dec^T, parallel gradient removed, constant learning rate.
    "gao-2024": {
        "architecture": "topk",
        "k": 32.0,
        "init": "tied",
        "b_dec_init": "median",
        "project_gradient": True,
        "revive": "auxk",
        "aux_coefficient": 1 / 32,
        "dead_after": 10_000_000,
        "normalize_inputs": "mean-norm",
        "learning_rate": 4e-4,
        "schedule": "constant",
        "decay_share": 0.0,
        "warmup_steps": 0,
    },
    # Bussmann et al. 2024, "BatchTopK Sparse Autoencoders", and the settings of its published code: AuxK 1/32 for
    # latents silent for 20 batches of 4096, 512 of them a vector.
    "batchtopk": {
        "architecture": "batchtopk",
        "k": 32.0,
        "init": "tied",
        "project_gradient": True,
        "revive": "auxk",
        "aux_coefficient": 1 / 32,
        "k_aux": 512,
        "dead_after": 20 * 4096,
        "normalize_inputs": "mean-norm",
        "learning_rate": 3e-4,
        "schedule": "constant",
        "decay_share": 0.0,
        "warmup_steps": 0,
    },
}


def preset_values(name: str, architecture: str | None) -> dict[str, Any]:
    """The settings of a preset for an architecture; None stands for the preset's own, or standard."""
    values = TRAIN_PRESETS[name]
    own = _MECHINT_BY_ARCHITECTURE.get(architecture or "standard", {}) if name == "mechint" else {}
    return values | own


def of_others(name: str, architecture: str | None) -> dict[str, Any]:
    """What a preset sets for other architectures only. Files of earlier versions may hold it for this one too."""
    everything: dict[str, Any] = {}
    for other in _MECHINT_BY_ARCHITECTURE:
        everything |= preset_values(name, other)
    return {key: everything[key] for key in everything.keys() - preset_values(name, architecture).keys()}
