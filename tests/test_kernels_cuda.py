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
    assert_same_weights,
    batch_of,
    compare_pass,
    compare_steps,
    make_case,
    needs_triton,
    pair,
)

from mechint.config import SAETrainConfig
from mechint.errors import MechintError
from mechint.kernels import DenseKernel, StepResult, StepSettings, make_kernel
from mechint.kernels.gpu import kernel as manual

needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")


@pytest.mark.parametrize("name", CASES)
def test_dense_gradients_are_autograds(name: str) -> None:
    reference, kernel = pair(name)
    _, objective = make_case(name)
    compare_pass(reference, kernel, objective)


@pytest.mark.parametrize("name", CASES)
def test_steps_follow_the_reference(name: str) -> None:
    compare_steps(name, sparse=False, steps=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_hundred_steps(name: str) -> None:
    """From one state over 200 steps, weights end within 1e-4 of the distance that they moved.

    Where the bound comes from: a batch whose rows come in another order gives the reference itself another rounding;
    after 200 steps that moved its weights apart by 3e-7 to 4e-7 of the distance, and by 4e-6 where an entry had tipped
    over its boundary (measured for all cases; the kernel's distances were 4e-7). The bound leaves room for flips.
    """
    reference, kernel = pair(name)
    start = [p.detach().clone() for p in reference.sae.parameters()]
    _, objective = make_case(name)
    for step in range(200):
        settings = StepSettings(3e-3, 1.0, objective)
        expected, got = reference.step(batch_of(step), settings), kernel.step(batch_of(step), settings)
    moved, apart = (
        torch.cat([(a - b).flatten() for a, b in zip(first.sae.parameters(), second, strict=True)]).norm().item()
        for first, second in ((reference, start), (kernel, list(reference.sae.parameters())))
    )
    torch.testing.assert_close(got.terms["loss"], expected.terms["loss"], rtol=1e-5, atol=0)
    assert apart < 1e-4 * moved


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    assert_nan_moves_nothing(pair("batchtopk")[1])


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
    reference, kernel = pair(name)

    def capture(inputs: Any, skips: bool, max_grad_norm: float) -> manual._Captured:
        held = manual._copies(inputs)
        graph = FakeGraph(kernel, held, skips, max_grad_norm)
        zero, counts = torch.zeros(()), torch.zeros(D_SAE, dtype=torch.int64)
        extra = {"l1": 1, "l0_penalty": 1, "pre_act": 1, "auxk": 1}
        terms = [term for term in ("mse", *extra) if term in expected.terms]
        graph.result = StepResult({t: zero.clone() for t in ("loss", *terms)}, counts[0].clone(), counts, zero.clone())
        return manual._Captured(graph.replay, held, graph.result)

    kernel.captures = True
    monkeypatch.setattr(kernel, "_capture", capture)
    _, objective = make_case(name)
    kept: list[tuple[StepResult, StepResult]] = []
    for step in range(9):
        dead = None if objective.dead is None else objective.dead.roll(step)
        settings = StepSettings(
            1e-3 * (step + 1), 0.05, replace(objective, sparsity=objective.sparsity * (1 + step), dead=dead)
        )
        x = batch_of(step, 16 if step == 4 else BATCH)
        expected, got = reference.step(x, settings), kernel.step(x, settings)
        kept.append((got, expected))
    assert len(kernel.captured) == 1
    assert_same_weights(reference, kernel, 2e-6)
    for got, expected in kept:  # what was returned stays as it was
        torch.testing.assert_close(got.terms["loss"], expected.terms["loss"], rtol=1e-5, atol=1e-8)
        assert got.n_active == expected.n_active and torch.equal(got.fire_counts, expected.fire_counts)


@needs_cuda
@pytest.mark.parametrize(
    ("name", "sparse"),
    [(name, False) for name in CASES] + [pytest.param(name, True, marks=needs_triton) for name in SPARSE],
)
def test_captured_steps_follow_the_reference(name: str, sparse: bool) -> None:
    reference, kernel = pair(name, sparse=sparse)
    _, objective = make_case(name)
    for step in range(12):
        settings = StepSettings(1e-3 * (step + 1), 0.05, objective)
        expected, got = reference.step(batch_of(step), settings), kernel.step(batch_of(step), settings)
        torch.testing.assert_close(got.terms["loss"], expected.terms["loss"], rtol=1e-5, atol=1e-8)
    assert bool(kernel.captured) == (objective.widths is None)
    assert_same_weights(reference, kernel, 1e-5)


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
