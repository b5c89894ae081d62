"""Compiled loops over active entries; `tables.py` has the same in numpy for platforms without numba."""

from typing import no_type_check

import numpy as np
from numba import njit

_compiled = njit(nogil=True, cache=True, error_model="numpy")


@_compiled
@no_type_check
def mixed(row, latent, seed):
    """31 well-mixed bits of a row and a latent (the finisher of splitmix64)."""
    z = np.uint64(row) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(latent) * np.uint64(0xD1B54A32D192ED03)
    z += np.uint64(seed) * np.uint64(0x8CB92BA72F3D8DD7)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((z ^ (z >> np.uint64(31))) >> np.uint64(33))


@_compiled
@no_type_check
def replace_lowest(keys, values, key, value):
    """Put a key into a heap whose lowest stands first, in place of that one."""
    n, at = keys.shape[0], 0
    while True:
        child = 2 * at + 1
        if child >= n:
            break
        if child + 1 < n and keys[child + 1] < keys[child]:
            child += 1
        if keys[child] >= key:
            break
        keys[at] = keys[child]
        values[at] = values[child]
        at = child
    keys[at] = key
    values[at] = value


@_compiled
@no_type_check
def add_entries(
    first, last, row, n_rows, chunk, capacity, cols, values, ends, seed, low_bin,
    counts, sums, top_keys, top_values, sample_keys, sample_values, histogram,
):  # fmt: skip
    """Take the entries of latents `first:last` into the tables; see `tables.Tables`."""
    bits = values.view(np.int32)
    n_bins, n_top, n_sample = histogram.shape[1], top_keys.shape[1], sample_keys.shape[1]
    for r in range(n_rows):
        start = (r // chunk) * capacity if r % chunk == 0 else ends[r - 1]
        stop = ends[r]
        e, high = start, stop
        while e < high:
            middle = (e + high) // 2
            if cols[middle] < first:
                e = middle + 1
            else:
                high = middle
        number = np.int64(row + r)
        while e < stop and cols[e] < last:
            j, value = cols[e], values[e]
            if value > 0:
                counts[j] += 1
                sums[j] += value
                if n_bins > 0:
                    histogram[j, min(max((bits[e] >> 21) - low_bin, 0), n_bins - 1)] += 1
                if n_top > 0:
                    key = (np.int64(bits[e]) << 32) | (np.int64(0xFFFFFFFF) - number)
                    if key > top_keys[j, 0]:
                        replace_lowest(top_keys[j], top_values[j], key, value)
                if n_sample > 0:
                    key = (mixed(number, j, seed) << 32) | (np.int64(0xFFFFFFFF) - number)
                    if key > sample_keys[j, 0]:
                        replace_lowest(sample_keys[j], sample_values[j], key, value)
            e += 1


@_compiled
@no_type_check
def rows_by_latent(places, row_starts, cols):
    """The row of each entry, by latent and then by row; `places`, where each latent's begin, is used up."""
    rows = np.empty(cols.shape[0], np.int32)
    for r in range(row_starts.shape[0] - 1):
        for e in range(row_starts[r], row_starts[r + 1]):
            rows[places[cols[e]]] = r
            places[cols[e]] += 1
    return rows


@_compiled
@no_type_check
def partners(first, last, starts, rows, row_starts, cols, fired, counts, most, least, best, shares, both):
    """For latents `first:last` the `most` others with the highest Jaccard index; `counts` is room for one number a
    latent. Entries by latent are `rows[starts[j]:starts[j + 1]]`, by row `cols[row_starts[r]:row_starts[r + 1]]`."""
    n_latents = starts.shape[0] - 1
    for j in range(first, last):
        counts[:] = 0
        for p in range(starts[j], starts[j + 1]):
            r = rows[p]
            for e in range(row_starts[r], row_starts[r + 1]):
                counts[cols[e]] += 1
        line = j - first
        for i in range(n_latents):
            n = counts[i]
            if n < least or i == j:
                continue
            share = np.float64(n) / np.float64(fired[i] + fired[j] - n)
            if best[line, most - 1] >= 0 and share <= shares[line, most - 1]:
                continue
            at = most - 1
            while at > 0 and (best[line, at - 1] < 0 or share > shares[line, at - 1]):
                best[line, at] = best[line, at - 1]
                shares[line, at] = shares[line, at - 1]
                both[line, at] = both[line, at - 1]
                at -= 1
            best[line, at] = i
            shares[line, at] = share
            both[line, at] = n
