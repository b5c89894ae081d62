"""Any kernel against the reference: one pass or one step from the same state, as far apart as rounding allows.

Two trainings that run on by themselves drift apart, however alike their steps are: one entry within rounding of its
bound, or one gradient next to 0 whose sign Adam makes into a step of lr, and from there everything differs. When that
happens depends on the processor. So before each step both get the same state, rows with an entry within rounding of a
bound are exchanged for others, and the bounds are derived as the reference runs, in float64 (tests/rounding.py).
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rounding import ROOM, TINY, Rounding, U, gamma
from torch import Tensor

from mechint.kernels import DenseKernel, StepSettings
from mechint.kernels.contract import Kernel, Pass
from mechint.sae import SAE, Objective
from mechint.sae.architectures.batchtopk import CUT_RATE

Bounds = dict[str, tuple[Tensor, Tensor, Tensor]]  # by parameter: of itself and of Adam's two moments


def reference_for(kernel: Any) -> DenseKernel:
    """Over a copy of the kernel's SAE, in float64 on a CPU."""
    sae = copy.deepcopy(kernel.sae).cpu().double()
    return DenseKernel(sae, torch.optim.Adam(sae.parameters()), project_gradient=kernel.project_gradient)


def compare_pass(
    kernel: Kernel, pool: Tensor, rows: int, objective: Objective, larger: Mapping[str, float] | None = None
) -> Pass:
    """Loss, counts and gradients on `rows` of the pool. Returns what the kernel found.

    `larger`: by parameter, how much larger the operands are that the kernel has its gradient from than autograd's.
    """
    reference = reference_for(kernel)
    x, expected, rounding = clear_rows(reference, pool, rows, objective)
    got = kernel.backward(x, objective)
    _compare_results(got, expected, rounding)
    for (name, p), q in zip(kernel.sae.named_parameters(), reference.sae.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        bound = ROOM * rounding.error(q.grad) * (larger or {}).get(name, 1.0)
        _close(p.grad, q.grad, bound, f"gradient of {name}")
    return got


def compare_along(
    reference: DenseKernel, pool_at: Callable[[int], Tensor], rows: int, settings: StepSettings, *kernels: Any
) -> Iterator[int]:
    """200 steps of the reference, `compare_step` at the first eight and then at every tenth; yields those."""
    for step in range(200):
        if step < 8 or step % 10 == 0:
            compare_step(reference, pool_at(step), rows, settings, *kernels)
            yield step
        else:
            reference.step(pool_at(step)[:rows].cpu().double(), settings)


def compare_step(reference: DenseKernel, pool: Tensor, rows: int, settings: StepSettings, *kernels: Any) -> None:
    """A step of each from the reference's state (rounded to float32): results, parameters, buffers and moments.

    Gradients show in the first moments.
    """
    for kernel in kernels:
        take_over(reference, kernel)
    x, expected, rounding = clear_rows(reference, pool, rows, settings.objective)
    bounds, norm_bound = _bounds_of_update(reference, rounding, settings)
    cut = getattr(reference.sae, "last_cut", None)
    norm = reference.update(settings.lr, settings.max_grad_norm)
    for kernel in kernels:
        got = kernel.step(x, settings)
        _compare_results(got, expected, rounding)
        _close(got.grad_norm, norm, norm_bound, "norm of the gradients")
        for (name, p), q in zip(kernel.sae.named_parameters(), reference.sae.parameters(), strict=True):
            state, wanted = kernel.optimizer.state[p], reference.optimizer.state[q]
            assert state.keys() == wanted.keys() and state["step"] == wanted["step"]
            tensors = ((p, q), *((state[key], wanted[key]) for key in ("exp_avg", "exp_avg_sq")))
            for (a, b), bound, what in zip(tensors, bounds[name], ("", "'s mean", "'s mean square"), strict=True):
                _close(a, b, bound, name + what)
        _compare_buffers(kernel.sae, reference.sae, rounding.error(cut))


def _compare_buffers(sae: SAE, reference: SAE, cut_error: Tensor) -> None:
    """Means of the cuts: a part of the newest, which may be rounded, comes in, and the mean itself is float32."""
    found, expected = dict(sae.named_buffers()), dict(reference.named_buffers())
    assert found.keys() == expected.keys() and found.keys() <= {"cut_mean", "cut_weight"}
    for name, value in expected.items():
        error = cut_error + U * value.abs() if name == "cut_mean" else torch.tensor(U)
        _close(found[name], value, ROOM * (CUT_RATE * error + 2 * U * value.abs()), name)


@torch.no_grad()
def take_over(reference: DenseKernel, kernel: Any) -> None:
    """The reference's state into the kernel, in place, and what float32 makes of it back into the reference."""
    for q, p in zip(reference.sae.buffers(), kernel.sae.buffers(), strict=True):
        _copy_both(q, p)
    for q, p in zip(reference.sae.parameters(), kernel.sae.parameters(), strict=True):
        _copy_both(q, p)
        for name, value in reference.optimizer.state[q].items():
            if name == "step":
                kernel.optimizer.state[p][name].fill_(value)
            else:
                _copy_both(value, kernel.optimizer.state[p][name])


def _copy_both(wide: Tensor, narrow: Tensor) -> None:
    narrow.copy_(wide)
    wide.copy_(narrow)


def clear_rows(reference: DenseKernel, pool: Tensor, rows: int, objective: Objective) -> tuple[Tensor, Pass, Rounding]:
    """The first `rows` of the pool on which rounding decides nothing, and the reference's pass over them."""
    if objective.dead is not None:
        objective = replace(objective, dead=objective.dead.cpu())
    x, spare = pool[:rows].clone(), pool[rows:]
    forward = True  # alone, at first: it shows all but what only gradients ask
    while True:
        with Rounding(rows) as rounding, torch.set_grad_enabled(not forward):
            wide, expected = x.cpu().double(), None
            if forward:
                reference.sae.loss(wide, objective)
            else:
                expected = reference.backward(wide, objective)
        if n := int(rounding.unclear.sum()):
            assert n <= len(spare), f"{n} rows more are unclear, and {len(spare)} rows are left"
            x[rounding.unclear.to(x.device)] = spare[:n]
            spare = spare[n:]
        elif expected is not None:
            return x, expected, rounding
        else:
            forward = False


def _compare_results(got: Any, expected: Pass, rounding: Rounding) -> None:
    assert list(got.terms) == list(expected.terms)
    for name, term in expected.terms.items():
        _close(got.terms[name], term, ROOM * rounding.error(term), name)
    assert got.n_active == expected.n_active
    assert got.fire_counts.dtype == expected.fire_counts.dtype
    assert torch.equal(got.fire_counts.cpu(), expected.fire_counts)


def _close(got: Tensor, expected: Tensor, bound: Tensor, name: str) -> None:
    apart = (got.detach().cpu().double() - expected.detach()).abs()
    assert apart.shape == bound.shape and bound.isfinite().all()
    # what the test's own float64 rounds: 2^-50 of the value
    over = apart > bound + 2.0**-50 * expected.detach().abs() + TINY
    assert not over.any(), (
        f"{name}: {int(over.sum())} of {over.numel()} entries are too far apart, "
        f"the worst {(apart / (bound + TINY)).max():.3g} times as far as rounding explains"
    )


@torch.no_grad()
def _bounds_of_update(reference: DenseKernel, rounding: Rounding, settings: StepSettings) -> tuple[Bounds, Tensor]:
    """How far float32 may be off after clipping, Adam and renormalising, and in the norm that it clips by.

    From gradients g and how far they may be off, by interval arithmetic, since Adam divides by what may be next to 0.
    """
    sae, (group,) = reference.sae, reference.optimizer.param_groups
    (beta1, beta2), eps, slack = group["betas"], group["eps"], ROOM * U
    gradients = {name: (p.grad.double(), ROOM * rounding.error(p.grad)) for name, p in sae.named_parameters()}
    if reference.project_gradient:
        g, e = gradients["W_dec"]
        unit = torch.nn.functional.normalize(sae.W_dec, dim=1)
        along, along_size = (g * unit).sum(dim=1, keepdim=True), (g * unit).abs().sum(dim=1, keepdim=True)
        along_bound = (e * unit.abs()).sum(dim=1, keepdim=True) + ROOM * 2 * gamma(sae.d_in) * along_size
        gradients["W_dec"] = g - along * unit, e + along_bound * unit.abs() + slack * (g.abs() + (along * unit).abs())
    norm = torch.stack([g.norm() for g, _ in gradients.values()]).norm()
    # the norm changes by no more than the norm of the change; half of a sum of squares' relative error is its root's
    n = sum(g.numel() for g, _ in gradients.values())
    norm_bound = torch.stack([e.norm() for _, e in gradients.values()]).norm() + ROOM * gamma(n) / 2 * norm
    clip, clip_bound = 1.0, 0.0
    if norm + norm_bound > settings.max_grad_norm:
        clip = min(1.0, float(settings.max_grad_norm / norm))
        clip_bound = clip * float(norm_bound / norm) + 1e-6 / float(norm) + slack
    bounds = {}
    for name, p in sae.named_parameters():
        g, e = gradients[name]
        g, e = g * clip, e * clip + g.abs() * clip_bound
        state = reference.optimizer.state[p]
        t = 1 + int(state["step"]) if state else 1
        m, v = (state[key] if state else torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq"))
        m_bound = (1 - beta1) * e + slack * (beta1 * m.abs() + (1 - beta1) * g.abs())
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g.square()
        v_bound = (1 - beta2) * (2 * g.abs() + e) * e + slack * v + TINY
        correction = math.sqrt(1 - beta2**t)
        least, most = ((v + sign * v_bound).clamp_min(0).sqrt() / correction + eps for sign in (-1, 1))
        rate = settings.lr / (1 - beta1**t)
        bound = (
            rate * (m_bound / least + m.abs() * (1 / least - 1 / most)) * (1 + slack) + slack * rate * m.abs() / least
        )
        w = p - rate * m / ((v.sqrt() / correction) + eps)
        bound = bound + 2 * U * w.abs()
        if p is sae.W_dec and sae.unit_decoder:
            length = w.norm(dim=1, keepdim=True)
            change = bound.norm(dim=1, keepdim=True)
            w = w / length
            bound = (bound + w.abs() * change) / (length - change) + ROOM * (gamma(sae.d_in) + U) * w.abs()
        bounds[name] = bound, m_bound, v_bound
    return bounds, norm_bound


def assert_end_alike(ours: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> None:
    """Loss, L0 and dead latents at the end of whole runs, by seed, within what the reference's own seeds differ by."""
    a, b = torch.tensor(ours), torch.tensor(reference)
    # three seeds tell little of the spread: a floor of 1 % of loss and L0, and of two latents
    floor = b.mean(dim=0) * torch.tensor([0.01, 0.01, 0.0]) + torch.tensor([0.0, 0.0, 2.0])
    spread = b.std(dim=0).maximum(floor)
    # means of three seeds, were they others, would differ by less than 2.4 deviations in 99.7 of 100 tests
    assert ((a.mean(dim=0) - b.mean(dim=0)).abs() < 3 * spread).all(), (a, b)
