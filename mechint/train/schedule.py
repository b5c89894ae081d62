"""Learning rate and L1 weight as functions of the step, exactly as the original pipeline has them."""

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int) -> float:
    """Linear from 0 over `warmup_steps`, then a cosine to 0 at `steps`. With a warm-up, step 0 moves nothing."""
    if step < warmup_steps:
        return peak * step / max(warmup_steps, 1)
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def l1_weight(step: int, *, l1_lambda: float, lambda_warmup_steps: int) -> float:
    """`l1_lambda * min(1, step / lambda_warmup_steps)`; constant when there is no warm-up."""
    if lambda_warmup_steps <= 0:
        return l1_lambda
    return l1_lambda * min(1.0, step / lambda_warmup_steps)
