"""Triton's kernels against plain torch: by its interpreter where there is no GPU, and compiled for two of them.

The interpreter runs a program at a time in numpy, so what it runs is small and marked slow.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from manual_cases import (
    BATCH,
    D_SAE,
    DEVICE,
    SPARSE,
    adam_for,
    assert_nan_moves_nothing,
    batch_of,
    compare_gradients,
    compare_steps,
    kernel_for,
    make_case,
    needs_triton,
)

from mechint.kernels import StepSettings
from mechint.kernels.gpu import ManualKernel, products, skip_zeros
from mechint.kernels.gpu.products import Products
from mechint.sae.architectures.topk import TopKSAE


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients_are_autograds(name: str) -> None:
    compare_gradients(name, sparse=True)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["standard", "batchtopk", "jumprelu"])
def test_sparse_steps_follow_the_reference(name: str) -> None:
    compare_steps(name, sparse=True, steps=2)


@needs_triton
@pytest.mark.slow
def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    assert_nan_moves_nothing(kernel_for("batchtopk", sparse=True))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_one_pass_after_a_product_is_the_same(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that stand out over the edges, several parts of the batch, and a NaN, which has to stay one."""
    monkeypatch.setattr(products, "SHARE", 32)
    generator = torch.Generator().manual_seed(3)
    pre, d_acts = (torch.randn(75, 150, generator=generator).to(DEVICE) for _ in range(2))
    bias, shift = torch.randn(150, generator=generator).to(DEVICE), torch.tensor(0.3, device=DEVICE)
    plain, fused = (Products(precision, pre.device, fuse=fuse) for fuse in (False, True))
    (code, counts, total), (fused_code, fused_counts, fused_total) = (
        mm.relu(pre.clone(), bias, 0.7) for mm in (plain, fused)
    )
    assert fused_code.dtype == code.dtype
    # the interpreter cuts what a GPU rounds: the last of bfloat16's 8 bits
    tolerance = {"rtol": 2**-7, "atol": 1e-6} if precision == "bf16" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(fused_code, code, **tolerance)
    assert torch.equal(fused_counts, counts)
    torch.testing.assert_close(fused_total, total)
    for expected, got in zip(*(mm.mask(d_acts.clone(), code, shift, 0.7) for mm in (plain, fused)), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=max(1e-5, tolerance["rtol"]), atol=1e-5)
    pre[40, 100] = torch.nan
    code, _, total = fused.relu(pre, bias)
    assert code[40, 100].isnan() and total.isnan() and code.isnan().sum() == 1


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability: int, tmp_path: Path) -> None:
    """Triton compiles without a GPU: the interpreter takes programs that its compiler would refuse."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_compile.py")), str(capability)],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 22


def test_zeros_are_skipped_where_that_is_less_work() -> None:
    """By the estimates: TopK always in float32, at one in 300 in bf16; ReLU once its density is known."""
    topk, _ = make_case("topk")
    standard, _ = make_case("standard")
    assert not skip_zeros.pays(standard, "float32", None)
    for sae, l0 in ((topk, None), (standard, 5.0)):
        sae.cfg.d_sae = 4096
        assert skip_zeros.pays(sae, "float32", l0)
        sae.cfg.d_sae = 1024
        assert not skip_zeros.pays(sae, "bf16", l0)
    assert not skip_zeros.pays(standard, "float32", 500.0)


@needs_triton
def test_density_is_looked_at_now_and_then() -> None:
    """In the first step and every 64th after it: counted, not timed, so that a rerun takes the same way."""
    sae, objective = make_case("standard")
    kernel = ManualKernel(sae, adam_for(sae))
    seen = []
    for step in range(66):
        result = kernel.step(batch_of(step, 4), StepSettings(1e-2, 1.0, objective))
        seen.append((kernel.l0, result.n_active.item() / 4))
    assert seen[0][0] == seen[63][0] == seen[0][1]
    assert seen[64][0] == seen[65][0] == seen[64][1]


@pytest.mark.parametrize(("n", "k"), [(96, 5), (4096, 7), (4096, 64), (100, 100)])
def test_largest_is_topk(n: int, k: int) -> None:
    """Also with many equal values, and with NaN."""
    generator = torch.Generator().manual_seed(n + k)
    for values in (
        torch.randn(6, n, generator=generator),
        torch.randint(0, 4, (6, n), generator=generator).float(),
    ):
        top, index = skip_zeros.largest(values, k)
        assert torch.equal(top.sort(dim=1, descending=True).values, values.topk(k, dim=1).values)
        assert torch.equal(values.gather(1, index), top)
        assert all(len(set(row.tolist())) == k for row in index)


def test_topk_from_blocks_is_topk_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, _ = make_case("topk")
    assert isinstance(sae, TopKSAE)
    x = batch_of(0)
    monkeypatch.setattr(skip_zeros, "SELECT_CHUNK", 25)  # the last block is smaller than k = 5 would like: 21 is not
    with torch.no_grad():
        values, latents = skip_zeros.select_topk(sae, x - sae.b_dec, Products("float32", x.device))
        acts = torch.zeros(BATCH, D_SAE, device=DEVICE).scatter(1, latents, values.relu())
        torch.testing.assert_close(acts, sae.encode(x), rtol=0, atol=1e-5)
        assert torch.equal(acts > 0, sae.encode(x) > 0)
