"""The sparse CPU kernel equals the dense reference, whatever the batch looks like."""

import copy
import logging
import sys

import pytest
import torch
from step_by_step import assert_end_alike, compare_along, compare_pass, compare_step, reference_for

from mechint.kernels import DenseKernel, StepSettings, cpu, make_kernel
from mechint.kernels.cpu import SparseKernel
from mechint.kernels.cpu.loops import TILED_ABOVE
from mechint.kernels.cpu.space import Space
from mechint.kernels.threads import Pool
from mechint.sae import Objective, build_sae

# architecture and options; each is held against the reference in every test below
CASES = {
    "standard": ("standard", {}),
    "standard-saturated": ("standard", {"saturation": 0.7}),
    "topk": ("topk", {"k": 8}),
    "batchtopk": ("batchtopk", {"k": 7.3}),
    "matryoshka": ("matryoshka_batchtopk", {"k": 9}),
    "jumprelu": ("jumprelu", {}),
    "jumprelu-tanh": ("jumprelu", {"penalty": "tanh", "bandwidth": 2.0, "init_threshold": 0.3}),
    "jumprelu-quadratic": ("jumprelu", {"penalty": "quadratic", "target_l0": 9.0, "ste_to_input": True}),
    "gated": ("gated", {}),
}
NARROW = pytest.mark.parametrize("narrow", [True, False], ids=["bfloat16", "float32"])
CASE = pytest.mark.parametrize("case", CASES)


def make(case, d_in=64, d_sae=256, *, active=0.08, seed=0):
    """An SAE on which about that share of the latents is active, and its Adam."""
    architecture, options = CASES[case]
    sae = build_sae(architecture, d_in, d_sae, generator=torch.Generator().manual_seed(seed), options=options)
    with torch.no_grad():
        x = batch(seed=99, d_in=d_in, rows=512)
        pre = sae.pre_activations(x)
        bias = sae.get_parameter(sae.latent_offsets()[0])
        bias.sub_(pre.flatten().quantile(1 - active))
        sae.b_dec.copy_(0.1 * torch.randn(d_in, generator=torch.Generator().manual_seed(seed)))
    return sae


def adam(sae, lr=1e-3):
    return torch.optim.Adam(sae.parameters(), lr=lr, fused=True)


