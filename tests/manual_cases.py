"""SAEs, steps and comparisons for the tests of the written-out step (test_kernels_cuda.py, test_kernels_triton.py).

Import this before anything that imports Triton's kernels: without a GPU they run by its interpreter.
"""

import copy
import os
from typing import Any

import pytest
import torch

ON_CUDA = torch.cuda.is_available()
if not ON_CUDA:  # read when the kernels are imported, which is later
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mechint.kernels import DenseKernel, StepSettings  # noqa: E402
from mechint.kernels.gpu import ManualKernel  # noqa: E402
from mechint.kernels.gpu.products import triton_kernels  # noqa: E402
from mechint.sae import SAE, Objective, build_sae  # noqa: E402

DEVICE = "cuda" if ON_CUDA else "cpu"
D_IN, D_SAE, BATCH = 24, 96, 80
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")
needs_triton = pytest.mark.skipif(triton_kernels() is None, reason="Triton is not installed (pip install triton)")

# name -> architecture, options, objective
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "standard": ("standard", {}, {"sparsity": 0.5}),
    "standard-saturated": ("standard", {"saturation": 0.7}, {"sparsity": 2.0}),
    "standard-auxk": ("standard", {}, {"sparsity": 0.5, "dead": 70, "k_aux": 12, "aux_coefficient": 0.5}),
    # fewer dead latents than AuxK takes, and fewer than their number is padded to
    "standard-auxk-few": ("standard", {}, {"sparsity": 0.5, "dead": 10, "k_aux": 32, "aux_coefficient": 0.5}),
    "topk": ("topk", {"k": 5}, {}),
    "topk-auxk": ("topk", {"k": 5}, {"dead": 20, "k_aux": 32, "aux_coefficient": 0.5}),
    "batchtopk": ("batchtopk", {"k": 4.3}, {}),
    "jumprelu": ("jumprelu", {"bandwidth": 0.5}, {"sparsity": 0.02}),
    "jumprelu-input": ("jumprelu", {"bandwidth": 0.5, "ste_to_input": True}, {"sparsity": 0.02}),
    "jumprelu-quadratic": (
        "jumprelu",
        {"bandwidth": 0.5, "penalty": "quadratic", "target_l0": 10.0},
        {"sparsity": 1.0},
    ),
    "jumprelu-tanh": (
        "jumprelu",
        {"bandwidth": 0.5, "penalty": "tanh", "pre_act_coefficient": 0.1},
        {"sparsity": 0.02, "dead": 40},
    ),
    "gated": ("gated", {}, {"sparsity": 0.5}),
    "gated-auxk": ("gated", {}, {"sparsity": 0.5, "dead": 40, "k_aux": 12, "aux_coefficient": 0.5}),
    "matryoshka": ("matryoshka_batchtopk", {"k": 4.3}, {}),
    "matryoshka-drawn": ("matryoshka_batchtopk", {"k": 4.3, "prefixes": 3}, {"widths": (7, 50, 96)}),
}
SPARSE = [
    "standard",
    "standard-saturated",
    "standard-auxk",
    "topk",
    "batchtopk",
    "jumprelu",
    "jumprelu-input",
    "jumprelu-quadratic",
]


def make_case(name: str) -> tuple[SAE, Objective]:
    """An SAE with nothing left at its default (biases of 0 would hide a forgotten one)."""
    architecture, options, wanted = CASES[name]
    generator = torch.Generator().manual_seed(5)
    sae = build_sae(architecture, D_IN, D_SAE, generator=generator, options=options).to(DEVICE)
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(DEVICE))
        if architecture == "jumprelu":
            sae.get_parameter("threshold").abs_()
    n_dead = wanted.get("dead")
    dead = None if n_dead is None else (torch.randperm(D_SAE, generator=generator) < n_dead).to(DEVICE)
    return sae, Objective(**{**wanted, "dead": dead})


def batch_of(step: int, rows: int = BATCH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return (torch.randn(rows, D_IN, generator=generator) * 1.5 + 0.3).to(DEVICE)


def adam_for(sae: SAE) -> torch.optim.Adam:
    return torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)


