"""Compiled loops of the sparse kernel that differ by architecture: which entries stay, and their gradients."""

from typing import no_type_check

import numpy as np

from mechint.kernels.sparse_loops import BFLOAT16_STEP, candidates, centred, compiled, dots
from mechint.kernels.sparse_vector import LANES, add_rows_64, from_bfloat16


@compiled
@no_type_check
def _reached_by(values, n, k, low, high, halvings):
    """A number that at least k of `values[:n]` reach, as at least k do `low` and fewer `high`: within so many halvings
    of their distance of the k-th largest, and between it and the next if that comes sooner."""
    half = np.float32(0.5)
    for _ in range(halvings):
        middle = half * low + half * high
        if not low < middle < high:  # neighbours
            break
        reached = np.int32(0)
        for e in range(n):
            reached += values[e] >= middle
        if reached >= k:
            low = middle
            if reached == k:
                break
        else:
            high = middle
    return low


@compiled
@no_type_check
def kth_largest(values, n, k):
    """The k-th largest of `values[:n]`, finite and k <= n. By halving their range: passes without a branch take less
    time than a selection, of whose branches every other is guessed wrong."""
    low, high = np.float32(np.inf), np.float32(-np.inf)
    for e in range(n):
        low, high = min(low, values[e]), max(high, values[e])
    highest = np.int32(0)
    for e in range(n):
        highest += values[e] >= high
    if highest >= k:
        return high
    low = _reached_by(values, n, k, low, high, 1000)
    least = high
    for e in range(n):
        least = min(least, values[e] if values[e] >= low else high)
    return least


@compiled
@no_type_check
def _floor_of_top(line, narrow, b_enc, norms, error, k, groups):
    """A number that at least k pre-activations of the row reach: the k-th largest of the maxima of disjoint groups of
    lower bounds, to within a few halvings of their range."""
    n_latents, n_groups = b_enc.shape[0], groups.shape[0]
    small = np.float32(1e-6)
    for g in range(n_groups):
        groups[g] = -np.inf
    start = 0
    while start < n_latents:
        n = min(n_groups, n_latents - start)
        if narrow:
            for g in range(n):
                value = from_bfloat16(line[start + g])
                bias = b_enc[start + g]
                low = value - BFLOAT16_STEP * abs(value) + bias - small * abs(bias) - error * norms[start + g]
                groups[g] = max(groups[g], low)
        else:
            for g in range(n):
                value, bias = np.float32(line[start + g]), b_enc[start + g]
                low = value + bias - small * (abs(value) + abs(bias))
                groups[g] = max(groups[g], low)
        start += n_groups
    low, high = np.float32(np.inf), np.float32(-np.inf)
    for g in range(n_groups):
        low, high = min(low, groups[g]), max(high, groups[g])
    if not (np.isfinite(low) and np.isfinite(high)):
        return np.float32(-np.inf)
    low = _reached_by(groups, n_groups, k, low, high, 12)
    return low - small * abs(low)


@compiled
@no_type_check
def _narrow_to_top(line, narrow, b_enc, norms, error, k, cut, cols, start, stop, lower, upper):
    """Of candidates above `cut`, those that may be among the k largest; -1 where some may lie below `cut`."""
    n = stop - start
    if n < k:
        return -1
    small = np.float32(1e-6)
    relative = BFLOAT16_STEP if narrow else small
    reached, high = np.int32(0), cut
    for e in range(n):
        j = cols[start + e]
        value = from_bfloat16(line[j]) if narrow else np.float32(line[j])
        bias = b_enc[j]
        slack = relative * abs(value) + small * abs(bias) + error * norms[j]
        lower[e] = value + bias - slack
        upper[e] = value + bias + slack
    for e in range(n):
        reached += lower[e] >= cut
        high = max(high, lower[e])
    if reached < k:
        return -1
    floor = _reached_by(lower, n, k, cut, high, 12)
    position = start
    for e in range(n):
        cols[position] = cols[start + e]
        position += not upper[e] < floor
    return position


