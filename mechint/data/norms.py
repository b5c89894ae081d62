"""Norms of activation vectors as a histogram that can be added up, and what in them is an outlier.

In many models the first position of a text holds a vector tens of times longer than the others (an "attention sink"),
and a few such rows dominate a mean squared error. So position 0 is counted apart.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Bins of log2(norm), each 2**(1/64) wide: a median read from the middle of a bin is within 0.6 % of the true one.
BINS_PER_OCTAVE = 64
_LOWEST, _HIGHEST = -40 * BINS_PER_OCTAVE, 60 * BINS_PER_OCTAVE
# dictionary_learning's `max_activation_norm_multiple` suggests the same multiple.
OUTLIER_MULTIPLE = 10.0
LARGEST_NORM = torch.finfo(torch.float32).max

Histogram = dict[str, int]
"""Number of rows by bin; the keys are bin numbers as JSON has them."""


def norm_histograms(norms: Float[Tensor, " n"], at_start: Bool[Tensor, " n"]) -> dict[str, Any]:
    """Counts and maxima of finite norms, for rows at position 0 and for the rest."""
    return {name: _histogram(norms[mask]) for name, mask in (("position_0", at_start), ("rest", ~at_start))}


def _histogram(norms: Float[Tensor, " n"]) -> dict[str, Any]:
    if not norms.numel():
        return {"bins": {}, "max": 0.0}
    norms = norms.clamp_max(LARGEST_NORM)  # of a finite row, the sum of squares can overflow
    bins = (norms.double().clamp_min(1e-300).log2() * BINS_PER_OCTAVE).floor().clamp(_LOWEST, _HIGHEST).long()
    numbers, counts = bins.unique(return_counts=True)
    return {
        "bins": {str(number): count for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)},
        "max": float(norms.max()),
    }


def add_histograms(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of what `norm_histograms` gave for parts of the data."""
    total: dict[str, Any] = {name: {"bins": {}, "max": 0.0} for name in ("position_0", "rest")}
    for part in parts:
        for name, into in total.items():
            for key, count in part[name]["bins"].items():
                into["bins"][key] = into["bins"].get(key, 0) + count
            into["max"] = max(into["max"], part[name]["max"])
    return total


def summarise_norms(total: dict[str, Any], position_0_kept: bool) -> dict[str, Any]:
    """The `norms` field of a store.

    Counts of rows in the store, and medians and maxima of Euclidean norms:
    `median` and `max` over positions after the first, `position_0` {n, median, max, kept}, and the rows above
    `outlier_multiple` times the median: `n_outliers`, of which `n_outliers_position_0`. A position 0 that was not kept
    counts in neither. Whether a row is above the limit is decided by its bin, that is to 1.1 % of the norm.
    """
    rest, start = total["rest"], total["position_0"]
    median = _median(rest["bins"]) if rest["bins"] else _median(start["bins"])
    limit = OUTLIER_MULTIPLE * median
    in_rest = _above(rest["bins"], limit)
    at_start = _above(start["bins"], limit) if position_0_kept else 0
    return {
        "median": median,
        "max": rest["max"],
        "outlier_multiple": OUTLIER_MULTIPLE,
        "n_outliers": in_rest + at_start,
        "n_outliers_position_0": at_start,
        "position_0": {
            "kept": position_0_kept,
            "n": sum(start["bins"].values()),
            "median": _median(start["bins"]),
            "max": start["max"],
        },
    }


def _middle(number: int) -> float:
    return 2.0 ** ((number + 0.5) / BINS_PER_OCTAVE)


def _median(bins: Histogram) -> float:
    """Norm in the middle of the bin that holds the lower median; 0 if there is no row."""
    half = (sum(bins.values()) + 1) // 2
    for number in sorted(map(int, bins)):
        half -= bins[str(number)]
        if half <= 0:
            return _middle(number)
    return 0.0


def _above(bins: Histogram, limit: float) -> int:
    return sum(count for number, count in bins.items() if _middle(int(number)) > limit)


def report_norms(norms: dict[str, Any], n_rows: int) -> str:
    """One or two lines for a person."""
    start = norms["position_0"]
    line = f"norms: median {norms['median']:.3g}, max {norms['max']:.3g}"
    if start["n"]:
        kept = "kept" if start["kept"] else "left out"
        line += f"; position 0 ({kept}): median {start['median']:.3g}, max {start['max']:.3g}"
    if not norms["n_outliers"]:
        return f"{line}; no row above {norms['outlier_multiple']:g}x the median"
    line += (
        f"; {norms['n_outliers']:,} of {n_rows:,} rows above {norms['outlier_multiple']:g}x the median,"
        f" {norms['n_outliers_position_0'] / norms['n_outliers']:.0%} of them at position 0"
    )
    if norms["n_outliers_position_0"] * 2 > norms["n_outliers"]:
        hint = "leave position 0 out of the store with --prepend-bos --no-keep-bos"
    else:
        hint = "they are not first positions; train with --max-norm-multiple 10, which leaves them out"
    return f"{line}\nwarning: such rows dominate a mean squared error; {hint}"


class Outliers(NamedTuple):
    """Rows of some activations whose norm is far above that of the others."""

    limit: float  # the norm that they are above
    is_outlier: Bool[Tensor, " n_rows"]


def outliers(norms: Float[Tensor, " n_rows"], multiple: float = OUTLIER_MULTIPLE) -> Outliers:
    """The rows above `multiple` times the (lower) median norm of all of them."""
    limit = multiple * float(norms.median())
    return Outliers(limit, norms > limit)


def row_norms(rows: Float[Tensor, "n d_in"]) -> Float[Tensor, " n"]:
    """Euclidean norms in float32, computed in blocks so that a bfloat16 shard is never copied whole."""
    if not len(rows):
        return torch.empty(0)
    return torch.cat([block.float().norm(dim=-1) for block in rows.split(8192)])


def finite_norms(rows: Float[Tensor, "n d_in"]) -> Float[Tensor, " n"]:
    """As `row_norms`, of finite rows: where the sum of squares overflows, the largest float32."""
    return row_norms(rows).clamp_max(LARGEST_NORM)


def first_not_finite(rows: Float[Tensor, "n d_in"], norms: Float[Tensor, " n"]) -> int | None:
    """Number of the first row that holds NaN or Inf; None if all are finite."""
    for row in torch.nonzero(~norms.isfinite()).flatten().tolist():
        # a norm can overflow though every entry is finite
        if not bool(rows[row].isfinite().all()):
            return row
    return None
