"""What the sparse kernel does for each architecture between the encoder product and the weight gradients.

A plan is a function `(sae, objective, space, threads, memory) -> terms`: it fills the space's entries, their gradients
and counts, and returns the terms of the loss by name with their weights. It may stop early and return None, where the
batch is too dense or not finite (the space says which). `memory` keeps hints from batch to batch; results never depend
on them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mechint.kernels.cpu import choice
from mechint.kernels.cpu.dense_route import gain_of, jump_penalty
from mechint.kernels.cpu.space import Space
from mechint.kernels.threads import Pool
from mechint.sae import Objective
from mechint.sae.architectures.matryoshka_batchtopk import check_widths

Terms = dict[str, tuple[float, float]]  # name: (value, weight)
Plan = Callable[[Any, Objective, Space, Pool, dict[str, float]], Terms | None]

# The cut of a batch is looked for among the entries above this share of the last batch's cut.
HINT = 0.93


def _standard(sae: Any, objective: Objective, space: Space, threads: Pool, memory: dict[str, float]) -> Terms | None:
    n_values = space.batch * space.d_sae
    l1 = objective.sparsity / n_values
    sums = np.zeros(space.n_chunks)

    def chunk(c: int, thread: int) -> None:
        space.decode(c, thread)
        sums[c] = _finish(space, c, l1, sae.saturation)

    if not _find(space, threads):
        return None
    threads.run(chunk, space.n_chunks)
    return {"mse": (_mse(space), 1.0), "l1": (sums.sum() / n_values, objective.sparsity)}


def _topk(sae: Any, objective: Objective, space: Space, threads: Pool, memory: dict[str, float]) -> Terms | None:
    def chunk(c: int, thread: int) -> None:
        space.decode(c, thread)
        _finish(space, c)

    if not _find(space, threads, k=sae.k):
        return None
    threads.run(chunk, space.n_chunks)
    return {"mse": (_mse(space), 1.0)}


def _batchtopk(sae: Any, objective: Objective, space: Space, threads: Pool, memory: dict[str, float]) -> Terms | None:
    if not _select_batch(sae, space, threads, memory):
        return None

    def chunk(c: int, thread: int) -> None:
        space.decode(c, thread)
        _finish(space, c)

    threads.run(chunk, space.n_chunks)
    return {"mse": (_mse(space), 1.0)}


def _matryoshka(sae: Any, objective: Objective, space: Space, threads: Pool, memory: dict[str, float]) -> Terms | None:
    if not _select_batch(sae, space, threads, memory):
        return None
    widths = np.array(widths_of(sae, objective), np.int64)

    def chunk(c: int, thread: int) -> None:
        space.decode_nested(c, widths)
        _finish(space, c)

    threads.run(chunk, space.n_chunks)
    n = len(widths)
    errors = space.squares.sum(axis=0) / (space.batch * space.d_in)
    terms: Terms = {"mse": (errors[-1], 1 / n)}
    if n > 1:
        terms["prefix_mse"] = (errors[:-1].mean(), (n - 1) / n)
    return terms


def widths_of(sae: Any, objective: Objective) -> tuple[int, ...]:
    """The nested prefixes of this step; the whole dictionary alone where an architecture has none."""
    widths = getattr(sae, "widths", None)
    return (sae.d_sae,) if widths is None else check_widths(objective.widths or widths, sae.d_sae)


def _select_batch(sae: Any, space: Space, threads: Pool, memory: dict[str, float]) -> bool:
    """Entries of the batch's k * batch largest; sets the SAE's `last_cut`. False where it could not be done."""
    n_kept = sae.n_kept(space.batch)
    hint = memory.get("cut", 0.0) * HINT
    for _ in range(8):
        if not hint:
            hint = _sampled_cut(space, n_kept)
        n_found = _collect(space, threads, hint)
        if not space.finite:
            return False
        if space.too_dense and hint < (again := _sampled_cut(space, n_kept)):
            hint = again
        elif space.too_dense:
            return False
        elif n_found >= n_kept or hint == 0:
            break
        else:
            hint = hint / 2 if hint > 1e-3 * memory.get("cut", 0.0) else 0.0
        space.too_dense = False
    cut, equal = _cut_of(space, threads, n_kept)
    remaining = np.zeros(space.n_chunks, np.int64)
    for c in range(space.n_chunks):  # between equal entries the first rows win
        base, n = space.span(c)[0], space.n_entries[c]
        here = int((space.pre[base : base + n] == cut).sum()) if equal else 0
        remaining[c] = min(here, equal)
        equal -= remaining[c]

    def keep(c: int, thread: int) -> None:
        entries = (space.span(c)[0], np.float32(cut), remaining[c], space.cols, space.pre, space.ends)
        space.n_entries[c] = choice.keep_from(*space.rows(c), *entries)

    threads.run(keep, space.n_chunks)
    kept = [space.pre[space.span(c)[0] :][: space.n_entries[c]] for c in range(space.n_chunks)]
    smallest = min((float(part.min()) for part in kept if len(part)), default=0.0)
    memory["cut"] = smallest
    sae.last_cut = torch.tensor(smallest) if smallest > 0 else None
    return True


def _collect(space: Space, threads: Pool, hint: float) -> int:
    """Entries above `hint`."""
    space.set_bound(hint)
    return int(space.n_entries.sum()) if _find(space, threads) else 0


def _find(space: Space, threads: Pool, k: int = 0) -> bool:
    """Entries of all chunks, as `Space.find` has them. False where it could not be done.

    Before any of them is decoded: the rows of W_dec stay in the cache then, which the encoder's weights would take.
    """

    def chunk(c: int, thread: int) -> None:
        if _going(space) and space.encode(c, thread):
            space.find(c, thread, k)

    threads.run(chunk, space.n_chunks)
    return _going(space)


def _sampled_cut(space: Space, n_kept: int) -> float:
    """A little below the cut of the first chunk."""
    if not space.encode(0, 0):
        return 0.0
    n = space.rows(0)[1]
    pre = space.out[0][:n].float() + torch.from_numpy(space.b_enc)
    share = n_kept / (space.batch * space.d_sae)
    rank = max(1, int((1 - min(1.0, 1.3 * share)) * pre.numel()))
    return max(float(pre.flatten().kthvalue(rank).values), 0.0)


def _cut_of(space: Space, threads: Pool, n_kept: int) -> tuple[float, int]:
    """The `n_kept`-th largest entry, and how many equal to it stay; (0, 0) where fewer are positive."""
    n_found = int(space.n_entries.sum())
    if n_found <= n_kept:
        return 0.0, 0
    bins = np.zeros((space.n_chunks, 2**15), np.int32)

    def count(c: int, thread: int) -> None:
        choice.histogram(space.span(c)[0], space.n_entries[c], space.pre, bins[c])

    threads.run(count, space.n_chunks)
    above = np.cumsum(bins.sum(axis=0)[::-1])  # entries in the highest bins
    which = int(np.searchsorted(above, n_kept))
    before = int(above[which - 1]) if which else 0
    which = 2**15 - 1 - which
    found = []
    for c in range(space.n_chunks):
        part = np.empty(bins[c, which], np.float32)
        choice.collect_bin(space.span(c)[0], space.n_entries[c], space.pre, which, part)
        found.append(part)
    values = np.sort(np.concatenate(found))[::-1]
    cut = values[n_kept - before - 1]
    return float(cut), n_kept - before - int((values > cut).sum())


def _jumprelu(sae: Any, objective: Objective, space: Space, threads: Pool, memory: dict[str, float]) -> Terms | None:
    threshold = sae.threshold.detach().numpy()
    half = np.float32(sae.bandwidth / 2)
    space.separate_acts()
    active, penalties = np.zeros(space.n_chunks, np.int64), np.zeros(space.n_chunks)

    # The weight of a step depends on the whole batch where the penalty aims at an L0; else a chunk is finished at once.
    at_once = sae.target_l0 is None
    _, step, tanh = jump_penalty(sae, objective, 0, space.batch)

    def chunk(c: int, thread: int) -> None:
        base, n = space.span(c)[0], space.n_entries[c]
        active[c] = choice.jump(base, n, space.cols, space.pre, threshold, space.acts)
        space.decode(c, thread)
        if at_once:
            finish(c, thread)

    def finish(c: int, thread: int) -> None:
        entries = (*space.rows(c), space.span(c)[0], space.cols, space.pre, space.acts, space.ends, space.grad)
        shape = (threshold, np.float32(sae.bandwidth), step, sae.ste_to_input, tanh, np.float32(sae.tanh_scale))
        by_latent = (space.counts[c], space.fired_of[c], space.own[c])
        penalties[c], space.n_entries[c] = choice.finish_jump(*entries, *shape, *by_latent)

    space.set_bound(threshold - half - np.float32(1e-6) * (np.abs(threshold) + half))
    if not _find(space, threads):
        return None
    threads.run(chunk, space.n_chunks)
    penalty, step, _ = jump_penalty(sae, objective, int(active.sum()), space.batch)
    if not at_once:
        threads.run(finish, space.n_chunks)
    if sae.penalty == "tanh":
        penalty = penalties.sum() / space.batch
    return {"mse": (_mse(space), 1.0), "l0_penalty": (penalty / space.d_in, objective.sparsity)}


def _gated(sae: Any, objective: Objective, space: Space, threads: Pool, memory: dict[str, float]) -> Terms | None:
    b_gate, b_mag = sae.b_gate.detach().numpy(), sae.b_mag.detach().numpy()
    gain = gain_of(sae)
    n_values = space.batch * space.d_sae
    l1 = np.float32(objective.sparsity / n_values)
    space.separate_acts(by_gate=True)
    gates, errors = np.zeros(space.n_chunks), np.zeros(space.n_chunks)

    def chunk(c: int, thread: int) -> None:
        base, n = space.span(c)[0], space.n_entries[c]
        choice.gate(base, n, space.cols, space.pre, b_gate, gain, b_mag, space.acts)
        errors[c] = space.decode_gate(c, thread)
        entries = (base, n, space.cols, space.pre, space.acts, space.grad, space.by_gate)
        by_latent = (space.counts[c], space.fired_of[c], space.own[c], space.moment[c])
        gates[c] = choice.finish_gate(*entries, gain, l1, *by_latent)

    if not _find(space, threads):
        return None
    threads.run(chunk, space.n_chunks)
    return {
        "mse": (_mse(space), 1.0),
        "l1": (gates.sum() / n_values, objective.sparsity),
        "gate_mse": (errors.sum() / (space.batch * space.d_in), 1.0),
    }


def _going(space: Space) -> bool:
    return space.finite and not space.too_dense


def _finish(space: Space, c: int, l1: float = 0.0, saturation: float = 0.0) -> float:
    base, n = space.span(c)[0], space.n_entries[c]
    penalty = (np.float32(l1), np.float32(saturation))
    return choice.finish_relu(base, n, space.cols, space.acts, space.grad, *penalty, space.counts[c])


def _mse(space: Space) -> float:
    return space.squares.sum() / (space.batch * space.d_in)


PLANS: dict[str, Plan] = {
    "standard": _standard,
    "topk": _topk,
    "batchtopk": _batchtopk,
    "matryoshka_batchtopk": _matryoshka,
    "jumprelu": _jumprelu,
    "gated": _gated,
}
