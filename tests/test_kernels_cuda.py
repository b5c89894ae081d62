"""The written-out step against the autograd reference: on a CPU without capture, the Triton parts by its interpreter.

What only a device can show (capture, TF32, bf16 sums) is tested where there is one, and skipped with that reason.
"""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ON_CUDA = torch.cuda.is_available()
if not ON_CUDA:  # read when the kernels are imported, which is later
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mechint.config import SAETrainConfig  # noqa: E402
from mechint.errors import MechintError  # noqa: E402
from mechint.kernels import (  # noqa: E402
    DenseKernel,
    StepResult,
    StepSettings,
    cuda,
    cuda_products,
    cuda_sparse,
    make_kernel,
)
from mechint.kernels.cuda import ManualKernel  # noqa: E402
from mechint.kernels.cuda_products import Products, triton_kernels  # noqa: E402
from mechint.sae import SAE, Objective, build_sae  # noqa: E402
from mechint.sae.architectures.topk import TopKSAE  # noqa: E402

DEVICE = "cuda" if ON_CUDA else "cpu"
D_IN, D_SAE, BATCH = 24, 96, 80
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")
needs_triton = pytest.mark.skipif(triton_kernels() is None, reason="Triton is not installed (pip install triton)")

# name -> architecture, options, objective
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "standard": ("standard", {}, {"sparsity": 0.5}),
    "standard-auxk": ("standard", {}, {"sparsity": 0.5, "dead": 70, "k_aux": 12, "aux_coefficient": 0.5}),
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
SPARSE = ["standard", "standard-auxk", "topk", "batchtopk", "jumprelu", "jumprelu-input", "jumprelu-quadratic"]


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


@pytest.mark.parametrize("name", CASES)
def test_dense_gradients_are_autograds(name: str) -> None:
    reference, kernel = pair(name)
    _, objective = make_case(name)
    compare_pass(reference, kernel, objective)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients_are_autograds(name: str) -> None:
    reference, kernel = pair(name, sparse=True)
    _, objective = make_case(name)
    compare_pass(reference, kernel, objective)


def compare_pass(reference: DenseKernel, kernel: ManualKernel, objective: Objective) -> None:
    x = batch_of(0)
    expected, got = reference.backward(x, objective), kernel.backward(x, objective)
    assert list(got.terms) == list(expected.terms)
    for term, value in expected.terms.items():
        torch.testing.assert_close(got.terms[term], value, rtol=2e-6, atol=1e-8)
    assert torch.equal(got.fire_counts, expected.fire_counts) and got.fire_counts.dtype == expected.fire_counts.dtype
    assert got.n_active == expected.n_active
    assert_same_gradients(reference.sae, kernel.sae)


@pytest.mark.parametrize("name", CASES)
def test_steps_follow_the_reference(name: str) -> None:
    compare_steps(name, sparse=False, steps=5)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["standard", "batchtopk", "jumprelu"])
def test_sparse_steps_follow_the_reference(name: str) -> None:
    compare_steps(name, sparse=True, steps=2)


def compare_steps(name: str, *, sparse: bool, steps: int) -> None:
    """Update, constraints and running means included; with a tight clip, so that it acts."""
    reference, kernel = pair(name, sparse=sparse, project_gradient=True)
    _, objective = make_case(name)
    for step in range(steps):
        settings = StepSettings(1e-3 * (step + 1), 0.05, objective)
        expected, got = reference.step(batch_of(step), settings), kernel.step(batch_of(step), settings)
        torch.testing.assert_close(got.grad_norm, expected.grad_norm, rtol=5e-6, atol=1e-8)
        assert expected.grad_norm > 0.05
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


@pytest.mark.parametrize("sparse", [False, pytest.param(True, marks=[needs_triton, pytest.mark.slow])])
def test_a_loss_that_is_not_finite_moves_nothing(sparse: bool) -> None:
    _, kernel = pair("batchtopk", sparse=sparse)
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


class FakeGraph:
    """Replays as a CUDA graph does: from the buffers it was captured over, into the results of its capture."""

    def __init__(self, kernel: ManualKernel, held: Any, skips: bool, max_grad_norm: float):
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

    def capture(inputs: Any, skips: bool, max_grad_norm: float) -> cuda._Captured:
        held = cuda._copies(inputs)
        graph = FakeGraph(kernel, held, skips, max_grad_norm)
        zero, counts = torch.zeros(()), torch.zeros(D_SAE, dtype=torch.int64)
        extra = {"l1": 1, "l0_penalty": 1, "pre_act": 1, "auxk": 1}
        terms = [term for term in ("mse", *extra) if term in expected.terms]
        graph.result = StepResult({t: zero.clone() for t in ("loss", *terms)}, counts[0].clone(), counts, zero.clone())
        return cuda._Captured(graph.replay, held, graph.result)

    kernel.captures = True
    monkeypatch.setattr(kernel, "_capture", capture)
    _, objective = make_case(name)
    kept: list[tuple[StepResult, float]] = []
    for step in range(9):
        dead = None if objective.dead is None else objective.dead.roll(step)
        settings = StepSettings(
            1e-3 * (step + 1), 0.05, replace(objective, sparsity=objective.sparsity * (1 + step), dead=dead)
        )
        x = batch_of(step, 16 if step == 4 else BATCH)
        expected, got = reference.step(x, settings), kernel.step(x, settings)
        kept.append((got, expected.terms["loss"].item()))
    assert len(kernel.captured) == 1
    assert_same_weights(reference, kernel, 2e-6)
    for got, loss in kept:  # what was returned stays as it was
        assert got.terms["loss"].item() == pytest.approx(loss, rel=1e-5)


