"""The compiled loops of the sparse kernel.

Layouts. Rows are padded with zeros to `width`, a multiple of 64 floats. What the weight gradients read (the centred
activations and the gradient of the reconstruction) lies in slices of 64 columns, `[slice, row, 64]`: one slice of a
batch fits the second-level cache, so that the gather per latent reads it from there.

Entries of a chunk of rows, row by row and by ascending column, are `cols`, `pre` and `grad`; `ends[r]` is where row r's
end. Entries by latent are records `[row, feature_acts, gradient of pre, nothing]` of 16 bytes: one cache
line each to scatter.

Every sum has a fixed order, and no two threads write the same number: results do not depend on the threads.
"""

import hashlib
from pathlib import Path
from typing import no_type_check

import numpy as np
from numba import njit

from mechint.kernels.cpu.vector import (
    LANES,
    add_rows_64,
    add_rows_256,
    add_rows_twice_64,
    add_rows_twice_128,
    dots_1,
    dots_4,
    dots_twice_1,
    dots_twice_4,
    from_bfloat16,
    pack_above_bfloat16,
    pack_above_float32,
    sum_records_64,
    to_bfloat16,
)

# Sums may be regrouped and products fused; NaN and infinity keep their meaning.
_SUMS = {"reassoc", "contract"}
_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": _SUMS}
_FILES = sorted(Path(__file__).parent.glob("*.py"))
_STAMP = hashlib.sha256(b"".join(path.read_bytes() for path in _FILES)).hexdigest()


@no_type_check
def compiled(function):
    """`numba.njit`, kept on disk. numba would look at the function's own file alone to see whether what it kept is
    still good, but functions of other files are compiled into it: here a change in any of them counts."""
    dispatcher = njit(**_OPTIONS)(function)
    file = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if file is not None:
        file._source_stamp = _STAMP
    return dispatcher


# Rounding to bfloat16: at most 2^-8 of the value, and a little more relative to the rounded value.
BFLOAT16_STEP = np.float32(2.0**-8 * (1 + 2.0**-6))
# From this many entries a row on, weights are read in tiles of 512 KB, for blocks of lines of 256 KB.
TILED_ABOVE, TILE_FLOATS, BLOCK_FLOATS = 160, 2**17, 2**16
_SLACK = 1.0001  # for the rounding of the bounds themselves


@compiled
@no_type_check
def measure_latents(W_enc, b_enc, narrow, first, last, W_narrow, norms):
    """Per latent: encoder column in bfloat16, and its norm. Returns the largest relative rounding error of a column,
    NaN if any number is not finite."""
    worst = np.float32(0.0)
    d_in = W_enc.shape[1]
    finite = True
    for j in range(first, last):
        total, error = np.float32(0.0), np.float32(0.0)
        if narrow:
            for k in range(d_in):
                value = W_enc[j, k]
                bits = to_bfloat16(value)
                W_narrow[j, k] = bits
                rest = value - from_bfloat16(bits)
                total += value * value
                error += rest * rest
        else:
            for k in range(d_in):
                total += W_enc[j, k] * W_enc[j, k]
        finite = finite and np.isfinite(total) and np.isfinite(b_enc[j])
        norms[j] = np.sqrt(total)
        if total > 0:
            worst = max(worst, np.sqrt(error / total))
    return worst if finite else np.float32(np.nan)


