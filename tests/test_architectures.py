"""What holds for every architecture, found by its file: a new one is tested by being there. Then each one's maths."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechint.config import SAETrainConfig
from mechint.config.train import architecture_names
from mechint.errors import MechintError
from mechint.kernels import DenseKernel, StepSettings
from mechint.sae import ARCHITECTURES, SAE, Objective, build_sae, load_sae, save_checkpoint
from mechint.sae.architectures.matryoshka_batchtopk import draw_widths
from mechint.sae.init import centre, fit_encoder, input_scale, set_density, tie_encoder
from mechint.train.dead import dead_latents, resample

D_IN, D_SAE, BATCH = 12, 40, 64
NAMES = architecture_names()


def small_options(architecture: str) -> dict[str, Any]:
    return {"k": 4} if "k" in ARCHITECTURES[architecture].options else {}


def make(architecture: str, seed: int = 0, **options: Any) -> SAE:
    """A small SAE whose biases are not 0, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    options = {**small_options(architecture), **options}
    sae = build_sae(architecture, D_IN, D_SAE, generator=generator, options=options)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name.startswith("b_") or name == "r_mag":
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif name == "threshold":
                parameter.copy_(0.3 * torch.rand(parameter.shape, generator=generator))
    return sae


def batch(seed: int = 1, rows: int = BATCH) -> torch.Tensor:
    return torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(seed))


def train_steps(sae: SAE, steps: int = 5) -> SAE:
    kernel = DenseKernel(sae, torch.optim.Adam(sae.parameters(), lr=1e-2))
    for step in range(steps):
        kernel.step(batch(step), StepSettings(1e-2, 1.0, Objective(sparsity=0.1)))
    return sae


def test_every_file_registers_the_architecture_it_is_named_after():
    assert len(NAMES) >= 6 and set(NAMES) <= set(ARCHITECTURES)
    for name in NAMES:
        assert ARCHITECTURES[name].__module__.endswith(f".{name}")


@pytest.mark.parametrize("architecture", NAMES)
def test_step_moves_every_parameter_and_keeps_the_decoder_unit(architecture: str):
    sae = make(architecture)
    before = copy.deepcopy(sae.state_dict())
    train_steps(sae, 3)
    still = [name for name, _ in sae.named_parameters() if torch.equal(before[name], sae.state_dict()[name])]
    assert not still
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE), rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", NAMES)
def test_training_lowers_the_loss(architecture: str):
    sae = make(architecture)
    x = batch(rows=512)
    kernel = DenseKernel(sae, torch.optim.Adam(sae.parameters(), lr=1e-2))
    losses = [kernel.step(x, StepSettings(1e-2, 10.0, Objective(sparsity=0.01))).terms["loss"] for _ in range(100)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("architecture", NAMES)
def test_loss_is_the_weighted_sum_of_its_named_terms(architecture: str):
    sae = make(architecture)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[3, 9, 20]] = True
    loss = sae.loss(batch(), Objective(sparsity=0.3, dead=dead, k_aux=2, aux_coefficient=0.25))
    assert {"mse", "auxk"} <= loss.terms.keys() == loss.weights.keys()
    by_hand = sum(loss.weights[name] * term.item() for name, term in loss.terms.items())
    assert loss.total.item() == pytest.approx(by_hand, rel=1e-6)
    assert (loss.feature_acts >= 0).all()


