"""The written-out step against the autograd reference; on a CPU without capture.

What only a device can show (capture, TF32, bf16 sums) is tested where there is one, and skipped with that reason.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from manual_cases import (
    BATCH,
    CASES,
    D_SAE,
    ON_CUDA,
    SPARSE,
    adam_for,
    assert_nan_moves_nothing,
    batch_of,
    compare_gradients,
    compare_steps,
    kernel_for,
    make_case,
    needs_triton,
    pool_of,
)
from step_by_step import assert_end_alike, compare_along, compare_step, reference_for

from mechint.config import SAETrainConfig
from mechint.errors import MechintError
from mechint.kernels import DenseKernel, StepResult, StepSettings, make_kernel
from mechint.kernels.gpu import kernel as manual

needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")


@pytest.mark.parametrize("name", CASES)
def test_dense_gradients_are_autograds(name: str) -> None:
    compare_gradients(name)


@pytest.mark.parametrize("name", CASES)
def test_steps_follow_the_reference(name: str) -> None:
    compare_steps(name, sparse=False, steps=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_hundred_steps(name: str) -> None:
    """From the states that the reference goes through."""
    kernel = kernel_for(name)
    _, objective = make_case(name)
    settings = StepSettings(3e-3, 1.0, objective)
    assert len(list(compare_along(reference_for(kernel), pool_of, BATCH, settings, kernel))) == 27


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["standard-auxk", "topk-auxk", "batchtopk", "jumprelu-tanh", "gated-auxk", "matryoshka"]
)
def test_whole_runs_end_alike(name: str) -> None:
    """200 steps by themselves: the same loss, L0 and latents that never fire as the reference's, within its spread."""

    def run(kind: type[DenseKernel] | type[manual.ManualKernel], seed: int) -> list[float]:
        sae, objective = make_case(name)
        kernel = kind(sae, adam_for(sae))
        losses, active, fired = [], [], torch.zeros(D_SAE, dtype=torch.int64)
        for step in range(200):
            result = kernel.step(batch_of(1000 * seed + step), StepSettings(3e-3, 1.0, objective))
            if step >= 150:
                losses.append(result.terms["loss"].item())
                active.append(result.n_active.item() / BATCH)
                fired += result.fire_counts.cpu()
        return [sum(losses) / 50, sum(active) / 50, float((fired == 0).sum())]

    assert_end_alike(*([run(kind, seed) for seed in range(3)] for kind in (manual.ManualKernel, DenseKernel)))


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    assert_nan_moves_nothing(kernel_for("batchtopk"))


class FakeGraph:
    """Replays as a CUDA graph does: from the buffers it was captured over, into the results of its capture."""

    def __init__(self, kernel: manual.ManualKernel, held: Any, skips: bool, max_grad_norm: float):
        self.run = lambda: kernel._whole(held, skips, max_grad_norm)
        self.result: Any = None

    def replay(self) -> None:
        terms, n_active, fire_counts, norm = self.run()
        for name, value in terms.items():
            self.result.terms[name].copy_(value)
        self.result.n_active.copy_(n_active)
        self.result.fire_counts.copy_(fire_counts)
        self.result.grad_norm.copy_(norm)


