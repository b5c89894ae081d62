"""Attribution of all latents against finite differences in float64; its KL against the exact one of small edits."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mechint.ablation import LogitTarget, attribute, attribution, attribution_map, gradient, spearman
from mechint.errors import MechintError
from mechint.eval import Text
from mechint.models import load_model, matmul
from mechint.sae import StandardSAE

HOOK = "blocks.3.hook_resid_post"
D_SAE = 48
TOKENS = [[0, 9, 40, 17, 3, 88, 250], [0, 5, 6, 7], [0, 200, 131, 77, 9, 9, 30, 12, 4]]
TEXTS = [Text(tokens, [False] + [True] * (len(tokens) - 1)) for tokens in TOKENS]


def load(folder, processing="raw", **kwargs):
    """In float64, with logits as large as a trained model's."""
    model = load_model(str(folder), device="cpu", processing=processing, **kwargs)
    model.hf_model.double()
    model.hf_model.get_output_embeddings().weight.mul_(20.0)
    return model


@pytest.fixture(scope="module")
def model(tiny_neox_dir):
    return load(tiny_neox_dir)


@pytest.fixture(scope="module")
def sae(model):
    torch.manual_seed(3)
    sae = StandardSAE(model.d_model, D_SAE)
    with torch.no_grad():
        sae.b_dec.copy_(0.1 * torch.randn(model.d_model))
        sae.b_enc.copy_(torch.linspace(-3, 1, D_SAE))
        sae.b_enc[-3:] = -1e6  # never fire
    return sae.double().requires_grad_(False)


def predictions(model, sae, text, latent, factor, position=None, hook=HOOK):
    """Log-softmax with f_latent times `factor` where the SAE may touch (or at one position), by a plain hook."""
    where = torch.tensor(text.seen).double()
    if position is not None:
        where = where * (torch.arange(len(text.tokens)) == position)

    def edit(module, args, out):
        value = out - out.mean(-1, keepdim=True) if model.processing == "centred" else out
        f = torch.relu((value - sae.b_dec) @ sae.W_enc[:, latent] + sae.b_enc[latent])
        return out + ((factor - 1) * where * f)[..., None] * sae.W_dec[latent]

    block = model.hf_model.gpt_neox.layers[int(hook.split(".")[1])]
    handle = block.register_forward_hook(edit)
    logits = model.hf_model(torch.tensor([text.tokens])).logits[0]
    handle.remove()
    return logits


def ce(logits, text):
    return float(F.cross_entropy(logits[:-1], torch.tensor(text.tokens[1:])))


def slope(quantity, step=1e-4):
    """d quantity / d factor at 1, with its sign turned: what removing does to first order."""
    return -(quantity(1 + step) - quantity(1 - step)) / (2 * step)