@pytest.mark.parametrize("decoder", ["unit", "free"])
@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("architecture", NAMES)
def test_saved_form_reconstructs_what_was_trained(architecture: str, scale: float, decoder: str):
    """Folding moves factors between tensors; every reconstruction stays where it was, and the original as it was."""
    sae = make(architecture)
    sae.unit_decoder = decoder == "unit"
    if decoder == "free":
        sae.W_dec.data.mul_(torch.linspace(0.5, 2.0, D_SAE)[:, None])
    train_steps(sae, 4)
    before = copy.deepcopy(sae.state_dict())
    saved = sae.saved_form(scale)
    x = batch(7)
    with torch.no_grad():
        x_hat, acts = sae.run(x * scale)
        saved_hat, saved_acts = saved.run(x)
    # a pre-activation may round to the other side of a threshold: at most one entry in a thousand
    agree = ((acts != 0) == (saved_acts != 0)).float().mean()
    assert agree > 0.999
    same = ((acts != 0) == (saved_acts != 0)).all(dim=1)
    torch.testing.assert_close(saved_hat[same], x_hat[same] / scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(saved.W_dec.norm(dim=1), torch.ones(D_SAE), rtol=0, atol=1e-5)
    assert saved.unit_decoder and all(torch.equal(before[name], value) for name, value in sae.state_dict().items())


@pytest.mark.parametrize("architecture", NAMES)
def test_saved_form_survives_both_layouts(architecture: str, tmp_path: Path):
    saved = train_steps(make(architecture)).saved_form()
    saved.metadata = {**saved.metadata, "processing": "raw", "hook_name": "blocks.3.hook_resid_post"}
    save_checkpoint(saved, tmp_path / "checkpoint.pt")
    saved.save_model(tmp_path / "sae")
    x = batch(3)
    with torch.no_grad():
        expected = saved.encode(x)
        for path in (tmp_path / "checkpoint.pt", tmp_path / "sae"):
            opened = load_sae(path)
            assert type(opened) is type(saved) and opened.metadata["processing"] == "raw"
            # the layout of W_enc in memory differs, and with it the order of sums
            torch.testing.assert_close(opened.encode(x), expected, rtol=1e-5, atol=1e-6)
            for name, tensor in saved.tensors().items():
                assert torch.equal(opened.tensors()[name], tensor), name


@pytest.mark.parametrize("architecture", NAMES)
def test_auxk_wakes_a_dead_latent(architecture: str):
    """A latent that never fires gets a gradient from auxk and from nothing else, and points at what is missing."""
    sae = make(architecture)
    x = batch(rows=256)
    bias = sae.get_parameter(sae.latent_offsets()[0])
    with torch.no_grad():
        bias[5] = -50.0 if not sae.aux_relu else bias[5]
        if sae.aux_relu:  # off by selection: positive, but never among the largest
            sae.W_enc[:, 5] *= 1e-3
            bias[5] = 1e-3
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[5] = True
    for aux, moved in [(0.0, False), (1 / 32, True)]:
        sae.zero_grad()
        loss = sae.loss(x, Objective(dead=dead, k_aux=4, aux_coefficient=aux))
        assert not (loss.feature_acts[:, 5] > 0).any()
        loss.total.backward()
        assert sae.W_dec.grad is not None and bool(sae.W_dec.grad[5].any()) == moved


@pytest.mark.parametrize("architecture", NAMES)
def test_resampling_points_dead_latents_at_what_is_missed(architecture: str):
    sae = train_steps(make(architecture))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    DenseKernel(sae, optimizer).step(batch(), StepSettings(1e-3, 1.0, Objective()))
    x = torch.cat([batch(2, 8) * 0.01, 30 * torch.nn.functional.one_hot(torch.tensor([4]), D_IN).float()])
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[1, 7]] = True
    before = copy.deepcopy(sae.state_dict())
    again = copy.deepcopy((sae, optimizer))
    assert resample(sae, optimizer, dead, x, seed=3, step=10) == 2
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE), rtol=0, atol=1e-5)
    direction = torch.nn.functional.normalize(x[-1] - sae.b_dec, dim=0)
    assert (sae.W_dec[dead] @ direction).min() > 0.99, "the one row that is reconstructed badly"
    assert torch.equal(sae.W_dec[~dead], before["W_dec"][~dead])
    assert not optimizer.state[sae.W_enc]["exp_avg"][:, dead].any()
    assert optimizer.state[sae.W_enc]["exp_avg"][:, ~dead].any()
    resample(*again, dead, x, seed=3, step=10)
    assert all(torch.equal(again[0].state_dict()[name], value) for name, value in sae.state_dict().items())


def test_options_belong_to_architectures():
    with pytest.raises(MechintError, match="--k does not apply to architecture 'standard', only to batchtopk"):
        build_sae("standard", D_IN, D_SAE, options={"k": 3})
    with pytest.raises(MechintError, match="unknown architecture 'topq'; nearest: topk"):
        build_sae("topq", D_IN, D_SAE)
    for k in (0, D_SAE + 1, 2.5):
        with pytest.raises(MechintError, match="whole number from 1 to d_sae"):
            build_sae("topk", D_IN, D_SAE, options={"k": k})
    with pytest.raises(MechintError, match="belong together"):
        build_sae("jumprelu", D_IN, D_SAE, options={"penalty": "quadratic"})
    with pytest.raises(MechintError, match="--widths must ascend"):
        build_sae("matryoshka_batchtopk", D_IN, D_SAE, options={"widths": (8, 4)})


