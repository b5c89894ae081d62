"""Reconstruction and sparsity metrics from sums over a whole set of activations.

Sums and counts are kept in float64 and divided once, at the end, so a short last batch weighs what it should and the
result does not depend on the batch size. docs/metrics.md states each formula, unit and window.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class ReconstructionSums:
    """Running sums over batches of (x, x_hat, feature_acts); `metrics()` divides them.

    The scatter around the mean is merged batch by batch (Chan, Golub and LeVeque, 1979) instead of taken as
    sum |x|^2 - n |mean|^2, which loses all its digits when the mean is far larger than the spread.
    """

    def __init__(self, d_in: int, d_sae: int) -> None:
        self.d_in = d_in
        self.d_sae = d_sae
        self.n = 0
        self.squared_error = 0.0  # sum over rows and d_in of (x - x_hat)^2
        self.mean: Float[Tensor, " d_in"] = torch.zeros(d_in, dtype=torch.float64)
        self.scatter = 0.0  # sum over rows of |x - mean|^2
        self.active = 0  # number of (row, latent) pairs with f > 0
        self.f_abs = 0.0  # sum over rows and latents of |f|
        self.cosine = 0.0  # sum over rows of cos(x, x_hat)
        self.norm_ratio = 0.0  # sum over rows with |x| > 0 of |x_hat| / |x|
        self.n_nonzero = 0  # rows with |x| > 0
        self.fire_counts: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.int64)

    def add(
        self,
        x: Float[Tensor, "batch d_in"],
        x_hat: Float[Tensor, "batch d_in"],
        feature_acts: Float[Tensor, "batch d_sae"],
    ) -> None:
        """Add a batch; its rows count equally however many they are."""
        n_batch = len(x)
        if n_batch == 0:
            return
        counts = count_active(feature_acts)
        self.fire_counts += counts
        self.active += int(counts.sum())
        self.f_abs += float(torch.linalg.vector_norm(feature_acts, 1, dim=1).cpu().double().sum())
        x, x_hat = _double(x), _double(x_hat)
        self.squared_error += float((x - x_hat).square().sum())
        self._add_norms(x, x_hat)
        self._add_scatter(x)
        self.n += n_batch

    def _add_norms(self, x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> None:
        norm, norm_hat = x.norm(dim=1), x_hat.norm(dim=1)
        product = norm * norm_hat
        # A zero vector has no direction: it counts as cosine 0, not as NaN.
        cosine = torch.where(product > 0, (x * x_hat).sum(dim=1) / product.clamp_min(1e-300), 0.0)
        self.cosine += float(cosine.sum())
        nonzero = norm > 0
        self.norm_ratio += float((norm_hat[nonzero] / norm[nonzero]).sum())
        self.n_nonzero += int(nonzero.sum())

    def _add_scatter(self, x: Float[Tensor, "batch d_in"]) -> None:
        n_batch = len(x)
        batch_mean = x.mean(dim=0)
        batch_scatter = float((x - batch_mean).square().sum())
        delta = batch_mean.cpu() - self.mean
        n_total = self.n + n_batch
        self.scatter += batch_scatter + float(delta.square().sum()) * self.n * n_batch / n_total
        self.mean += delta * (n_batch / n_total)

    def metrics(self) -> dict[str, Any]:
        """The metrics of docs/metrics.md, section "Reconstruction and sparsity".

        `fvu` and `explained_variance` are None when all rows are equal (there is no variance to explain).
        """
        assert self.n > 0, "no rows were added"
        fvu = self.squared_error / self.scatter if self.scatter > 0 else None
        n_dead = int((self.fire_counts == 0).sum())
        return {
            "val_mse": self.squared_error / (self.n * self.d_in),
            "val_l0": self.active / (self.n * self.d_sae),
            "l0": self.active / self.n,
            "l1": self.f_abs / self.n,
            "mse_per_dim": self.squared_error / (self.n * self.d_in),
            "mse_per_token": self.squared_error / self.n,
            "fvu": fvu,
            "explained_variance": None if fvu is None else 1.0 - fvu,
            "cosine": self.cosine / self.n,
            "l2_ratio": self.norm_ratio / self.n_nonzero if self.n_nonzero else None,
            "n_val": self.n,
            "n_dead_val": n_dead,
        }

    def is_finite(self) -> bool:
        return math.isfinite(self.squared_error) and math.isfinite(self.f_abs) and math.isfinite(self.scatter)


def count_active(feature_acts: Float[Tensor, "batch d_sae"]) -> Int[Tensor, " d_sae"]:
    """Rows on which each latent is above 0, on the CPU.

    In pieces of rows and through floats, which is exact here and ten times as fast as summing booleans down a column.
    """
    counts = torch.zeros(feature_acts.shape[1], dtype=torch.int64, device=feature_acts.device)
    for part in feature_acts.split(512):
        counts += (part > 0).float().sum(dim=0).long()
    return counts.cpu()


def _double(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
    return (x.cpu() if x.device.type == "mps" else x).double()  # mps has no float64
