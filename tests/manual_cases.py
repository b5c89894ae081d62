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

from step_by_step import compare_pass, compare_step, reference_for  # noqa: E402

from mechint.kernels import StepSettings  # noqa: E402
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


def kernel_for(name: str, *, project_gradient: bool = False, sparse: bool = False) -> ManualKernel:
    sae, _ = make_case(name)
    return ManualKernel(sae, adam_for(sae), project_gradient=project_gradient, sparse=sparse)


def compare_gradients(name: str, *, sparse: bool = False) -> None:
    _, objective = make_case(name)
    compare_pass(kernel_for(name, sparse=sparse), pool_of(0), BATCH, objective)


def pool_of(step: int) -> torch.Tensor:
    """More rows than a batch, for those on which rounding would decide."""
    return batch_of(step, BATCH + 30)


def compare_steps(name: str, *, sparse: bool, steps: int) -> None:
    """Update, constraints and running means included; clipping acts in every other step."""
    kernel = kernel_for(name, sparse=sparse, project_gradient=True)
    reference = reference_for(kernel)
    _, objective = make_case(name)
    for step in range(steps):
        settings = StepSettings(1e-3 * (step + 1), (100.0, 0.05)[step % 2], objective)
        compare_step(reference, pool_of(step), BATCH, settings, kernel)
    assert_plain_groups(kernel)


def assert_plain_groups(kernel: ManualKernel) -> None:
    """The optimizer's settings as another kernel or a file expects them."""
    for group in kernel.optimizer.param_groups:
        assert group.keys() == adam_for(kernel.sae).param_groups[0].keys()
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