# --- each architecture's own maths, in closed form --------------------------------------------------------------------


def test_topk_keeps_the_k_largest_and_of_those_the_positive():
    sae = make("topk", k=3)
    pre = sae.pre_activations(batch())
    acts = sae.encode(batch())
    order = pre.sort(dim=1, descending=True).values
    for row in range(BATCH):
        expected = [value for value in order[row, :3].tolist() if value > 0]
        assert sorted(acts[row][acts[row] > 0].tolist(), reverse=True) == expected


def test_batchtopk_counts_over_the_batch_and_learns_its_cut():
    sae = make("batchtopk", k=2.5)
    acts = sae.loss(batch(), Objective()).feature_acts
    kept = acts[acts > 0]
    assert len(kept) == round(2.5 * BATCH)
    dropped = sae.pre_activations(batch()).relu()[acts == 0]
    assert kept.min() >= dropped.max()
    assert sae.last_cut is not None and sae.last_cut == kept.min()
    sae.constrain()
    assert sae.threshold.item() == pytest.approx(kept.min().item(), rel=1e-6), "the first batch counts in full"
    assert sae.last_cut is None
    # one vector at a time: what is above the mean cut
    x = batch(5)
    expected = sae.pre_activations(x) * (sae.pre_activations(x) > sae.threshold)
    torch.testing.assert_close(sae.encode(x), expected)


def test_batchtopk_without_a_positive_activation():
    sae = make("batchtopk")
    sae.b_enc.data.fill_(-100.0)
    loss = sae.loss(batch(), Objective())
    assert not loss.feature_acts.any() and sae.last_cut is None
    sae.constrain()
    assert sae.cut_weight == 0


def test_matryoshka_mse_is_the_mean_over_prefixes():
    sae = make("matryoshka_batchtopk", widths=(5, 20))
    assert sae.widths == (5, 20, D_SAE)
    x = batch()
    loss = sae.loss(x, Objective())
    acts = loss.feature_acts
    errors = [(acts[:, :w] @ sae.W_dec[:w] + sae.b_dec - x).pow(2).mean().item() for w in sae.widths]
    assert loss.total.item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert loss.terms["mse"].item() == pytest.approx(errors[-1], rel=1e-5)


@given(st.integers(2, 3000), st.integers(1, 12), st.integers(0, 2**40), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_drawn_prefixes(d_sae: int, count: int, seed: int, step: int):
    widths = draw_widths(d_sae, count, seed, step)
    assert widths == draw_widths(d_sae, count, seed, step)
    assert widths[-1] == d_sae and len(widths) == min(count, d_sae) and list(widths) == sorted(set(widths))


def test_drawn_prefixes_are_pareto():
    """P(length <= l) = (1 - (l + 1)^-1/2) / (1 - d_sae^-1/2) for a single drawn prefix: within 4 standard errors."""
    drawn = np.array([draw_widths(256, 2, 0, step)[0] for step in range(4000)])
    for length in (1, 8, 64):
        share = (1 - (length + 1) ** -0.5) / (1 - 256**-0.5)
        assert (drawn <= length).mean() == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)


