"""The sparse CPU kernel equals the dense reference, whatever the batch looks like."""

import copy

import pytest
import torch

from mechint.kernels import DenseKernel
from mechint.kernels.sparse import SparseKernel
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


def make(case, d_in=64, d_sae=256, *, active=0.08, seed=0, dtype=torch.float32):
    """An SAE on which about that share of the latents is active, and its Adam."""
    architecture, options = CASES[case]
    sae = build_sae(architecture, d_in, d_sae, generator=torch.Generator().manual_seed(seed), options=options)
    with torch.no_grad():
        x = batch(seed=99, d_in=d_in, rows=512)
        pre = sae.pre_activations(x)
        bias = sae.get_parameter(sae.latent_offsets()[0])
        bias.sub_(pre.flatten().quantile(1 - active))
        sae.b_dec.copy_(0.1 * torch.randn(d_in, generator=torch.Generator().manual_seed(seed)))
    return sae.to(dtype)


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


def both(case, x, objective=None, *, narrow=True, dense_above=1.0, **kwargs):
    """One backward of each kernel from the same state."""
    sae = make(case, **kwargs)
    ours, reference = copy.deepcopy(sae), copy.deepcopy(sae)
    # 1.0: nothing is too dense, so that it is the sparse route that is tested
    sparse = SparseKernel(ours, adam(ours), narrow=narrow, dense_above=dense_above)
    dense = DenseKernel(reference, adam(reference))
    objective = objective or Objective(sparsity=0.3)
    return sparse, sparse.backward(x, objective), dense, dense.backward(x, objective)


def assert_same(sparse, got, dense, expected, *, tolerance=2e-5, route="sparse"):
    assert sparse.route == route
    assert got.terms.keys() == expected.terms.keys()
    for name in expected.terms:
        torch.testing.assert_close(got.terms[name], expected.terms[name], rtol=tolerance, atol=1e-7)
    torch.testing.assert_close(got.fire_counts, expected.fire_counts)
    assert got.n_active == expected.n_active
    for (name, p), q in zip(sparse.sae.named_parameters(), dense.sae.parameters(), strict=True):
        size = q.grad.abs().max()
        torch.testing.assert_close(
            p.grad, q.grad, rtol=0, atol=float(tolerance * size) + 1e-9, msg=lambda m, n=name: n + m
        )


@CASE
@NARROW
@pytest.mark.parametrize(
    ("rows", "d_in", "d_sae"),
    [(300, 64, 256), (64, 128, 512), (1, 64, 256), (257, 20, 70), (33, 50, 16), (520, 96, 1000)],
)
def test_gradients_of_a_batch(case, narrow, rows, d_in, d_sae):
    x = batch(1, d_in, rows)
    assert_same(*both(case, x, narrow=narrow, d_in=d_in, d_sae=d_sae))


@CASE
@pytest.mark.parametrize("active", [0.1, 0.5])
def test_a_dense_batch_goes_the_dense_route(case, active):
    x = batch(1, rows=520)
    results = both(case, x, dense_above=0.001, active=active, d_sae=600)
    assert_same(*results, route="dense")
