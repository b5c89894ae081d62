"""Learning rate and sparsity weight as functions of the step."""

import math

from mechint.config import SAETrainConfig


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, steps: int, schedule: str = "cosine", decay_share: float = 0.2
) -> float:
    """Linear from 0 over `warmup_steps`, then by `schedule`: "cosine" to 0 at `steps`, as the original pipeline has it,
    or "constant" until the last `decay_share` of the steps, over which it falls linearly to 0.

    With a warm-up, step 0 moves nothing.
    """
    if step < warmup_steps:
        return peak * step / max(warmup_steps, 1)
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * min(1.0, (steps - step) / max(decay_share * steps, 1.0))


def l1_weight(step: int, *, l1_lambda: float, lambda_warmup_steps: int) -> float:
    """`l1_lambda * min(1, step / lambda_warmup_steps)`; constant when there is no warm-up."""
    if lambda_warmup_steps <= 0:
        return l1_lambda
    return l1_lambda * min(1.0, step / lambda_warmup_steps)


def learning_rate_at(config: SAETrainConfig, step: int) -> float:
    """The learning rate of a step of this training."""
    return learning_rate(
        step,
        peak=config.peak_learning_rate,
        warmup_steps=config.steps_of(config.warmup_steps),
        steps=config.steps,
        schedule=config.schedule,
        decay_share=config.decay_share,
    )


def sparsity_at(config: SAETrainConfig, step: int) -> float:
    """The penalty's weight at a step, as --lam counts it (`penalty_weight` turns it into that of the loss)."""
    return l1_weight(step, l1_lambda=config.l1_lambda, lambda_warmup_steps=config.steps_of(config.lambda_warmup_steps))


def penalty_weight(config: SAETrainConfig, lam: float, *, has_l1: bool) -> float:
    """Weight beside the mean over d_in of squared errors. An L1 given per sum, lam * sum|f| beside |x_hat - x|^2, is
    lam * d_sae / d_in times the mean of |f| after division by d_in."""
    return lam * config.num_features / config.activation_dim if has_l1 and config.l1_reduction == "sum" else lam