@pytest.mark.parametrize("penalty", ["step", "tanh", "quadratic"])
@pytest.mark.parametrize("ste_to_input", [False, True])
def test_jumprelu_gradients_are_the_published_ones(penalty: str, ste_to_input: bool):
    """d/d threshold and d/d b_enc from eqs. 10-12 of the paper, by hand in float64."""
    extra = {"target_l0": 5.0} if penalty == "quadratic" else {}
    sae = make("jumprelu", penalty=penalty, bandwidth=0.4, tanh_scale=2.0, ste_to_input=ste_to_input, **extra).double()
    x, lam = batch().double(), 0.7
    loss = sae.loss(x, Objective(sparsity=lam))
    loss.total.backward()
    with torch.no_grad():
        pre, theta = sae.pre_activations(x), sae.threshold
        on = (pre > theta).double()
        f = pre * on
        window = ((pre - theta).abs() < 0.2).double()
        df = 2 / x.numel() * (sae.decode(f) - x) @ sae.W_dec.T
        l0 = on.sum(dim=1).mean()
        if penalty == "tanh":
            value = torch.tanh(2 * f).sum(dim=1).mean()
            df = df + lam / D_IN / BATCH * 2 * (1 - torch.tanh(2 * f) ** 2)
            d_step = torch.zeros_like(pre)
        else:
            value = l0 if penalty == "step" else (l0 / 5 - 1) ** 2
            d_step = torch.full_like(pre, lam / D_IN / BATCH * (1 if penalty == "step" else 2 * (l0 / 5 - 1) / 5))
        d_theta = (-(theta / 0.4) * window * df - window / 0.4 * d_step).sum(dim=0)
        d_b_enc = (df * on + (window / 0.4 * d_step if ste_to_input else 0)).sum(dim=0)
    assert loss.terms["l0_penalty"].item() == pytest.approx(value.item() / D_IN, rel=1e-12)
    torch.testing.assert_close(sae.threshold.grad, d_theta, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(sae.b_enc.grad, d_b_enc, rtol=1e-10, atol=1e-14)


def test_jumprelu_pre_act_lifts_only_dead_latents():
    sae = make("jumprelu", pre_act_coefficient=0.5)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[2] = True
    loss = sae.loss(batch(), Objective(dead=dead))
    below = (sae.threshold - sae.pre_activations(batch())).relu()[:, 2].mean() / D_IN
    assert loss.terms["pre_act"].item() == pytest.approx(below.item(), rel=1e-6) and loss.weights["pre_act"] == 0.5
    sae.threshold.data.fill_(-1.0)
    sae.constrain()
    assert (sae.threshold == 0).all()


def test_gated_decoder_gets_no_gradient_from_the_gate():
    sae = make("gated")
    x = batch()
    loss = sae.loss(x, Objective())
    (grad,) = torch.autograd.grad(loss.terms["gate_mse"], [sae.W_dec], allow_unused=True)
    assert grad is None
    u = (x - sae.b_dec) @ sae.W_enc
    expected = ((u + sae.b_gate) > 0) * torch.relu(u * sae.r_mag.exp() + sae.b_mag)
    torch.testing.assert_close(loss.feature_acts, expected)


@pytest.mark.parametrize("architecture", [name for name in NAMES if name != "jumprelu"])
def test_gradients_by_finite_differences(architecture: str):
    """In float64, where the loss is smooth: the direction of the gradient itself, central differences."""
    sae = make(architecture).double()
    x = batch().double()
    objective = Objective(sparsity=0.3)
    sae.loss(x, objective).total.backward()
    # gate_mse and selections treat some factors as constants, so the decoder of a gated SAE is left out
    names = [name for name, _ in sae.named_parameters() if not (architecture == "gated" and name in ("W_dec", "b_dec"))]
    step = 1e-7
    for name in names:
        parameter = sae.get_parameter(name)
        assert parameter.grad is not None
        direction = parameter.grad / parameter.grad.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                values.append(sae.loss(x, objective).total.item())
                parameter.add_(-sign * step * direction)
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(parameter.grad.norm().item(), rel=1e-4), name


# --- where training starts --------------------------------------------------------------------------------------------


def test_tied_encoder_and_scale_and_centre():
    sae = make("standard")
    tie_encoder(sae, 0.1)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((D_SAE,), 0.1))
    x = batch(rows=500) * 3 + 5
    for how, rows in [("mean-norm", x), ("centred-norm", x - x.mean(dim=0))]:
        scale = input_scale(x, how)
        assert (rows * scale).norm(dim=1).mean().item() == pytest.approx(D_IN**0.5, rel=1e-5)
    assert input_scale(x, "none") == 1.0
    torch.testing.assert_close(centre(x, "mean"), x.mean(dim=0))
    with pytest.raises(MechintError, match="all equal"):
        input_scale(torch.ones(9, D_IN), "centred-norm")


def test_fitted_encoder_is_the_tied_one_at_the_best_length():
    """No other length of the encoder reconstructs the sample better at the start, and a tied one overshoots."""
    torch.manual_seed(0)
    sae = build_sae("standard", 8, 64)
    tie_encoder(sae)
    sample = torch.randn(300, 8) + 1.0
    sae.b_dec.data.copy_(sample.mean(dim=0))
    direction = sae.W_dec[3].clone()
    scale = fit_encoder(sae, sample)
    assert scale < 0.5  # half of 64 latents are active, four times as many as there are dimensions
    torch.testing.assert_close(sae.W_enc[:, 3], scale * direction)

    def error(times: float) -> float:
        other = copy.deepcopy(sae)
        other.W_enc.data.mul_(times)
        return (other(sample) - sample).square().mean().item()

    assert error(1.0) < min(error(0.97), error(1.03), error(1 / scale))