def pair(name: str, *, project_gradient: bool = False, sparse: bool = False) -> tuple[DenseKernel, ManualKernel]:
    """The reference and the kernel under test, over equal SAEs."""
    sae, _ = make_case(name)
    other = copy.deepcopy(sae)
    return (
        DenseKernel(sae, adam_for(sae), project_gradient=project_gradient),
        ManualKernel(other, adam_for(other), project_gradient=project_gradient, sparse=sparse),
    )


def assert_same_gradients(reference: SAE, other: SAE) -> None:
    """Float32 products of up to 96 terms, summed in another order: errors near 1e-7 times the largest entry; 2e-6
    leaves room for the four products that follow each other."""
    for (name, expected), (_, got) in zip(reference.named_parameters(), other.named_parameters(), strict=True):
        assert expected.grad is not None and got.grad is not None
        largest = expected.grad.abs().max().item()
        bound = 2e-6 * largest + 1e-9
        torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def compare_pass(reference: DenseKernel, kernel: ManualKernel, objective: Objective) -> None:
    x = batch_of(0)
    expected, got = reference.backward(x, objective), kernel.backward(x, objective)
    assert list(got.terms) == list(expected.terms)
    for term, value in expected.terms.items():
        torch.testing.assert_close(got.terms[term], value, rtol=2e-6, atol=1e-8)
    assert torch.equal(got.fire_counts, expected.fire_counts) and got.fire_counts.dtype == expected.fire_counts.dtype
    assert got.n_active == expected.n_active
    assert_same_gradients(reference.sae, kernel.sae)


def compare_steps(name: str, *, sparse: bool, steps: int) -> None:
    """Update, constraints and running means included; clipping acts in every other step."""
    reference, kernel = pair(name, sparse=sparse, project_gradient=True)
    _, objective = make_case(name)
    for step in range(steps):
        settings = StepSettings(1e-3 * (step + 1), (100.0, 0.05)[step % 2], objective)
        expected, got = reference.step(batch_of(step), settings), kernel.step(batch_of(step), settings)
        torch.testing.assert_close(got.grad_norm, expected.grad_norm, rtol=5e-6, atol=1e-8)
        assert 0.05 < expected.grad_norm < 100
    assert_same_weights(reference, kernel, 1e-6)


def assert_same_weights(reference: DenseKernel, kernel: ManualKernel, atol: float) -> None:
    """Parameters, buffers and the optimizer's state."""
    expected, got = reference.sae.state_dict(), kernel.sae.state_dict()
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    states = zip(reference.optimizer.state.values(), kernel.optimizer.state.values(), strict=True)
    for expected_state, got_state in states:
        assert expected_state.keys() == got_state.keys()
        assert got_state["step"] == expected_state["step"]
        torch.testing.assert_close(got_state["exp_avg"], expected_state["exp_avg"], rtol=0, atol=atol)
    assert [group.keys() for group in kernel.optimizer.param_groups] == [
        group.keys() for group in reference.optimizer.param_groups
    ]
    for group in kernel.optimizer.param_groups:
        assert isinstance(group["lr"], float) and group["capturable"] is False


def assert_nan_moves_nothing(kernel: ManualKernel) -> None:
    """Not a weight, moment, step count or running mean; and the next step is taken."""
    settings = StepSettings(1e-3, 1.0, Objective())
    kernel.step(batch_of(0), settings)
    before = copy.deepcopy((kernel.sae.state_dict(), kernel.optimizer.state_dict()["state"]))
    x = batch_of(1)
    x[3, 5] = torch.nan
    result = kernel.step(x, settings)
    assert result.terms["loss"].isnan() and result.grad_norm.isnan()
    after = (kernel.sae.state_dict(), kernel.optimizer.state_dict()["state"])
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    for index, state in before[1].items():
        assert all(torch.equal(after[1][index][name], value) for name, value in state.items())
    assert kernel.step(batch_of(2), settings).grad_norm.isfinite()
