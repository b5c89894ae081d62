"""The strongest activations of every latent, from one pass over stored activations."""

import copy

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.analysis.entries import Entries, active_entries
from mechint.analysis.tables import Tables
from mechint.data.store import Activations
from mechint.errors import MechintError
from mechint.sae import SAE


def collect_top_activations(
    sae: SAE,
    activations: Float[Tensor, "n d_in"] | Activations,
    k: int = 20,
    batch_size: int = 4096,
    device: str | torch.device = "cpu",
) -> tuple[Float[Tensor, "d_sae k"], Int[Tensor, "d_sae k"]]:
    """For each latent its `k` highest values over all rows and the rows they are on, highest first.

    Equal values are ordered by row, so the result does not depend on `batch_size`. A latent that fires on fewer than
    `k` rows is filled up with 0 on the first rows where it is silent; with fewer than `k` rows in all, the rest is -inf
    with row -1. Results are on the CPU. `gather` finds the same and more, in one pass too.

    Raises:
        MechintError: `activations` is not as wide as the SAE, `k` is below 1, or a row holds NaN or Inf.
    """
    if k < 1:
        raise MechintError(f"k must be at least 1, got {k}")
    if sae.W_enc.device != torch.device(device):
        sae = copy.deepcopy(sae).to(device)  # the caller's stays where it is
    tables, silent, n_rows = Tables(sae.d_sae, n_top=k), _Silent(sae.d_sae, 2 * k), 0
    for entries in active_entries(sae, activations, batch_size=batch_size):
        silent.note(entries)
        tables.add(entries)
        n_rows += entries.n_rows
    values, rows = (torch.from_numpy(table) for table in tables.top())
    silent.fill(values, rows, n_rows)
    return values, rows


class _Silent:
    """Which latents are silent on the first `n` rows: twice k are enough to fill any latent up."""

    def __init__(self, d_sae: int, n: int):
        self.flags = np.ones((n, d_sae), bool)
        self.n_seen = 0

    def note(self, entries: Entries) -> None:
        if self.n_seen == len(self.flags):
            return
        n = min(entries.n_rows, len(self.flags) - self.n_seen)
        rows, cols, _ = entries.flat(np.arange(n))
        self.flags[rows + self.n_seen, cols] = False
        self.n_seen += n

    def fill(self, values: Float[Tensor, "d_sae k"], rows: Int[Tensor, "d_sae k"], n_rows: int) -> None:
        k = values.shape[1]
        silent = torch.from_numpy(self.flags[: self.n_seen]).T
        filled = (rows >= 0).sum(dim=1)
        for latent in (filled < min(k, n_rows)).nonzero().flatten().tolist():
            count = int(filled[latent])
            fill = silent[latent].nonzero().flatten()[: k - count]
            values[latent, count : count + len(fill)] = 0.0
            rows[latent, count : count + len(fill)] = fill