def batch(seed, d_in=64, rows=300):
    """Sums of a few of 5 d_in directions, noise and an offset."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(
        torch.randn(5 * d_in, d_in, generator=torch.Generator().manual_seed(7)), dim=1
    )
    picked = torch.randint(0, len(directions), (rows, 8), generator=generator)
    strengths = 0.5 + torch.rand(rows, 8, generator=generator)
    x = (directions[picked] * strengths[..., None]).sum(dim=1)
    return x + 0.03 * torch.randn(rows, d_in, generator=generator) + 0.1


def kernel_for(sae, *, narrow=True, dense_above=1.0, **kwargs):
    """1.0: nothing is too dense, so that it is the sparse route that is tested."""
    return SparseKernel(sae, adam(sae), narrow=narrow, dense_above=dense_above, **kwargs)


def compare(kernel, change=lambda x: x, rows=300, objective=None, *, route="sparse", seed=1, larger=None):
    """With the reference on a batch, changed in some way."""
    pool = change(batch(seed, kernel.sae.d_in, rows + rows // 4 + 8))
    got = compare_pass(kernel, pool, rows, objective or Objective(sparsity=0.3), larger)
    assert kernel.route == route
    return got


@CASE
@NARROW
@pytest.mark.parametrize(
    ("rows", "d_in", "d_sae"),
    [(300, 64, 256), (64, 128, 512), (1, 64, 256), (257, 20, 70), (33, 50, 16), (520, 96, 1000)],
)
def test_gradients_of_a_batch(case, narrow, rows, d_in, d_sae):
    compare(kernel_for(make(case, d_in, d_sae), narrow=narrow), rows=rows)


@CASE
@pytest.mark.parametrize("active", [0.1, 0.5])
def test_a_dense_batch_goes_the_dense_route(case, active):
    compare(kernel_for(make(case, d_sae=600, active=active), dense_above=0.001), rows=520, route="dense")


@CASE
@NARROW
def test_dead_latents_are_revived_as_in_the_reference(case, narrow):
    sae = make(case)
    if case == "jumprelu":
        sae.pre_act_coefficient = 0.02
    kernel, dead = kernel_for(sae, narrow=narrow), torch.arange(sae.d_sae) % 5 == 0
    for k_aux in (4, 1000):
        compare(kernel, objective=Objective(sparsity=0.3, dead=dead, k_aux=k_aux, aux_coefficient=1 / 32), seed=3)
    nobody = Objective(sparsity=0.3, dead=dead & False, k_aux=4, aux_coefficient=1 / 32)
    compare(kernel, objective=nobody, seed=3)


def with_zero_rows(x):
    return torch.where(torch.arange(len(x))[:, None] % 3 == 0, 0.0, x)


def with_huge_rows(x):
    return x * torch.where(torch.arange(len(x))[:, None] % 7 == 0, 300.0, 1.0)


def with_tiny_rows(x):
    return x * torch.where(torch.arange(len(x))[:, None] % 2 == 0, 1e-6, 1.0)


def with_one_wide_column(x):
    return x + 200 * torch.nn.functional.one_hot(torch.tensor(5), x.shape[1])


@CASE
@NARROW
@pytest.mark.parametrize("change", [with_zero_rows, with_huge_rows, with_tiny_rows, with_one_wide_column])
def test_odd_rows(case, narrow, change):
    compare(kernel_for(make(case), narrow=narrow), change)


@CASE
@NARROW
def test_no_latent_is_active(case, narrow):
    sae = make(case)
    with torch.no_grad():
        sae.get_parameter(sae.latent_offsets()[0]).fill_(-50.0)
    assert compare(kernel_for(sae, narrow=narrow)).n_active == 0


@CASE
@NARROW
def test_every_latent_is_active(case, narrow):
    sae = make(case)
    with torch.no_grad():
        for name in sae.latent_offsets():
            if name.startswith("b_"):
                sae.get_parameter(name).fill_(30.0)
        # gated: u * gain, which r_mag's gradient is made of, is had as act - b_mag
        larger = {"r_mag": 30.0 / float(((batch(1) - sae.b_dec) @ sae.W_enc).abs().mean())}
    compare(kernel_for(sae, narrow=narrow), rows=70, larger=larger)


@pytest.mark.parametrize("case", ["topk", "batchtopk", "matryoshka"])
@NARROW
def test_fewer_positive_entries_than_k(case, narrow):
    got = compare(kernel_for(make(case, active=0.004), narrow=narrow))
    assert 0 < got.n_active < 0.5 * CASES[case][1]["k"] * 300


@pytest.mark.parametrize("case", ["topk", "batchtopk"])
@NARROW
def test_ties_keep_exactly_k(case, narrow):
    """Latents twice, rows twice: which of two equal entries stays is free, how many stay and the loss are not."""
    sae = make(case, active=0.3)
    with torch.no_grad():
        for p in (sae.W_enc.t(), sae.W_dec, sae.b_enc):
            p[1::2] = p[::2]
    x = batch(1, rows=150).repeat(2, 1)
    reference = copy.deepcopy(sae)
    sparse, dense = kernel_for(sae, narrow=narrow), DenseKernel(reference, adam(reference))
    got, expected = sparse.backward(x, Objective()), dense.backward(x, Objective())
    assert sparse.route == "sparse"
    assert got.n_active == expected.n_active
    # of equal entries in different rows a batch may keep either, which are not equally good
    tolerance = 1e-5 if case == "topk" else 1e-3
    torch.testing.assert_close(got.terms["loss"], expected.terms["loss"], rtol=tolerance, atol=0)


@CASE
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_moves_nothing(case, value):
    sae = make(case)
    kernel = SparseKernel(sae, adam(sae))
    settings = StepSettings(1e-3, 1.0, Objective(sparsity=0.3))
    kernel.step(batch(0), settings)
    before = copy.deepcopy(sae.state_dict())
    x = batch(1)
    x[17, 3] = value
    result = kernel.step(x, settings)
    assert not torch.isfinite(result.terms["loss"])
    assert torch.isnan(result.grad_norm)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.isfinite(kernel.step(batch(2), settings).terms["loss"])


def rounding_against(n_rows=40, d_in=64, d_sae=64):
    """Rows and latents whose bfloat16 product is low by nearly all that rounding can take: every factor is rounded down
    by half a step. Returns x, W_enc.T and the float64 products."""
    generator = torch.Generator().manual_seed(0)
    powers = 2.0 ** torch.randint(-2, 3, (d_in,), generator=generator)
    up = 1 + 2.0**-8 - 2.0**-14  # just below the middle between two bfloat16 numbers
    x = (up * powers).repeat(n_rows, 1) * 2.0 ** torch.randint(-3, 4, (n_rows, 1), generator=generator)
    W = (up / powers).repeat(d_sae, 1) * 2.0 ** torch.randint(-3, 4, (d_sae, 1), generator=generator)
    return x, W, x.double() @ W.double().T


def count_found(x, W, exact, *, share):
    """Entries that the kernel finds active where pre is `share` of the product, positive but far below the rounding."""
    sae = build_sae("standard", x.shape[1], len(W))
    sizes = W.norm(dim=1)
    x = x / x.norm(dim=1, keepdim=True)  # of one size, so that one bias per latent meets all rows
    exact = x.double() @ W.double().T
    with torch.no_grad():
        sae.W_enc.copy_(W.T)
        sae.b_enc.copy_(-(1 - share) * exact[0])
    kernel = SparseKernel(sae, adam(sae), narrow=True, dense_above=1.0)
    assert (sizes > 0).all()
    return int(kernel.backward(x, Objective()).n_active)


def test_bfloat16_leaves_no_entry_out():
    x, W, exact = rounding_against()
    low = 1 - (x.bfloat16().double() @ W.bfloat16().double().T / exact).max()
    assert low > 0.0075  # what the rounding takes here, of at most 2^-7 = 0.0078
    assert count_found(x, W, exact, share=1e-4) == exact.numel()
    assert count_found(x, W, exact, share=-1e-4) == 0  # and what is not active is not kept


def test_without_its_margin_bfloat16_would_lose_entries(monkeypatch):
    encode = Space.encode

    def without_margin(self, c, thread):
        finite = encode(self, c, thread)
        self.errors[:] = 0
        return finite

    monkeypatch.setattr(Space, "encode", without_margin)
    x, W, exact = rounding_against()
    assert count_found(x, W, exact, share=1e-4) < exact.numel()


def after(case, n_steps, threads):
    """Parameters after some steps from the same start."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        sae = make(case)
        kernel = SparseKernel(sae, adam(sae))
        for step in range(n_steps):
            kernel.step(batch(step, rows=600), StepSettings(1e-3, 0.05, Objective(sparsity=0.3)))
    finally:
        torch.set_num_threads(before)
    return sae.state_dict()


