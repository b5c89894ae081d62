"""Triton kernels: what follows a product of the dense step in one pass, and steps over codes that are mostly zero.

For the latter only listed entries are touched. Nothing is added atomically anywhere.

A code [batch, d_sae] is given twice, as lists of entries by row and by latent. List i starts at `starts[i]` and has
`counts[i]` entries. What an entry holds (its pre-activation, its gradient) lies at its *slot*, which both lists name:
either the place in the list by rows (codes of known size: TopK), or the place in a dense [batch, d_sae] buffer of which
only listed places are touched (ReLU and JumpReLU, whose size is known to the device alone).

Each sum is computed by one program in the order of its list, so a rerun gives the same bits.
TRITON_INTERPRET=1 runs all of this on a CPU, without compiling (tests/test_kernels_cuda.py).
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def list_rows(pre, threshold, half_band, latents, counts, n_active, M, JUMP: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row: the latents of its entries, in order, from `latents[row * M]` on.

    ReLU lists pre > 0. JumpReLU (`JUMP`) lists what is above its threshold or within half a bandwidth of it, where the
    threshold learns; `n_active` counts what is above.
    """
    row = tl.program_id(0).to(tl.int64)
    listed_before = 0
    active_before = 0
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        there = j < M
        value = tl.load(pre + row * M + j, mask=there, other=0.0)
        if JUMP:
            bound = tl.load(threshold + j, mask=there, other=0.0)
            active = (value > bound) & there
            listed = active | ((tl.abs(value - bound) < half_band) & there)
        else:
            active = value > 0
            listed = active
        place = listed_before + tl.cumsum(listed.to(tl.int32), axis=0) - 1
        tl.store(latents + row * M + place, j, mask=listed)
        listed_before += tl.sum(listed.to(tl.int32), axis=0)
        active_before += tl.sum(active.to(tl.int32), axis=0)
    tl.store(counts + row, listed_before)
    tl.store(n_active + row, active_before)


@triton.jit
def list_latents(
    pre, threshold, half_band, rows, counts, B, M, JUMP: tl.constexpr, ROWS: tl.constexpr, LATENTS: tl.constexpr
):
    """One program a block of latents: the rows of each one's entries, in order, from `rows[latent * B]` on."""
    j = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    listed_before = tl.zeros([LATENTS], dtype=tl.int32)
    bound = tl.load(threshold + j, mask=j < M, other=0.0) if JUMP else tl.zeros([LATENTS], dtype=tl.float32)
    for start in range(0, B, ROWS):
        b = start + tl.arange(0, ROWS)
        there = (b < B)[:, None] & (j < M)[None, :]
        value = tl.load(pre + b[:, None].to(tl.int64) * M + j[None, :], mask=there, other=0.0)
        listed = (value > bound[None, :]) & there
        if JUMP:
            listed = listed | ((tl.abs(value - bound[None, :]) < half_band) & there)
        place = listed_before[None, :] + tl.cumsum(listed.to(tl.int32), axis=0) - 1
        tl.store(rows + j[None, :].to(tl.int64) * B + place, tl.broadcast_to(b[:, None], [ROWS, LATENTS]), mask=listed)
        listed_before += tl.sum(listed.to(tl.int32), axis=0)
    tl.store(counts + j, listed_before, mask=j < M)


