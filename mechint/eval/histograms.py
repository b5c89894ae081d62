"""How often latents fire and how many fire at once, as histograms; and which latents are dead, dense or alive."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

# A latent is dense if it is active on more than this share of the rows: SAEBench's `freq_over_10_percent`. The other
# threshold is SAEBench's `freq_over_1_percent` and what saev calls dense (its `dense_threshold`).
DENSE = 0.1
OFTEN = 0.01
# Bins of log10(density): four a decade, from one row in ten million to every row.
LOG10_EDGES = [-7 + 0.25 * step for step in range(29)]
L0_BINS = 50


def activity_metrics(fire_counts: Int[Tensor, " d_sae"], n_rows: int) -> dict[str, Any]:
    """Numbers of latents that are dead (active on none of the rows), alive, dense (on more than 10 %), often (1 %)."""
    d_sae = len(fire_counts)
    n_dead = int((fire_counts == 0).sum())
    n_dense = int((fire_counts > DENSE * n_rows).sum())
    return {
        "dead_features": n_dead,
        "dead_fraction": n_dead / d_sae,
        "alive_features": d_sae - n_dead,
        "dense_features": n_dense,
        "dense_fraction": n_dense / d_sae,
        "features_over_1_percent": int((fire_counts > OFTEN * n_rows).sum()),
    }


def density_histogram(fire_counts: Int[Tensor, " d_sae"], n_rows: int) -> dict[str, Any]:
    """Latents by log10 of the share of the rows on which they are active; `n_dead` are active on none.

    A bin holds low <= log10(density) < high, the last one its upper edge too; what is below the first edge is in the
    first bin. `counts` and `n_dead` sum to d_sae.
    """
    alive = fire_counts[fire_counts > 0]
    density = (alive.double() / max(n_rows, 1)).log10()
    edges = torch.tensor(LOG10_EDGES, dtype=torch.float64)
    # right=True puts a value that equals an edge above it
    bins = (torch.bucketize(density, edges, right=True) - 1).clamp(0, len(edges) - 2)
    counts = torch.bincount(bins, minlength=len(edges) - 1)
    return {
        "log10_edges": LOG10_EDGES,
        "counts": counts.tolist(),
        "n_dead": int(len(fire_counts) - len(alive)),
        "n_rows": n_rows,
    }


def l0_histogram(l0_counts: Int[Tensor, " _"]) -> dict[str, Any]:
    """Rows by their number of active latents, in at most 50 bins of equal whole width: low <= l0 < high.

    `l0_counts[i]` is the number of rows with i active latents.
    """
    present = l0_counts.nonzero()
    highest = int(present[-1]) if len(present) else 0
    width = -(-(highest + 1) // L0_BINS)
    n_bins = -(-(highest + 1) // width)
    padded = torch.zeros(n_bins * width, dtype=torch.int64)
    padded[: highest + 1] = l0_counts[: highest + 1]
    return {"edges": [width * step for step in range(n_bins + 1)], "counts": padded.view(n_bins, width).sum(1).tolist()}
