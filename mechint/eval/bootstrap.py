"""Intervals by the bootstrap over texts: metrics of resamples of texts, drawn with replacement.

Tokens of one text depend on each other, so texts are what is drawn (a cluster bootstrap; Efron and Tibshirani 1993,
percentile intervals, section 13.3). Every metric is a function of sums over rows, so a resample costs a weighted sum of
the texts' sums, and a ratio is resampled as the ratio of its sums.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.eval.sums import COLUMNS, reconstruction_metrics

# Texts beyond this number share groups, which are then resampled whole: it bounds the memory and changes no coverage.
MAX_GROUPS = 2048
# Memory of a block of weights in float64: 1000 resamples of 2048 groups.
BLOCK = 2**21
LEVEL = 0.95
# An interval is given if at least this share of the resamples defines the metric.
MIN_DEFINED = 0.95


def group_of_texts(text_ids: Int[Tensor, " n"]) -> tuple[Int[Tensor, " n"], int]:
    """The group of each text (texts in the order of their ids, dealt out in turn), and the number of groups."""
    unique, inverse = torch.unique(text_ids, return_inverse=True)
    n_groups = min(len(unique), MAX_GROUPS)
    return inverse % max(n_groups, 1), n_groups


def resample(
    n: int, statistic: Callable[[np.ndarray], Mapping[str, np.ndarray]], *, n_resamples: int = 1000, seed: int = 0
) -> dict[str, list[float]]:
    """95 % percentile intervals of what `statistic` computes from weights [resample, n] of n groups.

    A weight is how often a group was drawn; those of a resample sum to n. Empty for n < 2: one text has no spread.
    """
    if n < 2 or n_resamples < 1:
        return {}
    generator = np.random.default_rng(seed)
    at_once = max(1, BLOCK // n)
    drawn: dict[str, list[np.ndarray]] = {}
    for start in range(0, n_resamples, at_once):
        size = min(at_once, n_resamples - start)
        weights = generator.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        for name, values in statistic(weights).items():
            drawn.setdefault(name, []).append(np.broadcast_to(values, size))
    tail = 100 * (1 - LEVEL) / 2
    found = {}
    for name, parts in drawn.items():
        values = np.concatenate(parts)
        defined = values[np.isfinite(values)]
        if len(defined) >= MIN_DEFINED * len(values):
            low, high = np.percentile(defined, [tail, 100 - tail])
            found[name] = [float(low), float(high)]
    return found


def reconstruction_intervals(
    table: Float[Tensor, "group column"],
    deviation: Float[Tensor, "group d_in"],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Intervals of the reconstruction metrics from the sums of `ReconstructionSums`, a row of them a text."""
    sums, moved = table.numpy(), deviation.numpy()

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        totals = weights @ sums
        square = np.square(weights @ moved).sum(axis=1)
        columns = {name: totals[:, index] for index, name in enumerate(COLUMNS)}
        return reconstruction_metrics(columns, square, moved.shape[1])

    return resample(len(sums), statistic, n_resamples=n_resamples, seed=seed)