@triton.jit
def reconstruct(
    x, W_dec, b_dec, pre, threshold, starts, counts, latents, error, d_acts, code_sums, scale, saturation, M, D,
    JUMP: tl.constexpr, DENSE_SLOTS: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a row: error = acts @ W_dec + b_dec - x, and d_acts = (scale * error) @ W_dec.T at its entries.

    The row of `error` never leaves the registers between the two, and the second reading of W_dec's rows finds them in
    the cache. `code_sums` is the sum of the row's acts / (1 + saturation acts).
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    within = d < D
    start = tl.load(starts + row)
    count = tl.load(counts + row)
    total = tl.load(b_dec + d, mask=within, other=0.0)
    code_sum = 0.0
    for i in range(0, count, ENTRIES):
        e = i + tl.arange(0, ENTRIES)
        there = e < count
        j = tl.load(latents + start + e, mask=there, other=0).to(tl.int64)
        slot = row * M + j if DENSE_SLOTS else start + e
        value = tl.load(pre + slot, mask=there, other=0.0)
        bound = tl.load(threshold + j, mask=there, other=0.0) if JUMP else tl.zeros([ENTRIES], dtype=tl.float32)
        acts = tl.where(value > bound, value, 0.0)
        w = tl.load(W_dec + j[:, None] * D + d[None, :], mask=there[:, None] & within[None, :], other=0.0)
        total += tl.sum(acts[:, None] * w, axis=0)
        code_sum += tl.sum(acts / (1 + saturation * acts), axis=0)
    total -= tl.load(x + row * D + d, mask=within, other=0.0)
    tl.store(error + row * D + d, total, mask=within)
    tl.store(code_sums + row, code_sum)
    gradient = total * scale
    for i in range(0, count, ENTRIES):
        e = i + tl.arange(0, ENTRIES)
        there = e < count
        j = tl.load(latents + start + e, mask=there, other=0).to(tl.int64)
        slot = row * M + j if DENSE_SLOTS else start + e
        w = tl.load(W_dec + j[:, None] * D + d[None, :], mask=there[:, None] & within[None, :], other=0.0)
        tl.store(d_acts + slot, tl.sum(w * gradient[None, :], axis=1), mask=there)


@triton.jit
def latent_gradients(
    x, b_dec, error, pre, d_acts, threshold, starts, counts, rows, slots, shift, to_step,
    grad_dec, grad_enc, grad_bias, grad_threshold, fire_counts, scale, bandwidth, saturation, M, D,
    JUMP: tl.constexpr, STE_TO_INPUT: tl.constexpr, DENSE_SLOTS: tl.constexpr,
    ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a latent: its row of W_dec.grad and column of W_enc.grad, its bias' and threshold's gradient, and
    how often it fired. `shift / (1 + saturation acts)^2` is the penalty's gradient to an active entry, `to_step` that
    to a step (JumpReLU)."""
    latent = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    within = d < D
    start = tl.load(starts + latent)
    count = tl.load(counts + latent)
    lift = tl.load(shift)
    centre = tl.load(b_dec + d, mask=within, other=0.0)
    bound = tl.load(threshold + latent) if JUMP else 0.0
    step_gradient = tl.load(to_step) if JUMP else 0.0
    to_decoder = tl.zeros([BLOCK_D], dtype=tl.float32)
    to_encoder = tl.zeros([BLOCK_D], dtype=tl.float32)
    to_bias = 0.0
    to_threshold = 0.0
    fired = 0
    for i in range(0, count, ENTRIES):
        e = i + tl.arange(0, ENTRIES)
        there = e < count
        b = tl.load(rows + start + e, mask=there, other=0).to(tl.int64)
        slot = b * M + latent if DENSE_SLOTS else tl.load(slots + start + e, mask=there, other=0)
        value = tl.load(pre + slot, mask=there, other=0.0)
        active = (value > bound) & there
        acts = tl.where(active, value, 0.0)
        d_act = tl.load(d_acts + slot, mask=there, other=0.0)
        bend = 1 + saturation * acts
        d_pre = tl.where(active, d_act + lift / (bend * bend), 0.0)
        if JUMP:
            inside = (tl.abs(value - bound) < bandwidth / 2) & there
            to_threshold -= tl.sum(tl.where(inside, (bound * d_act + step_gradient) / bandwidth, 0.0), axis=0)
            if STE_TO_INPUT:
                d_pre += tl.where(inside, step_gradient / bandwidth, 0.0)
        tile = there[:, None] & within[None, :]
        place = b[:, None] * D + d[None, :]
        to_decoder += tl.sum(acts[:, None] * (tl.load(error + place, mask=tile, other=0.0) * scale), axis=0)
        centred = tl.load(x + place, mask=tile, other=0.0) - centre[None, :]
        to_encoder += tl.sum(d_pre[:, None] * centred, axis=0)
        to_bias += tl.sum(d_pre, axis=0)
        fired += tl.sum(active.to(tl.int32), axis=0)
    tl.store(grad_dec + latent * D + d, to_decoder, mask=within)
    tl.store(grad_enc + latent * D + d, to_encoder, mask=within)
    tl.store(grad_bias + latent, to_bias)
    tl.store(fire_counts + latent, fired)
    if JUMP:
        tl.store(grad_threshold + latent, to_threshold)


@triton.jit
def relu_columns(
    pre, bias, code, counts, sums, saturation, B, M, SHARE: tl.constexpr, ROWS: tl.constexpr, LATENTS: tl.constexpr
):
    """code = ReLU(pre + bias), rounded to the type of `code`, which may be `pre` itself; and of each latent how often
    it fired and the sum of acts / (1 + saturation acts), in parts of `SHARE` rows: program (block of latents, part)."""
    j = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    part = tl.program_id(1)
    offset = tl.load(bias + j, mask=j < M, other=0.0)
    count = tl.zeros([LATENTS], dtype=tl.int32)
    total = tl.zeros([LATENTS], dtype=tl.float32)
    for start in range(0, SHARE, ROWS):
        b = part * SHARE + start + tl.arange(0, ROWS)
        there = (b < B)[:, None] & (j < M)[None, :]
        place = b[:, None].to(tl.int64) * M + j[None, :]
        value = tl.load(pre + place, mask=there, other=0.0) + offset[None, :]
        # a comparison with NaN is false: written so that NaN stays
        acts = tl.where(there & ~(value <= 0), value, 0.0)
        tl.store(code + place, acts.to(code.dtype.element_ty), mask=there)
        count += tl.sum((acts > 0).to(tl.int32), axis=0)
        total += tl.sum(acts / (1 + saturation * acts), axis=0)
    tl.store(counts + part * M + j, count, mask=j < M)
    tl.store(sums + part * M + j, total, mask=j < M)


@triton.jit
def mask_columns(
    d_acts, code, shift, d_pre, sums, saturation, B, M, SHARE: tl.constexpr, ROWS: tl.constexpr, LATENTS: tl.constexpr
):
    """d_pre = d_acts + shift / (1 + saturation code)^2 where the code is positive, else 0; and each latent's sum.
    `d_pre` may be `d_acts`."""
    j = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    part = tl.program_id(1)
    lift = tl.load(shift)
    total = tl.zeros([LATENTS], dtype=tl.float32)
    for start in range(0, SHARE, ROWS):
        b = part * SHARE + start + tl.arange(0, ROWS)
        there = (b < B)[:, None] & (j < M)[None, :]
        place = b[:, None].to(tl.int64) * M + j[None, :]
        acts = tl.load(code + place, mask=there, other=0.0).to(tl.float32)
        bend = 1 + saturation * acts
        gradient = tl.load(d_acts + place, mask=there, other=0.0) + lift / (bend * bend)
        gradient = tl.where(acts > 0, gradient, 0.0)
        tl.store(d_pre + place, gradient.to(d_pre.dtype.element_ty), mask=there)
        total += tl.sum(gradient, axis=0)
    tl.store(sums + part * M + j, total, mask=j < M)


@triton.jit
def adam_rows(
    weight, gradient, mean, square, scalars, go, keep1, add1, keep2, add2, eps, D, TOTAL,
    UNIT: tl.constexpr, MIN_NORM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a row: Adam, and with `UNIT` the row's division by its norm while it is at hand. Nothing where `go`
    is 0 (else 1). `scalars`: lr / (1 - beta1^t), sqrt(1 - beta2^t), and what clipping divides gradients by.

    Kingma and Ba 2015, "Adam", in the order of operations of torch's fused Adam (eps after the bias correction).
    """
    d = tl.arange(0, BLOCK_D)
    place = tl.program_id(0).to(tl.int64) * D + d
    moves = (d < D * tl.load(go)) & (place < TOTAL)
    rate = tl.load(scalars)
    correction = tl.load(scalars + 1)
    g = tl.load(gradient + place, mask=moves, other=0.0) / tl.load(scalars + 2)
    m = tl.load(mean + place, mask=moves, other=0.0) * keep1 + g * add1
    v = tl.load(square + place, mask=moves, other=0.0) * keep2 + g * g * add2
    tl.store(mean + place, m, mask=moves)
    tl.store(square + place, v, mask=moves)
    w = tl.load(weight + place, mask=moves, other=0.0) - rate * m / (tl.sqrt(v) / correction + eps)
    if UNIT:
        w = tl.where(moves, w, 0.0)
        w = w / tl.maximum(tl.sqrt(tl.sum(w * w, axis=0)), MIN_NORM)
    tl.store(weight + place, w, mask=moves)