@pytest.mark.parametrize("processing", ["raw", "centred"])
@pytest.mark.parametrize("hook", [HOOK, "blocks.0.hook_resid_post", "blocks.5.hook_resid_post"])
def test_map_is_the_derivative(tiny_neox_dir, sae, processing, hook):
    model = load(tiny_neox_dir, processing)
    text = TEXTS[0]
    found = attribution_map(sae, model, hook, text)
    firing = torch.nonzero(found)
    assert len(firing) > 20
    assert not found[0].any(), "the SAE may not touch position 0"
    assert not found[:, -3:].any()
    generator = torch.Generator().manual_seed(0)
    for position, latent in firing[torch.randperm(len(firing), generator=generator)[:12]].tolist():
        expected = slope(lambda c, p=position, i=latent: ce(predictions(model, sae, text, i, c, p, hook), text))
        assert float(found[position, latent]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_text_with_every_position_seen_has_its_first_one(model, sae):
    text = Text(TOKENS[0], [True] * 7)
    assert attribution_map(sae, model, HOOK, text)[0].any()


@pytest.mark.parametrize(
    "target", [LogitTarget((7,)), LogitTarget((7, 8), (9,), at=2), LogitTarget((7,), (1, 2, 3), -2)]
)
def test_logit_target_is_the_derivative(model, sae, target):
    text = TEXTS[2]
    found = attribution_map(sae, model, HOOK, text, target=target)

    def quantity(latent, c):
        logits = predictions(model, sae, text, latent, c)[target.at]
        against = logits[list(target.against)].mean() if target.against else 0.0
        return float(logits[list(target.tokens)].mean() - against)

    sums = found.sum(0)
    latents = torch.nonzero(sums).flatten().tolist()[:8]
    assert latents
    for latent in latents:
        assert float(sums[latent]) == pytest.approx(slope(lambda c, i=latent: quantity(i, c)), rel=1e-6, abs=1e-9)
    assert not found[target.at % len(text.tokens) + 1 :].any(), "what comes after cannot matter"


def test_sums_over_texts(model, sae):
    found = attribute(sae, model, HOOK, TEXTS, draws=0)
    maps = [attribution_map(sae, model, HOOK, text) for text in TEXTS]
    per_text = torch.stack([part.sum(0) for part in maps])
    torch.testing.assert_close(found.signed, per_text.sum(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.absolute, per_text.abs().sum(0), rtol=1e-9, atol=1e-12)
    fires = [(sae.encode(model.activations(torch.tensor([t.tokens]), HOOK)[0]) > 0)[1:] for t in TEXTS]
    assert found.n_active.tolist() == sum(part.sum(0) for part in fires).tolist()
    assert found.n_active_texts.tolist() == sum(part.any(0).long() for part in fires).tolist()
    assert (found.n_texts, found.n_tokens) == (3, 20)
    assert not found.kl.any()


def test_batches_order_and_parts_do_not_matter(model, sae, monkeypatch):
    whole = attribute(sae, model, HOOK, TEXTS, draws=2, seed=4)
    others = {
        "one at a time": attribute(sae, model, HOOK, TEXTS, draws=2, seed=4, batch_size=1),
        "backwards": attribute(sae, model, HOOK, TEXTS[::-1], draws=2, seed=4),
        "in parts": attribute(sae, model, HOOK, TEXTS[:1], draws=2, seed=4)
        + attribute(sae, model, HOOK, TEXTS[1:], draws=2, seed=4),
    }
    monkeypatch.setattr(attribution, "ROWS", 3)
    others["few rows at a time"] = attribute(sae, model, HOOK, TEXTS, draws=2, seed=4)
    for name, other in others.items():
        for field in ("signed", "absolute", "kl", "kl_squares"):
            torch.testing.assert_close(getattr(other, field), getattr(whole, field), rtol=1e-8, atol=1e-14, msg=name)
        assert (other.n_texts, other.n_tokens) == (whole.n_texts, whole.n_tokens)
        assert torch.equal(other.n_active, whole.n_active)
    again = attribute(sae, model, HOOK, TEXTS, draws=2, seed=5)
    assert not torch.allclose(again.kl, whole.kl), "another seed draws otherwise"
    torch.testing.assert_close(again.signed, whole.signed)


def test_a_model_without_a_plain_unembedding_goes_through_its_logits(model, sae, monkeypatch):
    whole = attribute(sae, model, HOOK, TEXTS, draws=2)
    target = attribution_map(sae, model, HOOK, TEXTS[0], target=LogitTarget((4,), (5,)))
    assert gradient.find_way(model, HOOK, TOKENS[0]).weight is not None
    monkeypatch.setattr(gradient, "SAME_MODEL_KL", -1.0)
    assert gradient.find_way(model, HOOK, TOKENS[0]).weight is None
    other = attribute(sae, model, HOOK, TEXTS, draws=2)
    torch.testing.assert_close(other.signed, whole.signed, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(other.kl, whole.kl, rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(attribution_map(sae, model, HOOK, TEXTS[0], target=LogitTarget((4,), (5,))), target)


@pytest.mark.parametrize("onednn", [False, True])
def test_float32_is_float64_up_to_rounding(tiny_neox_dir, model, sae, onednn, monkeypatch):
    """The products that go another way in float32, forwards and backwards."""
    monkeypatch.setattr(matmul, "onednn_pays", lambda: onednn)
    single = load_model(str(tiny_neox_dir), device="cpu")
    single.hf_model.get_output_embeddings().weight.mul_(20.0)
    texts = [Text(text.tokens * 4, text.seen * 4) for text in TEXTS]  # enough rows for the fast product
    expected = attribute(sae, model, HOOK, texts, draws=2)
    sae32 = copy.deepcopy(sae).float()
    found = attribute(sae32, single, HOOK, texts, draws=2)
    for field in ("signed", "absolute", "kl"):
        exact = getattr(expected, field)
        assert (getattr(found, field) - exact).abs().max() < 1e-4 * exact.abs().max(), field
    assert torch.equal(found.n_active, expected.n_active)


@pytest.mark.slow
def test_other_hooks_through_the_bridge(tiny_neox_dir, sae):
    """An edit of the MLP's output is the same edit of the residual stream behind it (the blocks add in parallel)."""
    bridged = load(tiny_neox_dir, backend="bridge")
    found = attribution_map(sae, bridged, "blocks.3.hook_mlp_out", TEXTS[0])
    value = bridged.activations(torch.tensor([TOKENS[0]]), "blocks.3.hook_mlp_out")[0]
    acts = sae.encode(value)
    position, latent = torch.nonzero(found)[5].tolist()

    def quantity(c):
        change = torch.zeros_like(value)
        change[position] = (c - 1) * acts[position, latent] * sae.W_dec[latent]
        logits = bridged.logits_with(torch.tensor([TOKENS[0]]), "blocks.3.hook_mlp_out", lambda v: v + change)[0]
        return ce(logits, TEXTS[0])

    assert float(found[position, latent]) == pytest.approx(slope(quantity), rel=1e-5, abs=1e-8)


def test_draw_has_the_fisher_information_as_covariance():
    generator = torch.Generator().manual_seed(1)
    p = torch.tensor([[0.9, 0.05, 0.03, 0.015, 0.005], [0.2, 0.2, 0.2, 0.2, 0.2]], dtype=torch.float64)
    n = 200_000
    tokens, factor = attribution._draw(p, torch.rand(2, 2, n, generator=generator, dtype=torch.float64))
    for row in range(2):
        v = (F.one_hot(tokens[row], 5) - p[row]) * factor[row][:, None]
        fisher = torch.diag(p[row]) - torch.outer(p[row], p[row])
        spread = fisher.diagonal().sum()
        # all draws are equally long, so an entry of the mean outer product is off by about spread / sqrt(n)
        assert (v.T @ v / n - fisher).abs().max() < 5 * spread / n**0.5
        assert v.mean(0).abs().max() < 5 * (spread / n) ** 0.5
        torch.testing.assert_close(v.square().sum(1), spread.expand(n))
    certain = torch.tensor([[1.0, 0.0, 0.0]])
    tokens, factor = attribution._draw(certain, torch.rand(1, 2, 8, generator=generator))
    assert bool(torch.isfinite(factor).all()) and int(tokens.max()) < 3


def test_kl_is_the_exact_one_for_small_removals(model, sae):
    """With f scaled by 1 - c the exact KL goes as c**2 times what is estimated for c = 1."""
    draws = 1500
    found = attribute(sae, model, HOOK, TEXTS, draws=draws, seed=2)
    c = 1e-3
    checked = 0
    for latent in torch.argsort(found.kl, descending=True)[:6].tolist():
        exact = 0.0
        for text in TEXTS:
            log_p, log_q = (predictions(model, sae, text, latent, f).log_softmax(-1) for f in (1.0, 1.0 - c))
            exact += float((log_p.exp() * (log_p - log_q)).sum(-1).mean()) / c**2
        # a**2 of a text is spread like chi square with one degree of freedom, a little more: 5 standard errors
        assert float(found.kl[latent]) == pytest.approx(exact, rel=5 * (2.5 / draws) ** 0.5)
        checked += exact > 0
    assert checked == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, "no texts"),
        ({"texts": [Text([3], [True])]}, "text 1 has 1 tokens"),
        ({"draws": -1}, "draws must not be negative"),
        ({"batch_size": 0}, "batch_size at least 1"),
        ({"target": LogitTarget(())}, "at least one token"),
        ({"target": LogitTarget((100_000,))}, "token 100000 is out of range"),
        ({"target": LogitTarget((1,), at=4)}, "text 2 has 4 tokens, so no position 4"),
        ({"hook_name": "blocks.9.hook_resid_post"}, "6 layers"),
    ],
)
def test_mistakes(model, sae, change, message):
    arguments = {"texts": TEXTS, "hook_name": HOOK, **change}
    with pytest.raises(MechintError, match=message):
        attribute(sae, model, **arguments)


def test_not_finite_is_an_error(model, sae):
    broken = StandardSAE(model.d_model, 4).double().requires_grad_(False)
    broken.W_dec[1] = float("nan")
    with pytest.raises(MechintError, match="not finite"):
        attribute(broken, model, HOOK, TEXTS)


def test_spearman_closed_forms():
    a = np.arange(10.0)
    assert spearman(a, a**3)["value"] == pytest.approx(1.0)
    assert spearman(a, -a)["value"] == pytest.approx(-1.0)
    # Spearman 1904's formula, 1 - 6 sum d^2 / (n (n^2 - 1)): d = 1 in eight of ten places here
    b = np.array([1, 0, 3, 2, 5, 4, 7, 6, 8, 9.0])
    assert spearman(a, b)["value"] == pytest.approx(1 - 6 * 8 / 990)
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=(2, 60)).astype(float)
    y += x
    assert spearman(x, y)["value"] == pytest.approx(spearmanr(x, y).statistic)
    assert spearman(x[:3], y[:3]) == {"value": None, "low": None, "high": None, "n": 3}
    assert spearman(x, np.ones(60))["value"] is None
    assert spearman(x, y) == spearman(x, y) != spearman(x, y, seed=1)


def test_spearman_interval_covers():
    """The population value of normal columns with correlation r is 6/pi asin(r/2) (Pearson 1907)."""
    rng = np.random.default_rng(7)
    truth = 6 / np.pi * np.arcsin(0.35)
    covered = 0
    for repeat in range(120):
        x, noise = rng.normal(size=(2, 80))
        found = spearman(x, 0.7 * x + (1 - 0.49) ** 0.5 * noise, seed=repeat, resamples=300)
        covered += found["low"] <= truth <= found["high"]
    assert 105 <= covered <= 120  # 95 % of 120 is 114, with a standard deviation of 2.4