@compiled
@no_type_check
def find_top(values, narrow, first, last, slices, W_enc, b_enc, biases, norms, errors, k, base, limit, cols, pre, ends):
    """The positive ones among each row's k largest pre-activations; between equal ones the lower columns stay.

    As `find_above`, with a bound per row that at least k entries reach.
    """
    n_latents = b_enc.shape[0]
    row = np.empty(W_enc.shape[1], np.float32)
    groups = np.empty(min(n_latents, max(256, 4 * k)), np.float32)
    lower, upper = np.empty(n_latents, np.float32), np.empty(n_latents, np.float32)
    position = base
    # rows are alike: the k-th largest of those before says where to look in the next, which is then checked
    typical, spread = np.float32(np.nan), np.float32(0.0)
    for r in range(first, last):
        if position + n_latents + LANES > limit:
            return -1
        line = values[r - first]
        start, stop = position, -1
        if np.isfinite(typical):
            cut = np.float32(typical - np.float32(3.0) * spread)
            stop = candidates(line, narrow, biases, norms, errors[r], cut, cols, start)
            stop = _narrow_to_top(line, narrow, b_enc, norms, errors[r], k, cut, cols, start, stop, lower, upper)
        if stop < 0:
            cut = _floor_of_top(line, narrow, b_enc, norms, errors[r], k, groups)
            stop = candidates(line, narrow, biases, norms, errors[r], cut, cols, start)
        if narrow:
            centred(slices, r, row)
            dots(row, W_enc, cols, pre, start, stop)
        else:
            for e in range(start, stop):
                pre[e] = line[cols[e]]
        n = stop - start
        for e in range(n):
            pre[start + e] += b_enc[cols[start + e]]
            lower[e] = pre[start + e]
        least = kth_largest(lower, n, k) if n >= k else np.float32(-np.inf)
        if not np.isfinite(typical):
            typical, spread = least, np.float32(0.1) * abs(least)
        elif np.isfinite(least):
            spread += np.float32(0.1) * (abs(least - typical) - spread)
            typical += np.float32(0.1) * (least - typical)
        equal = k
        for e in range(n):
            equal -= lower[e] > least
        for e in range(start, stop):
            value, j = pre[e], cols[e]
            stays = value > least
            if value == least and equal > 0:
                stays = True
                equal -= 1
            cols[position] = j
            pre[position] = value
            position += stays and value > 0
        ends[r] = position
    return position - base


@compiled
@no_type_check
def histogram(base, n, pre, bins):
    """Counts of positive entries by the upper 16 bits of their float32, which order them."""
    bins[:] = 0
    bits = pre.view(np.int32)
    for e in range(base, base + n):
        bins[bits[e] >> 16] += 1


@compiled
@no_type_check
def collect_bin(base, n, pre, which, out):
    """Entries that fall into one bin of `histogram`."""
    bits = pre.view(np.int32)
    found = 0
    for e in range(base, base + n):
        if bits[e] >> 16 == which:
            out[found] = pre[e]
            found += 1
    return found


@compiled
@no_type_check
def keep_from(first, last, base, cut, equal, cols, pre, ends):
    """Keep the entries above `cut` and the first `equal` of those equal to it. Returns how many stayed."""
    position = base
    start = base
    for r in range(first, last):
        stop = ends[r]
        for e in range(start, stop):
            value, j = pre[e], cols[e]
            stays = value > cut
            if value == cut and equal > 0:
                stays = True
                equal -= 1
            cols[position] = j
            pre[position] = value
            position += stays
        start = stop
        ends[r] = position
    return position - base


@compiled
@no_type_check
def finish_relu(base, n, cols, acts, grad, l1, saturation, counts):
    """d loss / d pre of ReLU latents with a penalty f / (1 + saturation f) of weight `l1` an entry; counts per latent;
    sum of the penalties."""
    counts[:] = 0
    total = 0.0
    for e in range(base, base + n):
        counts[cols[e]] += 1
        share = np.float32(1.0) / (np.float32(1.0) + saturation * acts[e])
        grad[e] += l1 * share * share
        total += acts[e] * share
    return total


@compiled
@no_type_check
def jump(base, n, cols, pre, threshold, acts):
    """feature_acts of JumpReLU: pre above its threshold, else 0. Returns how many are above."""
    above = 0
    for e in range(base, base + n):
        over = pre[e] > threshold[cols[e]]
        acts[e] = pre[e] if over else np.float32(0.0)
        above += over
    return above