@pytest.mark.parametrize("name", ["standard-auxk", "batchtopk", "jumprelu-tanh"])
def test_what_changes_between_replays_reaches_the_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch, learning rate, sparsity and dead latents differ in every step; another shape is another graph."""
    kernel = kernel_for(name)
    reference = reference_for(kernel)
    _, objective = make_case(name)
    names = kernel.backward(batch_of(0), objective).terms

    def capture(inputs: Any, skips: bool, max_grad_norm: float) -> manual._Captured:
        held = manual._copies(inputs)
        graph = FakeGraph(kernel, held, skips, max_grad_norm)
        counts = torch.zeros(D_SAE, dtype=torch.int64)
        graph.result = StepResult({t: torch.zeros(()) for t in names}, counts[0].clone(), counts, torch.zeros(()))
        return manual._Captured(graph.replay, held, graph.result)

    kernel.captures = True
    monkeypatch.setattr(kernel, "_capture", capture)
    kept: list[tuple[StepResult, StepResult]] = []
    step_of = kernel.step
    monkeypatch.setattr(kernel, "step", lambda *given: _keep(kept, step_of(*given)))
    for step in range(9):
        dead = None if objective.dead is None else objective.dead.roll(step)
        settings = StepSettings(
            1e-3 * (step + 1), 0.05, replace(objective, sparsity=objective.sparsity * (1 + step), dead=dead)
        )
        compare_step(reference, pool_of(step), 16 if step == 4 else BATCH, settings, kernel)
    assert len(kernel.captured) == 1
    for got, as_returned in kept:  # what was returned stays as it was
        torch.testing.assert_close(got, as_returned, rtol=0, atol=0)


def _keep(kept: list[tuple[StepResult, StepResult]], result: StepResult) -> StepResult:
    kept.append((result, copy.deepcopy(result)))
    return result


@needs_cuda
@pytest.mark.parametrize(
    ("name", "sparse"),
    [(name, False) for name in CASES] + [pytest.param(name, True, marks=needs_triton) for name in SPARSE],
)
def test_captured_steps_follow_the_reference(name: str, sparse: bool) -> None:
    kernel = kernel_for(name, sparse=sparse)
    reference = reference_for(kernel)
    _, objective = make_case(name)
    for step in range(12):
        compare_step(reference, pool_of(step), BATCH, StepSettings(1e-3 * (step + 1), 0.05, objective), kernel)
    assert bool(kernel.captured) == (objective.widths is None)


@needs_cuda
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_lossy_products_on_a_device(precision: str) -> None:
    lossy_is_close_and_not_equal(precision)


def test_bf16_on_a_cpu_is_close_and_not_equal() -> None:
    lossy_is_close_and_not_equal("bf16")


def lossy_is_close_and_not_equal(precision: str) -> None:
    """bf16 rounds factors by up to 2^-9 each; the entries that tip over 0 add to that."""
    sae, objective = make_case("standard")
    other = copy.deepcopy(sae)
    exact, lossy = DenseKernel(sae, adam_for(sae)), make_kernel(other, adam_for(other), precision=precision)
    exact.backward(batch_of(0), objective)
    lossy.backward(batch_of(0), objective)
    for (name, expected), (_, got) in zip(sae.named_parameters(), other.named_parameters(), strict=True):
        assert expected.grad is not None and got.grad is not None
        assert got.dtype == got.grad.dtype == torch.float32
        apart = (got.grad - expected.grad).norm() / expected.grad.norm()
        assert 1e-6 < apart < 0.05, name


def test_what_the_kernel_refuses() -> None:
    sae, _ = make_case("standard")
    optimizer = adam_for(sae)
    if not ON_CUDA:
        with pytest.raises(MechintError, match="--precision tf32 needs a CUDA device"):
            make_kernel(sae, optimizer, precision="tf32")
    with pytest.raises(MechintError, match="unknown --precision 'fp8'"):
        make_kernel(sae, optimizer, precision="fp8")
    for kernel in ("dense", "sparse"):
        with pytest.raises(MechintError, match=f"--precision bf16 needs --kernel manual, not {kernel}"):
            make_kernel(sae, optimizer, kernel=kernel, precision="bf16")
    sae.unit_decoder = False
    with pytest.raises(MechintError, match="--decoder free has no written-out backward"):
        make_kernel(sae, optimizer, kernel="manual")
    unfused = torch.optim.Adam(sae.parameters())
    sae.unit_decoder = True
    with pytest.raises(MechintError, match="fused Adam"):
        make_kernel(sae, unfused, precision="bf16")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"kernel": "dense"}, "--precision bf16 needs --kernel manual: dense is exact"),
        ({"decoder": "free"}, "--precision bf16 needs --decoder unit"),
        ({"shard_latents": True}, "--precision bf16 and --shard-latents do not go together"),
    ],
)
def test_what_precision_does_not_go_with(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(MechintError, match=message):
        SAETrainConfig(precision="bf16", **flags)


def test_manual_is_a_kernel_by_name() -> None:
    sae, _ = make_case("gated")
    assert make_kernel(sae, adam_for(sae), kernel="manual").name == "manual"
