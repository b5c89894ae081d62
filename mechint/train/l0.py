"""Reaching an L0 that was asked for: the weight of the penalty is steered while the SAE trains.

A heavier penalty lowers L0, some steps later. With m the logarithm of the L0 of the last batches over the target,

    d log(weight) / d step = (lr / peak lr) / T * clip(m + D * dm/dstep, -1, 1)

so that an L0 which is on its way is left alone (the second term looks D steps ahead), a start far off does not run away
(the clip), and nothing moves where the learning rate no longer lets L0 follow. T and D are shares of the training.
"""

import math
from dataclasses import dataclass

from mechint.config import SAETrainConfig

# In shares of all steps: T, and D. In steps: over which L0 and its slope are smoothed at least.
TIME, AHEAD, SMOOTHED = 0.06, 0.165, 10


@dataclass
class Steering:
    """Where the steering is; part of the saved state."""

    log_weight: float = 0.0  # of the factor on the weight that the config says
    distance: float | None = None  # log(L0 / target), smoothed; None before the first batch
    slope: float = 0.0  # of `distance`, a step

    def look(self, config: SAETrainConfig, l0: float, *, step: int, lr: float) -> None:
        """Take the L0 of a step's batch into account. Nothing happens while the weight warms up."""
        assert config.target_l0 is not None
        found = math.log(max(l0, 0.01 * config.target_l0) / config.target_l0)
        if self.distance is None:
            self.distance = found
        share = 1.0 / max(SMOOTHED, 0.005 * config.steps)
        before = self.distance
        self.distance += share * (found - before)
        self.slope += share * (self.distance - before - self.slope)
        if step < min(config.steps_of(config.lambda_warmup_steps), config.steps // 10):
            return
        drive = self.distance + AHEAD * config.steps * self.slope
        self.log_weight += lr / config.peak_learning_rate / (TIME * config.steps) * max(-1.0, min(1.0, drive))