@compiled
@no_type_check
def finish_jump(base, n, cols, pre, acts, grad, other, threshold, bandwidth, step, to_input, tanh, tanh_scale, counts):
    """Gradients of JumpReLU entries: of pre into `grad`, of the threshold into `other` (rectangle of that bandwidth).

    `step` and `tanh` are the weights of an active entry in the loss. Returns the sum of the tanh penalties.
    """
    counts[:] = 0
    half = np.float32(bandwidth / 2)
    total = 0.0
    for e in range(base, base + n):
        j = cols[e]
        counts[j] += 1
        level = threshold[j]
        inside = abs(pre[e] - level) < half
        over = pre[e] > level
        if tanh != 0:
            squashed = np.tanh(tanh_scale * acts[e])
            total += squashed
            grad[e] += tanh * tanh_scale * (np.float32(1.0) - squashed * squashed)
        to_threshold = np.float32(0.0)
        if inside:
            to_threshold = -(level / bandwidth) * grad[e] - step / bandwidth
        other[e] = to_threshold
        value = grad[e] if over else np.float32(0.0)
        if to_input and inside:
            value += step / bandwidth
        grad[e] = value
    return total


@compiled
@no_type_check
def gate(base, n, cols, pre, b_gate, gain, b_mag, acts):
    """feature_acts of a gated SAE where the gate `pre` is open. Returns how many are above 0."""
    above = 0
    for e in range(base, base + n):
        j = cols[e]
        value = (pre[e] - b_gate[j]) * gain[j] + b_mag[j]
        acts[e] = max(value, np.float32(0.0))
        above += value > 0
    return above


@compiled
@no_type_check
def finish_gate(base, n, cols, pre, acts, grad, by_gate, other, gain, l1, counts):
    """Gradients of gated entries: of u = (x - b_dec) @ W_enc into `grad`, of mag into `other`. Sum of the gates."""
    counts[:] = 0
    total = 0.0
    for e in range(base, base + n):
        j = cols[e]
        counts[j] += 1
        total += pre[e]
        mag = grad[e] if acts[e] > 0 else np.float32(0.0)
        other[e] = mag
        grad[e] = by_gate[e] + l1 + mag * gain[j]
    return total


@compiled
@no_type_check
def finish_latents(first, last, starts, coefs, counts, other, moment):
    """Per latent: how often above 0, the sum of the last coefficient, and that times feature_acts."""
    for j in range(first, last):
        fired, total, product = np.int64(0), np.float32(0.0), np.float32(0.0)
        for p in range(starts[j], starts[j + 1]):
            fired += coefs[p, 1] > 0
            total += coefs[p, 3]
            product += coefs[p, 3] * coefs[p, 1]
        counts[j] = fired
        other[j] = total
        moment[j] = product


@compiled
@no_type_check
def decode_nested(x, b_dec, W_dec, first, last, base, cols, acts, ends, widths, slices, grad, squares):
    """As `decode_rows` for nested prefixes `widths`: `squares[i]` is the sum of squared errors of prefix i, `slices[i]`
    the gradient that its latents see, summed over the prefixes that contain them."""
    d_in, width, n_prefixes = x.shape[1], W_dec.shape[1], widths.shape[0]
    scale = np.float32(2.0 / (np.float64(x.shape[0]) * d_in * n_prefixes))
    errors = np.zeros((n_prefixes, width), np.float32)
    limits = np.empty(n_prefixes + 1, np.int64)
    W_at, bytes_a_row, cols_at, acts_at = W_dec.ctypes.data, 4 * width, cols.ctypes.data, acts.ctypes.data
    squares[:] = 0.0
    start = base
    for r in range(first, last):
        stop = ends[r]
        e = start
        limits[0] = start
        for i in range(n_prefixes):
            if i == 0:
                for k in range(d_in):
                    errors[0, k] = b_dec[k] - x[r, k]
            else:
                for k in range(width):
                    errors[i, k] = errors[i - 1, k]
            while e < stop and cols[e] < widths[i]:
                e += 1
            limits[i + 1] = e
            at, n = limits[i], e - limits[i]
            if n > 0:
                for k in range(0, width, 64):
                    add_rows_64(
                        errors.ctypes.data + i * bytes_a_row + 4 * k,
                        W_at + 4 * k,
                        bytes_a_row,
                        cols_at + 4 * at,
                        acts_at + 4 * at,
                        n,
                    )
            total = np.float32(0.0)
            for k in range(width):
                total += errors[i, k] * errors[i, k]
            squares[i] += total
        for i in range(n_prefixes - 1, -1, -1):
            for k in range(width):
                errors[i, k] *= scale
                if i + 1 < n_prefixes:
                    errors[i, k] += errors[i + 1, k]
            dots(errors[i], W_dec, cols, grad, limits[i], limits[i + 1])
            for s in range(slices.shape[1]):
                for k in range(64):
                    slices[i, s, r, k] = errors[i, 64 * s + k]
        start = stop
