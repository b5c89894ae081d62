"""Reconstruction and sparsity metrics from sums over a whole set of activations, kept apart by text where asked.

Sums and counts are kept in float64 and divided once, at the end, so a short last batch weighs what it should and the
result does not depend on the batch size. Kept by text, the same sums give the intervals (`mechint.eval.bootstrap`): a
resample of texts is a weighted sum of their rows. docs/metrics.md states each formula, unit and window.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechint.sae.tensors import in_float64

# What is summed over rows; `n` counts them.
COLUMNS = (
    "n",
    "squared_error",  # |x - x_hat|^2
    "square",  # |x - centre|^2
    "active",  # latents with f != 0 (below 0 only in a topk without ReLU)
    "f_abs",  # sum over latents of |f|
    "cosine",
    "norm_ratio",  # |x_hat| / |x|, where |x| > 0
    "n_nonzero",
    "hat_square",  # |x_hat|^2
    "product",  # <x, x_hat>
    "legacy",  # 1 - |x - x_hat|^2 / |x - centre|^2, where x is not the centre
    "n_legacy",
)
Number = float | np.ndarray


class ReconstructionSums:
    """Running sums over batches of (x, x_hat, feature_acts); `metrics()` divides them.

    The scatter around the mean is sum |x - c|^2 - n |mean - c|^2 with a centre c among the data, which keeps the digits
    that c = 0 would lose where the mean is far larger than the spread.

    Args:
        n_groups: the groups (texts) whose sums are kept apart.
        centre: c; `explained_variance_legacy` is about it. The mean of the first batch if None, and then that metric
            is undefined.
    """

    def __init__(
        self, d_in: int, d_sae: int, *, n_groups: int = 1, centre: Float[Tensor, " d_in"] | None = None
    ) -> None:
        self.d_in = d_in
        self.d_sae = d_sae
        self.centre = None if centre is None else centre.detach().cpu().double()
        self.has_legacy = centre is not None
        self.table = torch.zeros(n_groups, len(COLUMNS), dtype=torch.float64)
        # sum over rows of x - centre
        self.deviation: Float[Tensor, "group d_in"] = torch.zeros(n_groups, d_in, dtype=torch.float64)
        self.fire_counts: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.int64)
        # rows by their number of active latents
        self.l0_counts: Int[Tensor, " _"] = torch.zeros(d_sae + 1, dtype=torch.int64)

    n = property(lambda self: int(self.table[:, 0].sum()))
    squared_error = property(lambda self: float(self.table[:, 1].sum()))

    @property
    def scatter(self) -> float:
        """Sum over rows of |x - mean|^2."""
        return float(scatter(self.totals()["square"], self.deviation.sum(dim=0).square().sum(), self.n))

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """Mean of the rows, float64."""
        assert self.centre is not None and self.n > 0, "no rows were added"
        return self.centre + self.deviation.sum(dim=0) / self.n

    def add(
        self,
        x: Float[Tensor, "batch d_in"],
        x_hat: Float[Tensor, "batch d_in"],
        feature_acts: Float[Tensor, "batch d_sae"],
        groups: Int[Tensor, " batch"] | None = None,
        counted: Bool[Tensor, " batch"] | None = None,
    ) -> None:
        """Add a batch; its rows count equally however many they are.

        `groups` says which group each row belongs to, `counted` which rows go into `fire_counts` and `l0_counts` (all).
        """
        if len(x) == 0:
            return
        of_latents, of_rows = count_both(feature_acts, counted)
        self.fire_counts += of_latents
        l0 = of_rows if counted is None else of_rows[counted.cpu()]
        self.l0_counts += torch.bincount(l0, minlength=self.d_sae + 1)
        f_abs = torch.linalg.vector_norm(feature_acts, 1, dim=1)
        x, x_hat = in_float64(x), in_float64(x_hat)
        if self.centre is None:
            self.centre = x.mean(dim=0).cpu()
        deviation = x - self.centre.to(x.device)
        square = deviation.square().sum(dim=1)
        squared_error = (x - x_hat).square().sum(dim=1)
        norm_square, hat_square, product = x.square().sum(dim=1), x_hat.square().sum(dim=1), (x * x_hat).sum(dim=1)
        norms = norm_square.sqrt() * hat_square.sqrt()
        zero = torch.zeros_like(square)
        columns = {
            "n": torch.ones_like(square),
            "squared_error": squared_error,
            "square": square,
            "active": of_rows.to(square.device).double(),
            "f_abs": f_abs.to(square.device).double(),
            # A zero vector has no direction: it counts as cosine 0, not as NaN.
            "cosine": torch.where(norms > 0, product / norms.clamp_min(1e-300), zero),
            "norm_ratio": torch.where(norm_square > 0, (hat_square / norm_square.clamp_min(1e-300)).sqrt(), zero),
            "n_nonzero": (norm_square > 0).double(),
            "hat_square": hat_square,
            "product": product,
            "legacy": torch.where(square > 0, 1 - squared_error / square.clamp_min(1e-300), zero),
            "n_legacy": (square > 0).double() if self.has_legacy else zero,
        }
        rows = torch.stack([columns[name] for name in COLUMNS], dim=1)
        if groups is None:
            self.table[0] += rows.sum(dim=0).cpu()
            self.deviation[0] += deviation.sum(dim=0).cpu()
        else:
            self.table.index_add_(0, groups.cpu(), rows.cpu())
            self.deviation.index_add_(0, groups.cpu(), deviation.cpu())

    def totals(self) -> dict[str, float]:
        return dict(zip(COLUMNS, self.table.sum(dim=0).tolist(), strict=True))

    def metrics(self) -> dict[str, Any]:
        """The metrics of docs/metrics.md, section "Reconstruction and sparsity".

        A metric that is not defined (`fvu` where all rows are equal: there is no variance to explain) is None.
        """
        assert self.n > 0, "no rows were added"
        found = reconstruction_metrics(self.totals(), float(self.deviation.sum(dim=0).square().sum()), self.d_in)
        return {
            "val_mse": found["mse_per_dim"],
            "val_l0": found["l0"] / self.d_sae,
            **found,
            "n_val": self.n,
            "n_dead_val": int((self.fire_counts == 0).sum()),
        }


def scatter(square: Any, deviation_square: Any, n: Any) -> Any:
    """Sum of |x - mean|^2 from sum |x - c|^2 and |sum (x - c)|^2; rounding that is left of equal rows counts as 0."""
    found = square - deviation_square / n
    return np.where(found > 1e-12 * np.asarray(square), found, 0.0)


def reconstruction_metrics(totals: Mapping[str, Number], deviation_square: Number, d_in: int) -> dict[str, Any]:
    """The metrics from sums: numbers, or arrays of them (one a resample). Undefined is None, in arrays nan."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t = {name: np.asarray(value, dtype=np.float64) for name, value in totals.items()}
        variance = scatter(t["square"], deviation_square, t["n"])
        fvu = np.where(variance > 0, t["squared_error"] / variance, np.nan)
        found = {
            "l0": t["active"] / t["n"],
            "l1": t["f_abs"] / t["n"],
            "mse_per_dim": t["squared_error"] / (t["n"] * d_in),
            "mse_per_token": t["squared_error"] / t["n"],
            "fvu": fvu,
            "explained_variance": 1.0 - fvu,
            "explained_variance_legacy": t["legacy"] / np.where(t["n_legacy"] > 0, t["n_legacy"], np.nan),
            "cosine": t["cosine"] / t["n"],
            "l2_ratio": t["norm_ratio"] / np.where(t["n_nonzero"] > 0, t["n_nonzero"], np.nan),
            "relative_reconstruction_bias": t["hat_square"] / np.where(t["product"] != 0, t["product"], np.nan),
        }
    return plain(found)


