"""What is kept of active entries while they stream by: tables with one line a latent, none of which depends on how rows
are cut into batches or on the number of threads.

Both kinds of kept entries are the `k` largest of a 62-bit key a latent: for the strongest entries, value above row (the
bits of a positive float32 order as the number does; between equal values the first row is larger), for the random
sample, mixed bits of seed, row and latent.
"""

from typing import final

import numpy as np

from mechint.analysis.entries import Entries
from mechint.kernels import pool

# Activation histogram: four bins an octave, from 2^-12 to 2^12; values outside are counted in the first and last bin.
OCTAVES = (-12, 12)
BINS_PER_OCTAVE = 4
N_BINS = (OCTAVES[1] - OCTAVES[0]) * BINS_PER_OCTAVE
_LOW_BIN = (127 + OCTAVES[0]) * BINS_PER_OCTAVE  # of the upper bits of a float32
_LINE_BYTES = 2**19  # of the tables that one unit of work writes: what a second-level cache holds
MAX_ROWS = 2**32 - 1


def bin_edges() -> np.ndarray:
    """The `N_BINS + 1` edges of the activation histogram, as float32: 2^e, 1.25 2^e, 1.5 2^e, 1.75 2^e, 2^(e+1), ..."""
    numbers = np.arange(N_BINS + 1, dtype=np.int32) + _LOW_BIN
    return (numbers << 21).view(np.float32)


def numba_loops():  # noqa: ANN201
    """The compiled loops, or None where numba is missing or finds no place for its cache."""
    try:
        from mechint.analysis import loops
    except (ImportError, OSError, RuntimeError):
        return None
    return loops


@final
class Tables:
    """Per latent: how often it fires, the sum of its values, their histogram, its `n_top` strongest entries and
    `n_sample` random ones."""

    def __init__(
        self,
        d_sae: int,
        *,
        n_top: int,
        n_sample: int = 0,
        histogram: bool = False,
        seed: int = 0,
        compiled: bool = True,
    ):
        self.d_sae, self.seed = d_sae, seed
        self.counts, self.sums = np.zeros(d_sae, np.int64), np.zeros(d_sae, np.float64)
        self.top_keys, self.top_values = _empty(d_sae, n_top)
        self.sample_keys, self.sample_values = _empty(d_sae, n_sample)
        self.histogram = np.zeros((d_sae, N_BINS if histogram else 0), np.int32)
        self._loops = numba_loops() if compiled else None
        line = 16 + 12 * (n_top + n_sample) + 4 * self.histogram.shape[1]
        self._part = max(64, _LINE_BYTES // line)

    def add(self, entries: Entries) -> None:
        assert entries.row + entries.n_rows <= MAX_ROWS
        if self._loops is None:
            self._add_flat(*entries.flat(), entries.row)
            return
        loops = self._loops
        tables = (
            self.counts, self.sums, self.top_keys, self.top_values, self.sample_keys, self.sample_values, self.histogram
        )  # fmt: skip

        def part(item: int, thread: int) -> None:
            first, last = item * self._part, min((item + 1) * self._part, self.d_sae)
            loops.add_entries(first, last, *entries, self.seed, _LOW_BIN, *tables)

        pool().run(part, -(-self.d_sae // self._part))

    def _add_flat(self, rows: np.ndarray, cols: np.ndarray, values: np.ndarray, row: int) -> None:
        numbers = rows.astype(np.int64) + row
        self.counts += np.bincount(cols, minlength=self.d_sae)
        np.add.at(self.sums, cols, values.astype(np.float64))
        bits = values.view(np.int32)
        if self.histogram.shape[1]:
            bins = np.clip((bits >> 21) - _LOW_BIN, 0, N_BINS - 1)
            flat = np.bincount(cols.astype(np.int64) * N_BINS + bins, minlength=self.d_sae * N_BINS)
            self.histogram += flat.reshape(self.d_sae, N_BINS).astype(np.int32)
        low = np.int64(0xFFFFFFFF) - numbers
        _keep_highest(self.top_keys, self.top_values, cols, (bits.astype(np.int64) << 32) | low, values)
        if self.sample_keys.shape[1]:
            keys = (mixed(numbers, cols, self.seed) << 32) | low
            _keep_highest(self.sample_keys, self.sample_values, cols, keys, values)

    def top(self) -> tuple[np.ndarray, np.ndarray]:
        """Values (-inf where there are fewer) and rows (-1) of the strongest entries, strongest first."""
        return _ordered(self.top_keys, self.top_values, -np.inf)

    def sample(self) -> tuple[np.ndarray, np.ndarray]:
        """Values (-inf where there are fewer) and rows (-1) of the random entries, in random order."""
        return _ordered(self.sample_keys, self.sample_values, -np.inf)


def mixed(row: np.ndarray, latent: np.ndarray | int, seed: int) -> np.ndarray:
    """31 well-mixed bits of rows and latents, as `loops.mixed`."""
    with np.errstate(over="ignore"):
        z = row.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = z + np.asarray(latent).astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
        z = z + np.uint64(seed * 0x8CB92BA72F3D8DD7 & 0xFFFFFFFFFFFFFFFF)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(33)).astype(np.int64)


def _empty(d_sae: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((d_sae, k), -1, np.int64), np.zeros((d_sae, k), np.float32)


def _keep_highest(
    keys: np.ndarray, values: np.ndarray, cols: np.ndarray, new_keys: np.ndarray, new_values: np.ndarray
) -> None:
    """The highest keys of each latent, of those that are held and the new ones; in place."""
    k = keys.shape[1]
    above = new_keys > keys.min(axis=1)[cols] if k else np.zeros(len(cols), bool)
    if not above.any():
        return
    changed = np.unique(cols[above])
    line = np.concatenate([np.repeat(changed, k), cols[above]])
    key = np.concatenate([keys[changed].reshape(-1), new_keys[above]])
    value = np.concatenate([values[changed].reshape(-1), new_values[above]])
    order = np.lexsort((-key, line))
    line, key, value = line[order], key[order], value[order]
    rank = np.arange(len(line)) - np.searchsorted(line, line)
    kept = rank < k
    keys[line[kept], rank[kept]] = key[kept]
    values[line[kept], rank[kept]] = value[kept]


def _ordered(keys: np.ndarray, values: np.ndarray, nothing: float) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-keys, axis=1, kind="stable")
    keys, values = np.take_along_axis(keys, order, 1), np.take_along_axis(values, order, 1)
    filled = keys >= 0
    rows = np.where(filled, np.int64(0xFFFFFFFF) - (keys & np.int64(0xFFFFFFFF)), -1)
    return np.where(filled, values, np.float32(nothing)).astype(np.float32), rows