@CASE
def test_two_runs_and_any_number_of_threads_give_the_same_bits(case):
    first = after(case, 5, 2)
    for threads in (2, 1, 3):
        again = after(case, 5, threads)
        assert all(torch.equal(first[name], again[name]) for name in first)


@CASE
def test_what_a_kernel_remembers_changes_no_bit(case):
    """A resumed run starts with a new kernel: hints from earlier batches must not show in the results."""
    kept, fresh = make(case), make(case)
    optimizer, other = adam(kept), adam(fresh)
    kernel = SparseKernel(kept, optimizer)
    for step in range(5):
        x, settings = batch(step, rows=600), StepSettings(1e-3, 0.05, Objective(sparsity=0.3))
        kernel.step(x, settings)
        SparseKernel(fresh, other).step(x, settings)
    for (name, p), q in zip(kept.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_workers_leave_torch_s_threads_as_they_were():
    before = torch.get_num_threads()
    Pool(before)
    assert torch.get_num_threads() == before


@CASE
def test_kernels_can_take_turns(case):
    """The optimizer's state is torch's own: sparse and dense steps alternate."""
    sae = make(case)
    optimizer = adam(sae)
    turns = [SparseKernel(sae, optimizer, dense_above=1.0), DenseKernel(sae, optimizer)]
    reference = reference_for(turns[0])
    for step in range(6):
        settings = StepSettings(1e-3, 1.0, Objective(sparsity=0.3))
        compare_step(reference, batch(step, rows=400), 300, settings, turns[step % 2])
    assert all(state["step"] == 6 for state in optimizer.state.values())


@CASE
def test_gradient_projection(case):
    kernel = kernel_for(make(case), project_gradient=True)
    reference = reference_for(kernel)
    for step in range(3):
        settings = StepSettings(1e-3, 0.05, Objective(sparsity=0.3))
        compare_step(reference, batch(step, rows=400), 300, settings, kernel)
        assert kernel.route == "sparse"


def test_auto_takes_the_sparse_kernel_where_it_fits():
    sae = make("topk")
    assert make_kernel(sae, adam(sae)).name == "sparse"
    sae.unit_decoder = False
    assert make_kernel(sae, adam(sae)).name == "dense"


def test_without_numba_training_is_dense_and_says_so_once(monkeypatch, caplog):
    for name in list(sys.modules):
        if name.startswith("mechint.kernels.cpu"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sys.modules["mechint.kernels"], "cpu")
    monkeypatch.setitem(sys.modules, "numba", None)
    sae = make("standard")
    with caplog.at_level(logging.WARNING):
        kernel = make_kernel(sae, adam(sae))
    assert kernel.name == "dense"
    assert len(caplog.records) == 1
    assert "numba" in caplog.text


def test_a_kernel_that_computes_nonsense_is_not_used(monkeypatch, caplog):
    cpu.broken.cache_clear()
    monkeypatch.setattr(Space, "weights", lambda self, grads, *rest: 1.0)
    sae = make("topk")
    try:
        with caplog.at_level(logging.WARNING):
            assert make_kernel(sae, adam(sae)).name == "dense"
    finally:
        cpu.broken.cache_clear()
    assert "does not work here" in caplog.text


def test_kernels_of_one_shape_share_their_buffers():
    first, second = (SparseKernel(sae, adam(sae)) for sae in (make("standard"), make("standard", seed=1)))
    alone = [kernel.backward(batch(5), Objective(sparsity=0.3)).terms["loss"] for kernel in (first, second)]
    assert first._space is second._space
    assert alone[0] != alone[1]
    assert first.backward(batch(5), Objective(sparsity=0.3)).terms["loss"] == alone[0]


@pytest.mark.slow
@CASE
def test_200_steps(case):
    """From the states that the reference goes through."""
    kernels = [kernel_for(make(case), narrow=narrow) for narrow in (True, False)]
    settings = StepSettings(1e-3, 1.0, Objective(sparsity=0.3))
    for _ in compare_along(reference_for(kernels[0]), lambda step: batch(step, rows=400), 300, settings, *kernels):
        assert all(kernel.route == "sparse" for kernel in kernels)


@pytest.mark.slow
@CASE
def test_whole_runs_end_alike(case):
    """Three seeds each: the same loss, L0 and dead latents at the end as the dense kernel's, within seed noise."""

    def run(kernel, seed):
        architecture, options = CASES[case]
        sae = build_sae(architecture, 64, 256, generator=torch.Generator().manual_seed(seed), options=options)
        trainer = kernel(sae, adam(sae))
        sparsity = 3.0 if sae.has_l1 else 0.5  # such that every case ends sparse; some begin dense
        losses, active, fired = [], [], torch.zeros(256, dtype=torch.int64)
        routes = set()
        for step in range(300):
            x = batch(1000 * seed + step, rows=256)
            result = trainer.step(x, StepSettings(3e-3, 1.0, Objective(sparsity=sparsity)))
            routes.add(getattr(trainer, "route", "dense"))
            if step >= 200:
                losses.append(result.terms["loss"].item())
                active.append(result.n_active.item() / 256)
                fired += result.fire_counts
        return [sum(losses) / 100, sum(active) / 100, float((fired == 0).sum())], routes

    ours, reference = ([run(kernel, seed) for seed in range(3)] for kernel in (SparseKernel, DenseKernel))
    assert any("sparse" in routes for _, routes in ours)
    assert_end_alike(*([values for values, _ in runs] for runs in (ours, reference)))


@NARROW
def test_many_entries_a_row_are_read_in_tiles(narrow):
    """The same, where rows have so many entries that weights are read tile by tile."""
    got = compare(kernel_for(make("standard", d_sae=3000, active=0.1), narrow=narrow))
    assert got.n_active > TILED_ABOVE * 300