def plain(found: Mapping[str, Any]) -> dict[str, Any]:
    """Single numbers as floats, with None for nan; arrays as they are."""
    if any(np.ndim(value) for value in found.values()):
        return dict(found)
    return {name: None if math.isnan(value) else float(value) for name, value in found.items()}


def count_active(feature_acts: Float[Tensor, "batch d_sae"]) -> Int[Tensor, " d_sae"]:
    """Rows on which each latent is not 0, on the CPU."""
    return count_both(feature_acts)[0]


def count_both(
    feature_acts: Float[Tensor, "batch d_sae"], counted: Bool[Tensor, " batch"] | None = None
) -> tuple[Int[Tensor, " d_sae"], Int[Tensor, " batch"]]:
    """Rows (of those `counted`) on which each latent is not 0, and latents that are not on each row; both on the CPU.

    In pieces of rows and through floats, which is exact here and ten times as fast as summing booleans down a column.
    """
    of_latents = torch.zeros(feature_acts.shape[1], dtype=torch.int64, device=feature_acts.device)
    of_rows = torch.zeros(len(feature_acts), dtype=torch.int64, device=feature_acts.device)
    for start in range(0, len(feature_acts), 512):
        rows = slice(start, start + 512)
        active = (feature_acts[rows] != 0).float()
        of_rows[rows] = active.sum(dim=1).long()
        if counted is not None:
            active *= counted[rows].to(active)[:, None]
        of_latents += active.sum(dim=0).long()
    return of_latents.cpu(), of_rows.cpu()
