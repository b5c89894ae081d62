"""How well one order of latents agrees with another, and how sure that is."""

from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

# Pairs under which an interval says nothing.
MIN_PAIRS = 4


def spearman(
    a: Float[ndarray, " n"], b: Float[ndarray, " n"], *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> dict[str, Any]:
    """Spearman's rank correlation of two columns, with a bootstrap interval over their rows.

    Ties get their mean rank. The interval is the percentile one: of `resamples` draws of n rows with replacement, the
    middle `level`. Draws in which a column is constant have no correlation and are left out.

    Returns:
        {"value", "low", "high", "n"}; value, low and high are None where there are fewer than 4 rows or a column is
        constant.
    """
    n = len(a)
    nothing = {"value": None, "low": None, "high": None, "n": n}
    if n < MIN_PAIRS:
        return nothing
    value = _correlation(a[None], b[None])[0]
    if np.isnan(value):
        return nothing
    rows = np.random.default_rng(seed).integers(n, size=(resamples, n))
    drawn = _correlation(a[rows], b[rows])
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return {"value": float(value), "low": float(low), "high": float(high), "n": n}


def _correlation(a: Float[ndarray, "draw n"], b: Float[ndarray, "draw n"]) -> Float[ndarray, " draw"]:
    """Pearson's correlation of the ranks, row by row; nan where a row is constant."""
    from scipy.stats import rankdata

    x, y = (rankdata(part, axis=1) - (part.shape[1] + 1) / 2 for part in (a, b))
    below = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return np.divide((x * y).sum(1), below, out=np.full(len(x), np.nan), where=below > 0)