def test_saturation_weighs_strong_activations_less():
    """By hand: one latent, f = 3 and f = 1, penalties f / (1 + f / 2); their force on f is 1 / (1 + f / 2)^2."""
    sae = build_sae("standard", 1, 1, options={"saturation": 0.5})
    with torch.no_grad():
        for name, value in {"W_enc": 1.0, "W_dec": 1.0, "b_enc": 0.0, "b_dec": 0.0}.items():
            sae.get_parameter(name).fill_(value)
    x = torch.tensor([[3.0], [1.0]])
    loss = sae.loss(x, Objective(sparsity=2.0))
    assert loss.terms["l1"].item() == pytest.approx((3 / 2.5 + 1 / 1.5) / 2)
    loss.total.backward()
    # x is reconstructed exactly, so that only the penalty moves anything
    assert sae.b_enc.grad.item() == pytest.approx(2.0 * (1 / 2.5**2 + 1 / 1.5**2) / 2)
    with pytest.raises(MechintError, match="saturation"):
        build_sae("standard", 4, 8, options={"saturation": -1.0})
    with pytest.raises(MechintError, match="only to standard"):
        build_sae("topk", 4, 8, options={"saturation": 1.0})


def test_geometric_median_is_where_unit_vectors_cancel_and_ignores_an_outlier():
    x = batch(rows=401)
    x[0] = 1e6
    point = centre(x, "median").double()
    pull = torch.nn.functional.normalize(x.double() - point, dim=1).sum(dim=0)
    assert pull.norm() < 0.05 and point.norm() < 1 < x.mean(dim=0).norm()


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_density_at_the_start(architecture: str):
    sae = make(architecture)
    if architecture == "gated":
        sae.get_parameter("r_mag").data.zero_()  # as at the start of a training: gate and magnitude then agree
    x = batch(rows=2000)
    set_density(sae, x, 4.0)
    with torch.no_grad():
        share = (sae.encode(x) > 0).float().mean(dim=0)
    torch.testing.assert_close(share, torch.full((D_SAE,), 4 / D_SAE), rtol=0, atol=2 / 2000)


@pytest.mark.parametrize("architecture", NAMES)
def test_the_recommended_preset_is_for_every_architecture(architecture: str):
    words = {"preset": "mechint", "architecture": architecture, "epochs": 500, "batch_size": 200}
    config = SAETrainConfig.from_dict(words)
    sae = build_sae(architecture, D_IN, D_SAE, options={**config.architecture_options, **small_options(architecture)})
    assert getattr(sae, "saturation", None) == (1.0 if architecture == "standard" else None)
    # shares of the training, so that it means the same at any number of steps
    assert config.dead_after_vectors == 0.02 * 500 * 200
    assert config.with_overrides(dead_after=77).dead_after_vectors == 77


def test_dead_means_silent_for_that_many_vectors():
    last_fired = torch.tensor([-1, 0, 7, 9])
    # before step 10, with 100 vectors a step: silent for 1000, 900, 200 and 0 vectors
    assert dead_latents(last_fired, 10, batch_size=100, dead_after=900).tolist() == [True, True, False, False]
    assert dead_latents(last_fired, 10, batch_size=100, dead_after=901).tolist() == [True, False, False, False]


@pytest.mark.parametrize("architecture", [name for name in NAMES if ARCHITECTURES[name].latents_are_independent])
def test_independent_latents_can_be_encoded_alone(architecture: str):
    """`only` shares the memory, and gives the columns of `encode`."""
    sae, x = make(architecture), batch()
    part = sae.only(slice(3, 5))
    assert part.d_sae == 2 and part.W_dec.data_ptr() == sae.W_dec[3:].data_ptr()
    torch.testing.assert_close(part.encode(x), sae.encode(x)[:, 3:5], rtol=1e-5, atol=1e-6)
    assert sae.W_enc.shape == (D_IN, D_SAE)


def test_a_config_of_an_earlier_preset_is_read():
    """`--preset mechint` once set standard's saturation for every architecture, and config.json holds it."""
    old = {"preset": "mechint", "architecture": "topk", "saturation": 1.0}
    assert "saturation" not in SAETrainConfig.from_dict(old).architecture_options
    assert SAETrainConfig.from_dict(old | {"architecture": "standard"}).architecture_options == {"saturation": 1.0}
