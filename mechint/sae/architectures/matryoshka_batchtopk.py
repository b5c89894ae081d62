"""Matryoshka BatchTopK: every prefix of the dictionary has to reconstruct on its own, so that early latents stay broad.

    f     = BatchTopK(pre) over all d_sae latents
    loss  = mean over prefixes w of mean((f[:w] @ W_dec[:w] + b_dec - x)^2) + aux_coefficient * auxk

Bussmann et al. 2025, "Learning Multi-Level Features with Matryoshka Sparse Autoencoders". With `prefixes` = n, n prefix
lengths are drawn for each step from a Pareto distribution instead of being fixed, as saev does: `draw_widths`.
"""

from typing import final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechint.errors import MechintError
from mechint.sae.architectures.batchtopk import BatchSelecting
from mechint.sae.losses import add_auxk, mean_squared_error
from mechint.sae.objective import Loss, Objective
from mechint.streams import PREFIXES, philox


@final
class MatryoshkaBatchTopKSAE(BatchSelecting):
    """`widths` are the nested prefixes, ascending, the last one d_sae (added where it is missing)."""

    architecture = "matryoshka_batchtopk"
    options = {"k": 32, "widths": None, "prefixes": 0}
    latent_counts = ("k", "widths")

    widths: tuple[int, ...]
    prefixes: int

    def check_options(self) -> None:
        super().check_options()
        self.widths = check_widths(self.widths or default_widths(self.d_sae), self.d_sae)
        if not 0 <= self.prefixes <= self.d_sae:
            raise MechintError(f"--prefixes must be from 0 to d_sae = {self.d_sae}, got {self.prefixes}")

    def step_widths(self, seed: int, step: int) -> tuple[int, ...] | None:
        return draw_widths(self.d_sae, self.prefixes, seed, step) if self.prefixes else None

    def loss(self, x: Float[Tensor, "batch d_in"], objective: Objective) -> Loss:
        feature_acts = self.select(self.pre_activations(x))
        widths = check_widths(objective.widths or self.widths, self.d_sae)
        x_hat, narrow, start = self.b_dec, [], 0
        for width in widths:
            block = self.peers.here(start, width)
            x_hat = x_hat + self.peers.sum_latents(feature_acts[:, block] @ self.W_dec[block])
            start = width
            narrow.append(mean_squared_error(x, x_hat))
        # the full width by its own name, as everywhere; the narrower ones together
        n = len(widths)
        terms, weights = {"mse": narrow.pop()}, {"mse": 1 / n}
        if narrow:
            terms["prefix_mse"], weights["prefix_mse"] = torch.stack(narrow).mean(), (n - 1) / n
        return add_auxk(Loss(terms, weights, feature_acts), self, x, x_hat, objective)


def default_widths(d_sae: int) -> tuple[int, ...]:
    """d_sae / 16, / 8, / 4, / 2 and d_sae: each prefix twice as wide as the one before."""
    return tuple(sorted({max(1, d_sae // 2**power) for power in range(5)}))


def check_widths(widths: tuple[int, ...], d_sae: int) -> tuple[int, ...]:
    """`widths` with d_sae at the end. Raises `MechintError` unless they ascend within 1..d_sae."""
    if any(a >= b for a, b in zip(widths, widths[1:], strict=False)) or widths[0] < 1 or widths[-1] > d_sae:
        raise MechintError(f"--widths must ascend within 1 and d_sae = {d_sae}, got {', '.join(map(str, widths))}")
    return widths if widths[-1] == d_sae else (*widths, d_sae)


def draw_widths(d_sae: int, count: int, seed: int, step: int) -> tuple[int, ...]:
    """`count` prefix lengths for a step: d_sae, and the others without replacement from 1 .. d_sae - 1 with
    P(length <= l) proportional to 1 - l^-0.5, a Pareto distribution. A function of (seed, step), as batches are."""
    lengths = np.arange(1, d_sae)
    cdf = 1.0 - (lengths + 1.0) ** -0.5  # shifted by one so that length 1 has a share
    share = np.diff(cdf, prepend=0.0)
    generator = np.random.Generator(philox(seed, PREFIXES, step))
    picked = generator.choice(lengths, size=min(count - 1, len(lengths)), replace=False, p=share / share.sum())
    return (*(int(length) for length in sorted(picked)), d_sae)