@compiled
@no_type_check
def prepare_rows(x, b_dec, narrow, first, last, x_narrow, x_wide, slices, errors, worst_latent):
    """Centre rows `first:last`: into slices, and for the encoder product as bfloat16 or float32. `errors[r]` times the
    norm of a latent's column bounds how far the bfloat16 product is from the float32 one. False if not all finite."""
    d_in = x.shape[1]
    # sums of d_in products in float32, in whatever order, of both the product and its float32 check
    rounding = worst_latent + np.float32(3 * d_in * 2.0**-23)
    finite = True
    for r in range(first, last):
        total, error = np.float32(0.0), np.float32(0.0)
        for s in range(slices.shape[0]):
            start = 64 * s
            n = min(64, d_in - start)
            for k in range(n):
                slices[s, r, k] = x[r, start + k] - b_dec[start + k]
            if narrow:
                for k in range(n):
                    value = slices[s, r, k]
                    bits = to_bfloat16(value)
                    x_narrow[r - first, start + k] = bits
                    rest = value - from_bfloat16(bits)
                    total += value * value
                    error += rest * rest
            else:
                for k in range(n):
                    value = slices[s, r, k]
                    x_wide[r - first, start + k] = value
                    total += value * value
        finite = finite and np.isfinite(total)
        size, rest = np.sqrt(total), np.sqrt(error)
        errors[r] = (rest + (size + rest) * rounding) * np.float32(_SLACK)
    return finite


@compiled
@no_type_check
def centred(slices, r, row):
    """Row r of the slices, in one piece."""
    for s in range(slices.shape[0]):
        for k in range(64):
            row[64 * s + k] = slices[s, r, k]


@compiled
@no_type_check
def dots(row, rows, cols, out, first, last):
    """out[e] = <row, rows[cols[e]]>."""
    row_at, rows_at, bytes_a_row = row.ctypes.data, rows.ctypes.data, 4 * rows.shape[1]
    cols_at, out_at, n_blocks = cols.ctypes.data, out.ctypes.data, rows.shape[1] // 64
    e = first
    while e + 4 <= last:
        dots_4(row_at, rows_at, bytes_a_row, cols_at + 4 * e, out_at + 4 * e, n_blocks)
        e += 4
    while e < last:
        dots_1(row_at, rows_at, bytes_a_row, cols_at + 4 * e, out_at + 4 * e, n_blocks)
        e += 1


@compiled
@no_type_check
def add_rows(row, rows, cols, coefs, first, last):
    """row += sum of coefs[e] * rows[cols[e]]."""
    row_at, rows_at, bytes_a_row = row.ctypes.data, rows.ctypes.data, 4 * rows.shape[1]
    cols_at, coefs_at = cols.ctypes.data + 4 * first, coefs.ctypes.data + 4 * first
    k = 0
    while k + 256 <= row.shape[0]:
        add_rows_256(row_at + 4 * k, rows_at + 4 * k, bytes_a_row, cols_at, coefs_at, last - first)
        k += 256
    while k < row.shape[0]:
        add_rows_64(row_at + 4 * k, rows_at + 4 * k, bytes_a_row, cols_at, coefs_at, last - first)
        k += 64


@compiled
@no_type_check
def dots_twice(row, other, rows, cols, out, other_out, first, last):
    """`dots` of two vectors with the same rows, which are read once; the same bits as one by one."""
    row_at, other_at, rows_at, bytes_a_row = row.ctypes.data, other.ctypes.data, rows.ctypes.data, 4 * rows.shape[1]
    cols_at, out_at, other_out_at, n_blocks = (
        cols.ctypes.data,
        out.ctypes.data,
        other_out.ctypes.data,
        rows.shape[1] // 64,
    )
    e = first
    while e + 4 <= last:
        ats = (row_at, other_at, rows_at, bytes_a_row, cols_at + 4 * e, out_at + 4 * e, other_out_at + 4 * e)
        dots_twice_4(*ats, n_blocks)
        e += 4
    while e < last:
        ats = (row_at, other_at, rows_at, bytes_a_row, cols_at + 4 * e, out_at + 4 * e, other_out_at + 4 * e)
        dots_twice_1(*ats, n_blocks)
        e += 1