@needs_cuda
@pytest.mark.parametrize("name", CASES)
def test_captured_steps_follow_the_reference(name: str) -> None:
    reference, kernel = pair(name)
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


@pytest.mark.parametrize(("n", "k"), [(96, 5), (4096, 7), (4096, 64), (100, 100)])
def test_largest_is_topk(n: int, k: int) -> None:
    """Also with many equal values, and with NaN."""
    generator = torch.Generator().manual_seed(n + k)
    for values in (
        torch.randn(6, n, generator=generator),
        torch.randint(0, 4, (6, n), generator=generator).float(),
    ):
        top, index = cuda_sparse.largest(values, k)
        assert torch.equal(top.sort(dim=1, descending=True).values, values.topk(k, dim=1).values)
        assert torch.equal(values.gather(1, index), top)
        assert all(len(set(row.tolist())) == k for row in index)


def test_topk_from_blocks_is_topk_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, _ = make_case("topk")
    assert isinstance(sae, TopKSAE)
    x = batch_of(0)
    monkeypatch.setattr(cuda_sparse, "SELECT_CHUNK", 25)  # the last block is smaller than k = 5 would like: 21 is not
    with torch.no_grad():
        values, latents = cuda_sparse.select_topk(sae, x - sae.b_dec, Products("float32", x.device))
        acts = torch.zeros(BATCH, D_SAE, device=DEVICE).scatter(1, latents, values.relu())
        torch.testing.assert_close(acts, sae.encode(x), rtol=0, atol=1e-5)
        assert torch.equal(acts > 0, sae.encode(x) > 0)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_one_pass_after_a_product_is_the_same(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that stand out over the edges, several parts of the batch, and a NaN, which has to stay one."""
    monkeypatch.setattr(cuda_products, "SHARE", 32)
    generator = torch.Generator().manual_seed(3)
    pre, d_acts = (torch.randn(75, 150, generator=generator).to(DEVICE) for _ in range(2))
    bias, shift = torch.randn(150, generator=generator).to(DEVICE), torch.tensor(0.3, device=DEVICE)
    plain, fused = (Products(precision, pre.device, fuse=fuse) for fuse in (False, True))
    (code, counts, total), (fused_code, fused_counts, fused_total) = (
        products.relu(pre.clone(), bias) for products in (plain, fused)
    )
    assert fused_code.dtype == code.dtype
    # the interpreter cuts what a GPU rounds: the last of bfloat16's 8 bits
    tolerance = {"rtol": 2**-7, "atol": 1e-6} if precision == "bf16" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(fused_code, code, **tolerance)
    assert torch.equal(fused_counts, counts)
    torch.testing.assert_close(fused_total, total)
    for expected, got in zip(*(products.mask(d_acts.clone(), code, shift) for products in (plain, fused)), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=max(1e-5, tolerance["rtol"]), atol=1e-5)
    pre[40, 100] = torch.nan
    code, _, total = fused.relu(pre, bias)
    assert code[40, 100].isnan() and total.isnan() and code.isnan().sum() == 1


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from mechint.kernels import triton_kernels

FLOATS = {"half_band", "scale", "bandwidth", "keep1", "add1", "keep2", "add2", "eps"}
INTEGERS = {"M", "B", "D", "TOTAL"}
HELD = {"starts", "slots", "fire_counts"}
CODES = {"code", "d_pre"}

def build(kernel, warps, wide, **constants):
    names = [parameter.name for parameter in kernel.params]
    def kind(name):
        if name in constants:
            return "constexpr"
        if name in FLOATS:
            return "fp32"
        if name in INTEGERS:
            return "i32"
        if name == "counts" and constants.get("SHARE"):
            return "*i32"
        if name in ("latents", "rows", "counts", "n_active", "go"):
            return "*i64" if wide and name in ("latents", "rows", "counts") else "*i32"
        if name in CODES and wide and constants.get("SHARE"):
            return "*bf16"
        return "*i64" if name in HELD else "*fp32"
    signature = {name: kind(name) for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    assert compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options={"num_warps": warps}).asm["cubin"]
    print(kernel.__name__, constants)

CAPABILITY = int(sys.argv[1])
for jump in (False, True):
    build(triton_kernels.list_rows, 4, False, JUMP=jump, BLOCK=1024)
    build(triton_kernels.list_latents, 4, False, JUMP=jump, ROWS=32, LATENTS=32)
for jump, dense in ((False, False), (False, True), (True, True)):
    for width, warps in ((512, 4), (8192, 8)):
        shape = {"JUMP": jump, "DENSE_SLOTS": dense, "ENTRIES": max(1, 4096 // width), "BLOCK_D": width}
        build(triton_kernels.reconstruct, warps, not dense, **shape)
        build(triton_kernels.latent_gradients, warps, not dense, STE_TO_INPUT=jump, **shape)
for lossy in (False, True):
    tile = {"SHARE": 256, "ROWS": 16, "LATENTS": 128}
    build(triton_kernels.relu_columns, 4, lossy, **tile)
    build(triton_kernels.mask_columns, 4, lossy, **tile)
for unit in (False, True):
    build(triton_kernels.adam_rows, 8, False, UNIT=unit, MIN_NORM=1e-12, BLOCK_D=4096)
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability: int, tmp_path: Path) -> None:
    """Triton compiles without a GPU: the interpreter takes programs that its compiler would refuse."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 22
