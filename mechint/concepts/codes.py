"""Sparse feature_acts of many rows at once, latent by latent, and the dictionaries that an SAE is held against.

`Codes` keeps only what is active, 8 bytes each: for 215,000 rows at L0 32 that is 55 MB where the full table of 1,024
latents is 880 MB. Each latent's entries are in falling order of value, so that "above a threshold" is a prefix.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.errors import MechintError

# Most entries kept at once: 2.4 GB, and as much again while they are sorted.
MAX_ENTRIES = 3 * 10**8
# Largest [rows, d_sae] block of feature_acts made at once: 64 MB in float32.
MAX_BLOCK_ELEMENTS = 2**24

Encode = Callable[[Tensor], Tensor]


class Codes(NamedTuple):
    """Active entries of `n_rows` rows: those of latent j are `starts[j]` to `starts[j + 1]`, largest value first."""

    starts: Int[np.ndarray, " d_sae_plus_1"]
    rows: Int[np.ndarray, " entries"]
    values: Float[np.ndarray, " entries"]
    n_rows: int

    @property
    def d_sae(self) -> int:
        return len(self.starts) - 1

    @property
    def l0(self) -> float:
        """Mean number of active latents a row."""
        return len(self.rows) / max(self.n_rows, 1)

    def of(self, latent: int) -> tuple[Int[np.ndarray, " active"], Float[np.ndarray, " active"]]:
        """(rows, values) where a latent is active, largest value first."""
        part = slice(int(self.starts[latent]), int(self.starts[latent + 1]))
        return self.rows[part], self.values[part]

    def counts(self) -> Int[np.ndarray, " d_sae"]:
        """Rows on which each latent is active."""
        return np.diff(self.starts)

    def table(
        self, latents: Iterable[int], rows: Int[np.ndarray, " n"] | None = None
    ) -> Float[np.ndarray, "n latents"]:
        """The values of some latents at some rows (all if None), zeros included."""
        latents = list(latents)
        whole = np.zeros((len(latents), self.n_rows), dtype=np.float32)
        for line, latent in enumerate(latents):
            where, values = self.of(latent)
            whole[line, where] = values
        return np.ascontiguousarray((whole if rows is None else whole[:, rows]).T)

    def times(self, table: Float[np.ndarray, "n_rows c"], weights: np.ndarray | None = None) -> np.ndarray:
        """`[d_sae, c]`: the sum of the table's rows where each latent is active, weighted by its value or `weights`."""
        from scipy.sparse import csr_array

        weights = self.values if weights is None else weights
        return csr_array((weights, self.rows, self.starts), shape=(self.d_sae, self.n_rows)) @ table


def encode_rows(
    encode: Encode, batches: Iterable[Float[Tensor, "_ d_in"]], *, n_rows: int, what: str = "rows"
) -> Codes:
    """Encode batches of vectors; entries that are not above 0 are dropped.

    Raises:
        MechintError: more entries than are kept at once.
    """
    from scipy.sparse import csr_array

    indices, values, lengths = [], [], []
    width = total = 0
    with torch.inference_mode():
        for x in batches:
            width = width or encode(x[:1]).shape[1]
            for part in x.split(max(1, MAX_BLOCK_ELEMENTS // width)):
                acts = encode(part).cpu()
                found = (acts > 0).nonzero()
                values.append(acts[found[:, 0], found[:, 1]].float().numpy())
                indices.append(found[:, 1].to(torch.int32).numpy())
                lengths.append(torch.bincount(found[:, 0], minlength=len(acts)).numpy())
                total += len(found)
                if total > MAX_ENTRIES:
                    seen = sum(map(len, lengths))
                    raise MechintError(
                        f"{total / seen:.0f} latents a token are active, too many to keep for {n_rows} {what}: give"
                        f" --max-texts so that at most {int(MAX_ENTRIES / (total / seen)):,} tokens are scored"
                    )
    starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    table = csr_array((np.concatenate(values), np.concatenate(indices), starts), shape=(len(starts) - 1, width)).tocsc()
    return _sorted(table.indptr, table.indices, table.data, len(starts) - 1)


def _sorted(starts: np.ndarray, rows: np.ndarray, values: np.ndarray, n_rows: int) -> Codes:
    for latent in range(len(starts) - 1):
        part = slice(int(starts[latent]), int(starts[latent + 1]))
        order = np.argsort(-values[part], kind="stable")
        values[part], rows[part] = values[part][order], rows[part][order]
    return Codes(starts.astype(np.int64), rows, values, n_rows)


class Moments(NamedTuple):
    """Mean and covariance of rows, in float64."""

    mean: Float[Tensor, " d_in"]
    covariance: Float[Tensor, "d_in d_in"]


def moments(batches: Iterable[Float[Tensor, "_ d_in"]]) -> Moments:
    """Mean and covariance from one pass. Sums are taken around the first batch's mean, which keeps their digits."""
    n, centre, total, outer = 0, None, None, None
    for x in batches:
        x = x.double()
        if centre is None or total is None or outer is None:
            centre = x.mean(dim=0)
            total, outer = torch.zeros_like(centre), torch.zeros(len(centre), len(centre), dtype=torch.float64)
        x = x - centre
        n, total, outer = n + len(x), total + x.sum(dim=0), outer + x.T @ x
    assert centre is not None and total is not None and outer is not None
    shift = total / n
    return Moments(centre + shift, outer / n - torch.outer(shift, shift))


def random_dictionary(mean: Float[Tensor, " d_in"], d_sae: int, l0: float, seed: int) -> Encode:
    """An untrained dictionary of the same size and sparsity: random unit directions, the largest dot products kept.

    f = the round(l0) largest entries of ReLU((x - mean) W) with columns of W drawn from the unit sphere.
    """
    generator = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(len(mean), d_sae, generator=generator), dim=0)
    k = min(max(round(l0), 1), d_sae)

    def encode(x: Tensor) -> Tensor:
        pre = (x - mean.to(x)) @ W.to(x)
        top = pre.topk(k, dim=1)
        return torch.zeros_like(pre).scatter_(1, top.indices, top.values.relu())

    return encode


def pca_dictionary(of: Moments) -> Encode:
    """Both signs of every principal direction: f = ReLU((x - mean) [V, -V]); latent d_in + i is the negative of i."""
    values, vectors = torch.linalg.eigh(of.covariance)
    V = vectors[:, values.argsort(descending=True)]

    def encode(x: Tensor) -> Tensor:
        projected = (x - of.mean.to(x)) @ V.to(x)
        return torch.cat([projected, -projected], dim=1).relu()

    return encode


def describe(codes: Codes) -> dict[str, Any]:
    """What a summary says of codes."""
    return {"n_rows": codes.n_rows, "d_sae": codes.d_sae, "l0": codes.l0, "n_live": int((codes.counts() > 0).sum())}
