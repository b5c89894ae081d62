"""Compiled loops of the sparse kernel that differ by architecture: which entries stay, and their gradients."""

from typing import no_type_check

import numpy as np

from mechint.kernels.cpu.loops import (
    BFLOAT16_STEP,
    add_rows,
    candidates,
    centred,
    compiled,
    dots,
    minus_row,
    scaled,
)
from mechint.kernels.cpu.vector import LANES, from_bfloat16, settle, stream_64


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
def finish_jump(
    first,
    last,
    base,
    cols,
    pre,
    acts,
    ends,
    grad,
    threshold,
    bandwidth,
    step,
    to_input,
    tanh,
    tanh_scale,
    counts,
    fired,
    own,
):
    """Gradients of pre of JumpReLU entries into `grad`; of the thresholds, summed by latent, into `own` (rectangle of
    that bandwidth). Entries that no other gradient needs are dropped.

    `step` and `tanh` are the weights of an active entry in the loss. Returns the sum of the tanh penalties, and how
    many entries stayed.
    """
    counts[:] = 0
    fired[:] = 0
    own[:] = 0
    half, per_width = np.float32(bandwidth / 2), np.float32(1.0) / bandwidth
    total = 0.0
    position = start = base
    for r in range(first, last):
        stop = ends[r]
        for e in range(start, stop):
            j, value, act = cols[e], grad[e], acts[e]
            level = threshold[j]
            inside = abs(pre[e] - level) < half
            over = pre[e] > level
            if tanh != 0:
                squashed = np.tanh(tanh_scale * act)
                total += squashed
                value += tanh * tanh_scale * (np.float32(1.0) - squashed * squashed)
            # without branches, which nothing could foresee
            own[j] -= np.float32(inside) * ((level * value + step) * per_width)
            pushed = inside and to_input
            stays = over or pushed
            cols[position] = j
            acts[position] = act
            grad[position] = np.float32(over) * value + np.float32(pushed) * (step * per_width)
            counts[j] += stays
            fired[j] += over
            position += stays
        start = stop
        ends[r] = position
    return total, position - base


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
def finish_gate(base, n, cols, pre, acts, grad, by_gate, gain, l1, counts, fired, own, moment):
    """Gradients of gated entries: of u = (x - b_dec) @ W_enc into `grad`; of mag, summed by latent, into `own`, and
    times feature_acts into `moment`. Returns the sum of the gates."""
    counts[:] = 0
    fired[:] = 0
    own[:] = 0
    moment[:] = 0
    total = 0.0
    for e in range(base, base + n):
        j = cols[e]
        open_too = acts[e] > 0
        mag = grad[e] if open_too else np.float32(0.0)
        counts[j] += 1
        fired[j] += open_too
        own[j] += mag
        moment[j] += mag * acts[e]
        total += pre[e]
        grad[e] = by_gate[e] + l1 + mag * gain[j]
    return total


@compiled
@no_type_check
def decode_nested(x, b_dec, W_dec, first, last, base, cols, acts, ends, widths, slices, grad, squares):
    """As `decode_rows` for nested prefixes `widths`: `squares[i]` is the sum of squared errors of prefix i, `slices[i]`
    the gradient that its latents see, summed over the prefixes that contain them. All prefixes' slices do not fit the
    cache: they are written past it, in a quarter of the time."""
    width, n_prefixes = W_dec.shape[1], widths.shape[0]
    scale = np.float32(2.0 / (np.float64(x.shape[0]) * x.shape[1] * n_prefixes))
    errors, seen = np.empty((n_prefixes, width), np.float32), np.empty(width, np.float32)
    limits = np.empty(n_prefixes + 1, np.int64)
    seen_at, slices_at = seen.ctypes.data, slices.ctypes.data
    squares[:] = 0.0
    start = base
    for r in range(first, last):
        limits[0] = e = start
        minus_row(x, b_dec, r, errors[0])
        for i in range(n_prefixes):
            while e < ends[r] and cols[e] < widths[i]:
                e += 1
            limits[i + 1] = e
            add_rows(errors[i], W_dec, cols, acts, limits[i], e)
            if i + 1 < n_prefixes:
                errors[i + 1] = errors[i]
        seen[:] = np.float32(0.0)
        for i in range(n_prefixes - 1, -1, -1):
            squares[i] += scaled(errors[i], scale)
            for k in range(width):
                seen[k] += errors[i, k]
            for s in range(slices.shape[1]):
                stream_64(seen_at + 256 * s, slices_at + i * slices.strides[0] + s * slices.strides[1] + 256 * r)
            dots(seen, W_dec, cols, grad, limits[i], limits[i + 1])
        start = ends[r]
    settle()
