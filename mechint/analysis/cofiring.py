"""Which latents fire on the same rows, from a random sample of rows that bounds memory and work."""

from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.analysis.entries import Entries
from mechint.analysis.tables import mixed, numba_loops
from mechint.kernels import pool

MAX_ENTRIES = 2**23  # of the sample: 32 MB, and twice that while they are sorted
MAX_PAIRS = 2**29  # sum over the sample's rows of L0 squared: about a second of work
_ALL = 2**31


class Partners(NamedTuple):
    """For each latent those that fire together with it most, by Jaccard index; -1 (and 0) where there are fewer."""

    latent: Int[Tensor, "d_sae n"]
    jaccard: Float[Tensor, "d_sae n"]  # rows on which both fire, of those on which either does
    phi: Float[Tensor, "d_sae n"]  # correlation of the two on/off series
    both: Int[Tensor, "d_sae n"]  # rows of the sample on which both fire
    n_rows: int  # of the sample


@final
class RowSample:
    """Latents of a random sample of rows: all rows while they fit, then half of them, a quarter, ...

    A row stays if its mixed bits are below a limit, so that the sample does not depend on the batches.
    """

    def __init__(self, d_sae: int, *, seed: int = 0, max_entries: int = MAX_ENTRIES, max_pairs: int = MAX_PAIRS):
        self.d_sae, self.seed, self.max_entries, self.max_pairs = d_sae, seed, max_entries, max_pairs
        self.limit = _ALL
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # bits a row, L0 a row, latents
        self.n_entries = self.n_pairs = 0

    def add(self, entries: Entries, without: np.ndarray | None = None) -> None:
        """Take a batch in; `without` are rows of it that are left out."""
        numbers = np.arange(entries.row, entries.row + entries.n_rows)
        bits = mixed(numbers, -1, self.seed)
        wanted = bits < self.limit
        if without is not None:
            wanted[without] = False
        stays = wanted.nonzero()[0]
        rows, cols, _ = entries.flat(stays)
        self._keep(bits[stays], np.bincount(rows, minlength=entries.n_rows)[stays], cols)
        while self.n_entries > self.max_entries or self.n_pairs > self.max_pairs:
            self.limit //= 2
            parts, self.parts, self.n_entries, self.n_pairs = self.parts, [], 0, 0
            for part in parts:
                self._keep(*part)

    def _keep(self, bits: np.ndarray, lengths: np.ndarray, cols: np.ndarray) -> None:
        stays = bits < self.limit
        part = (bits[stays], lengths[stays].astype(np.int64), cols[np.repeat(stays, lengths)].astype(np.int32))
        self.parts.append(part)
        self.n_entries += len(part[2])
        self.n_pairs += int((part[1] ** 2).sum())

    def partners(self, n: int, *, least: int = 5, compiled: bool = True) -> Partners:
        """The `n` partners of each latent, of those that fire together with it on at least `least` sampled rows."""
        lengths = np.concatenate([part[1] for part in self.parts] or [np.zeros(0, np.int64)])
        cols = np.concatenate([part[2] for part in self.parts] or [np.zeros(0, np.int32)])
        row_starts = np.concatenate(([0], np.cumsum(lengths)))
        fired = np.bincount(cols, minlength=self.d_sae)
        starts = np.concatenate(([0], np.cumsum(fired)))
        best = np.full((self.d_sae, n), -1, np.int64)
        shares, both = np.zeros((self.d_sae, n)), np.zeros((self.d_sae, n), np.int64)
        loops = numba_loops() if compiled else None
        if loops is None:
            by_latent = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[np.argsort(cols, kind="stable")]
            _partners(starts, by_latent, row_starts, cols, fired, n, least, best, shares, both)
        else:
            by_latent = loops.rows_by_latent(starts.copy(), row_starts, cols)
            size = 64

            def part(item: int, thread: int) -> None:
                first, last = item * size, min((item + 1) * size, self.d_sae)
                found = (best[first:last], shares[first:last], both[first:last])
                counts = np.zeros(self.d_sae, np.int32)
                loops.partners(first, last, starts, by_latent, row_starts, cols, fired, counts, n, least, *found)

            pool().run(part, -(-self.d_sae // size))
        phi = _phi(both, fired[:, None], fired[np.maximum(best, 0)], len(lengths))
        return Partners(
            torch.from_numpy(best),
            torch.from_numpy(shares.astype(np.float32)),
            torch.from_numpy(np.where(best >= 0, phi, 0.0).astype(np.float32)),
            torch.from_numpy(both),
            len(lengths),
        )


def _partners(
    starts: np.ndarray, rows: np.ndarray, row_starts: np.ndarray, cols: np.ndarray, fired: np.ndarray, n: int,
    least: int, best: np.ndarray, shares: np.ndarray, both: np.ndarray,
) -> None:  # fmt: skip
    """As `loops.partners`, for all latents."""
    for j in range(len(fired)):
        own = rows[starts[j] : starts[j + 1]]
        if len(own) < least:
            continue
        found = np.concatenate([cols[row_starts[r] : row_starts[r + 1]] for r in own])
        counts = np.bincount(found, minlength=len(fired))
        counts[j] = 0
        share = np.where(counts >= least, counts / np.maximum(fired + fired[j] - counts, 1), -1.0)
        order = np.argsort(-share, kind="stable")[:n]
        order = order[share[order] >= 0]
        best[j, : len(order)], shares[j, : len(order)], both[j, : len(order)] = order, share[order], counts[order]


def _phi(both: np.ndarray, left: np.ndarray, right: np.ndarray, n: int) -> np.ndarray:
    """(n both - left right) / sqrt(left (n - left) right (n - right)); 0 where a latent never or always fires."""
    a, b, both = left.astype(np.float64), right.astype(np.float64), both.astype(np.float64)
    root = np.sqrt(a * (n - a) * b * (n - b))
    return np.where(root > 0, (n * both - a * b) / np.where(root > 0, root, 1.0), 0.0)