@compiled
@no_type_check
def add_rows_twice(row, other, rows, cols, coefs, others, first, last):
    """`add_rows` to two rows, each with its own coefficients; the same bits as one by one."""
    row_at, other_at, rows_at, bytes_a_row = row.ctypes.data, other.ctypes.data, rows.ctypes.data, 4 * rows.shape[1]
    at = 4 * first
    entries = (bytes_a_row, cols.ctypes.data + at, coefs.ctypes.data + at, others.ctypes.data + at, last - first)
    k = 0
    while k + 128 <= row.shape[0]:
        add_rows_twice_128(row_at + 4 * k, other_at + 4 * k, rows_at + 4 * k, *entries)
        k += 128
    while k < row.shape[0]:
        add_rows_twice_64(row_at + 4 * k, other_at + 4 * k, rows_at + 4 * k, *entries)
        k += 64


@compiled
@no_type_check
def by_tiles(add, lines, rows, cols, values, first, last, base, ends):
    """`add_rows` of `values` (or `dots` into them, where not `add`) for all entries of `lines`, rows `first:last`.

    Where a row has many entries: a tile of `rows` stays in the second-level cache while a block of lines passes by.
    """
    n_columns, width = rows.shape
    n_lines, n_tile = max(16, BLOCK_FLOATS // width), max(16, TILE_FLOATS // width)
    positions = np.empty(n_lines, np.int64)
    for block in range(first, last, n_lines):
        stop = min(block + n_lines, last)
        for r in range(block, stop):
            positions[r - block] = base if r == first else ends[r - 1]
        for tile in range(0, n_columns, n_tile):
            for r in range(block, stop):
                start = positions[r - block]
                e = start
                while e < ends[r] and cols[e] < tile + n_tile:
                    e += 1
                if e > start:
                    positions[r - block] = e
                    if add:
                        add_rows(lines[r - first], rows, cols, values, start, e)
                    else:
                        dots(lines[r - first], rows, cols, values, start, e)


@compiled
@no_type_check
def candidates(values, narrow, biases, norms, error, cut, cols, position):
    """Columns of a row whose pre-activation may be above their bound by more than `cut`; NaN counts as above.
    Room for 16 more than are found has to be there."""
    n_latents = biases.shape[0]
    values_at, biases_at, norms_at, cols_at = (
        values.ctypes.data,
        biases.ctypes.data,
        norms.ctypes.data,
        cols.ctypes.data,
    )
    relative = BFLOAT16_STEP if narrow else np.float32(1e-6)
    size = 2 if narrow else 4
    done = 0
    while done < n_latents:
        start = min(done, n_latents - LANES)  # the last 16 overlap those before them
        ats = (values_at + size * start, biases_at + 4 * start, norms_at + 4 * start)
        limits = (relative, error, np.float32(cut))
        if narrow:
            position += pack_above_bfloat16(*ats, *limits, start, done - start, cols_at + 4 * position)
        else:
            position += pack_above_float32(*ats, *limits, start, done - start, cols_at + 4 * position)
        done = start + LANES
    return position


@compiled
@no_type_check
def find_above(
    values, narrow, first, last, slices, W_enc, b_enc, bound, biases, norms, errors, lines, base, limit, cols, pre, ends
):
    """Entries with pre > bound, from the encoder product `values [rows, d_sae]` (bfloat16 bits or float32).

    bfloat16 only proposes: a candidate's pre-activation is computed again in float32, and the bound on the rounding
    error leaves none out. Returns the number of entries, or -1 where they do not fit before `limit`.
    """
    position = base
    n_latents = b_enc.shape[0]
    for r in range(first, last):
        if position + n_latents + LANES > limit:
            return -1
        position = candidates(values[r - first], narrow, biases, norms, errors[r], np.float32(0.0), cols, position)
        ends[r] = position
    if narrow:
        tiled = position - base >= TILED_ABOVE * (last - first)
        start = base
        for r in range(first, last):
            centred(slices, r, lines[r - first])
            if not tiled:
                dots(lines[r - first], W_enc, cols, pre, start, ends[r])
            start = ends[r]
        if tiled:
            by_tiles(False, lines, W_enc, cols, pre, first, last, base, ends)
    else:
        start = base
        for r in range(first, last):
            for e in range(start, ends[r]):
                pre[e] = values[r - first, cols[e]]
            start = ends[r]
    position = start = base
    for r in range(first, last):
        for e in range(start, ends[r]):
            j = cols[e]
            value = pre[e] + b_enc[j]
            cols[position] = j
            pre[position] = value
            position += not value <= bound[j]
        start = ends[r]
        ends[r] = position
    return position - base


@compiled
@no_type_check
def minus_row(x, b_dec, r, line):
    """b_dec - x[r], padded with zeros: what a reconstruction is added to."""
    d_in = x.shape[1]
    for k in range(d_in):
        line[k] = b_dec[k] - x[r, k]
    for k in range(d_in, line.shape[0]):
        line[k] = 0.0


@compiled
@no_type_check
def scaled(line, scale):
    """Multiplies an error by `scale`, to d mse / d x_hat. Returns its sum of squares before."""
    squares = np.float32(0.0)
    for k in range(line.shape[0]):
        value = line[k]
        squares += value * value
        line[k] = value * scale
    return squares


@compiled
@no_type_check
def into_slices(line, r, slices):
    for s in range(slices.shape[0]):
        for k in range(64):
            slices[s, r, k] = line[64 * s + k]


@compiled
@no_type_check
def is_tiled(first, last, base, ends):
    return ends[last - 1] - base >= TILED_ABOVE * (last - first)


@compiled
@no_type_check
def decode_rows(x, b_dec, W_dec, first, last, lines, base, cols, acts, ends, slices, grad):
    """Reconstruct rows from their entries, write d mse / d x_hat into slices and d mse / d acts into `grad`. Returns
    the sum of squared errors."""
    scale = np.float32(2.0 / (np.float64(x.shape[0]) * x.shape[1]))
    tiled = is_tiled(first, last, base, ends)
    if tiled:
        for r in range(first, last):
            minus_row(x, b_dec, r, lines[r - first])
        by_tiles(True, lines, W_dec, cols, acts, first, last, base, ends)
    total = 0.0
    start = base
    for r in range(first, last):
        line = lines[r - first]
        if not tiled:
            minus_row(x, b_dec, r, line)
            add_rows(line, W_dec, cols, acts, start, ends[r])
        total += scaled(line, scale)
        into_slices(line, r, slices)
        if not tiled:
            dots(line, W_dec, cols, grad, start, ends[r])
        start = ends[r]
    if tiled:
        by_tiles(False, lines, W_dec, cols, grad, first, last, base, ends)
    return total


@compiled
@no_type_check
def decode_twice(x, b_dec, W_dec, first, last, lines, base, cols, acts, others, ends, slices, grad, other_grad):
    """`decode_rows` of `acts`, and of `others` into `other_grad`, the decoder's rows read once for both; the second
    leaves no slices. Returns both sums of squared errors."""
    scale = np.float32(2.0 / (np.float64(x.shape[0]) * x.shape[1]))
    total, other_total = 0.0, 0.0
    if is_tiled(first, last, base, ends):
        nothing = slices[:0]
        total = decode_rows(x, b_dec, W_dec, first, last, lines, base, cols, acts, ends, slices, grad)
        other_total = decode_rows(x, b_dec, W_dec, first, last, lines, base, cols, others, ends, nothing, other_grad)
        return total, other_total
    line, other = lines[0], np.empty(W_dec.shape[1], np.float32)
    start = base
    for r in range(first, last):
        minus_row(x, b_dec, r, line)
        other[:] = line
        add_rows_twice(line, other, W_dec, cols, acts, others, start, ends[r])
        total += scaled(line, scale)
        other_total += scaled(other, scale)
        into_slices(line, r, slices)
        dots_twice(line, other, W_dec, cols, grad, other_grad, start, ends[r])
        start = ends[r]
    return total, other_total


@compiled
@no_type_check
def column_sums(slices, first, last, out):
    """out[slice, k] = sum over rows, for d loss / d b_dec."""
    for s in range(slices.shape[0]):
        for k in range(64):
            out[s, k] = 0.0
        for r in range(first, last):
            for k in range(64):
                out[s, k] += slices[s, r, k]


@compiled
@no_type_check
def place_entries(counts, starts):
    """`counts [chunk, latent]` to where each chunk's entries of a latent begin, by latent and then by chunk;
    `starts [latent + 1]` where each latent's do."""
    position = 0
    for j in range(counts.shape[1]):
        starts[j] = position
        for c in range(counts.shape[0]):
            n = counts[c, j]
            counts[c, j] = position
            position += n
    starts[counts.shape[1]] = position


@compiled
@no_type_check
def scatter_entries(first, last, base, cols, acts, grad, ends, places, rows, coefs):
    """A chunk's entries to their places by latent; `rows` and `coefs` are the records as int32 and as float32."""
    start = base
    for r in range(first, last):
        for e in range(start, ends[r]):
            j = cols[e]
            p = places[j]
            places[j] = p + 1
            rows[p, 0] = r
            coefs[p, 1] = acts[e]
            coefs[p, 2] = grad[e]
        start = ends[r]


@compiled
@no_type_check
def weight_gradient(slices, s, first, last, starts, rows, which, out):
    """Columns of slice s of the gradient rows `first:last`: sum over a latent's records of coefficient `which` times
    the slice's row. Returns the sum of squares."""
    d_in = out.shape[1]
    n = min(64, d_in - 64 * s)
    part = np.empty(64, np.float32)  # where the slice is wider than what is left of `out`
    total = 0.0
    part_at, out_at, records_at = part.ctypes.data, out.ctypes.data + 256 * s, rows.ctypes.data
    slice_at = slices.ctypes.data + s * slices.strides[0]
    for j in range(first, last):
        target = out_at + 4 * d_in * j if n == 64 else part_at
        at = records_at + 16 * starts[j]
        total += sum_records_64(target, slice_at, 256, at, at + 4 * which, starts[j + 1] - starts[j])
        if n < 64:
            for k in range(n):
                out[j, 64 * s + k] = part[k]
    return total


@compiled
@no_type_check
def bias_gradient(W_enc, first, last, starts, coefs, grad, partial):
    """d loss / d b_enc of latents `first:last`, and what they take from d loss / d b_dec: `W_enc @ grad`."""
    partial[:] = 0.0
    d_in = partial.shape[0]
    squares = 0.0
    for j in range(first, last):
        total = np.float32(0.0)
        for p in range(starts[j], starts[j + 1]):
            total += coefs[p, 2]
        grad[j] = total
        squares += np.float64(total) * np.float64(total)
        if starts[j + 1] > starts[j]:
            for k in range(d_in):
                partial[k] += total * W_enc[j, k]
    return squares


@compiled
@no_type_check
def adam_rows(weight, grad, mean, square, first, last, clip, betas, eps, step_size, root, unit, least):
    """torch.optim.Adam on rows `first:last`, the gradient times `clip`; rows back to unit norm where `unit`.

    step_size = lr / (1 - beta1^t), root = sqrt(1 - beta2^t): weight -= step_size * mean / (sqrt(square) / root + eps).
    `betas` are beta1, 1 - beta1, beta2, 1 - beta2, each rounded on its own: 1 - float32(0.999) is off by 1e-5.
    """
    beta1, rest1, beta2, rest2 = betas
    for j in range(first, last):
        total = np.float32(0.0)
        for k in range(weight.shape[1]):
            g = grad[j, k] * clip
            m = beta1 * mean[j, k] + rest1 * g
            v = beta2 * square[j, k] + rest2 * g * g
            mean[j, k] = m
            square[j, k] = v
            value = weight[j, k] - step_size * m / (np.sqrt(v) / root + eps)
            weight[j, k] = value
            total += value * value
        if unit:
            norm = max(np.sqrt(total), least)
            for k in range(weight.shape[1]):
                weight[j, k] /= norm
