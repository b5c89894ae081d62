"""Effects on the output, geometry of the decoder, search: against plain formulas, on the built-in model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mechint.analysis import (
    GatherSettings,
    context_values,
    contexts,
    decoder_clusters,
    decoder_map,
    feature_consistency_score,
    fires_on,
    gather,
    geometry,
    highlight_html,
    latent_values,
    latents_on_token,
    logit_effects,
    logits,
    nearest_latents,
    token_consistency,
    token_ids,
)
from mechint.data import Activations
from mechint.errors import MechintError
from mechint.inside import Inside
from mechint.models import LanguageModel, load_model
from mechint.sae import SAE, StandardSAE, build_sae
from tests.test_analysis import write_store

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_model("builtin/pythia-tiny", device="cpu")


def random_sae(d_in: int, d_sae: int, seed: int = 0) -> SAE:
    return StandardSAE(d_in, d_sae, generator=torch.Generator().manual_seed(seed))


# --- effects on the output --------------------------------------------------------------------------------------------


def test_logit_effects_are_what_a_small_push_does_to_the_logits(model: LanguageModel) -> None:
    """A push in the final residual stream changes the logits by the effect over the norm's divisor, to first order."""
    sae = random_sae(model.d_model, 20)
    effects = logit_effects(sae, model, k=5)
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    tokens = torch.tensor([model.tokenize(["Anna lives in Paris."], prepend_bos=True)[0]])
    resid = model.activations(tokens, last)[0, -1].double()
    divisor = float((resid.var(unbiased=False) + 1e-5).sqrt())
    n_tokens = len(model.tokenizer)

    def head(x: Tensor) -> Tensor:
        norm = model.hf_model.base_model.final_layer_norm
        y = torch.nn.functional.layer_norm(x, x.shape, norm.weight.double(), norm.bias.double(), norm.eps)
        return (model.hf_model.get_output_embeddings().weight.double() @ y)[:n_tokens]

    for latent in range(20):
        direction = sae.W_dec[latent].detach().double()
        # the part of the push along the stream itself only changes the divisor, which the effect leaves out
        centred = resid - resid.mean()
        pushed = direction - (direction @ centred) / (centred @ centred) * centred
        change = (head(resid + 1e-4 * pushed) - head(resid - 1e-4 * pushed)) / 2e-4
        change = (change - change.mean()) * divisor
        along = (direction @ centred) / (centred @ centred)
        gain = model.hf_model.base_model.final_layer_norm.weight.double()
        plain = model.hf_model.get_output_embeddings().weight.double()[:n_tokens] @ (centred * gain)
        expected = change + along * (plain - plain.mean())
        order = expected.argsort(descending=True)
        assert effects.promoted[latent].tolist() == order[:5].tolist()
        assert effects.suppressed[latent].tolist() == order.flip(0)[:5].tolist()
        assert torch.allclose(effects.promoted_effect[latent].double(), expected[order[:5]], rtol=1e-3, atol=1e-4)
        assert float(effects.std[latent]) == pytest.approx(float(expected.std(unbiased=False)), rel=1e-3)
        fourth = ((expected / expected.std(unbiased=False)) ** 4).mean()
        assert float(effects.kurtosis[latent]) == pytest.approx(float(fourth), rel=1e-2)


def test_logit_effects_in_blocks_and_of_some(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = random_sae(model.d_model, 30)
    whole = logit_effects(sae, model, k=3)
    monkeypatch.setattr(logits, "MAX_BLOCK_ELEMENTS", 4 * len(model.tokenizer))
    blocks = logit_effects(sae, model, k=3)
    some = logit_effects(sae, model, k=3, latents=torch.tensor([7, 2]))
    assert torch.equal(whole.promoted, blocks.promoted) and torch.equal(whole.suppressed[[7, 2]], some.suppressed)
    assert torch.allclose(whole.suppressed_effect, blocks.suppressed_effect, atol=1e-6)
    assert logit_effects(sae, model, k=3, latents=torch.tensor([], dtype=torch.int64)).promoted.shape == (0, 3)
    assert int(whole.promoted.max()) < len(model.tokenizer)


def test_logit_effects_refuse_what_makes_no_sense(model: LanguageModel) -> None:
    with pytest.raises(MechintError, match="d_in 12.*128 wide"):
        logit_effects(random_sae(12, 20), model)
    sae = random_sae(model.d_model, 20)
    with pytest.raises(MechintError, match="k must be"):
        logit_effects(sae, model, k=0)
    with pytest.raises(MechintError, match="between 0 and 19"):
        logit_effects(sae, model, latents=torch.tensor([20]))


# --- geometry ---------------------------------------------------------------------------------------------------------


def test_neighbours_are_those_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = random_sae(6, 50)
    monkeypatch.setattr(geometry, "MAX_BLOCK_ELEMENTS", 7 * 50)
    found = nearest_latents(sae, 4)
    unit = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    best = cosine.topk(4, dim=1)
    assert torch.equal(found.latent, best.indices) and torch.allclose(found.cosine, best.values, atol=1e-6)
    assert nearest_latents(sae, 100).latent.shape == (50, 49)
    assert all(i not in found.latent[i].tolist() for i in range(50))


def bundles(seed: int = 0) -> SAE:
    """60 latents around 3 directions: 30, 20 and 10."""
    generator = torch.Generator().manual_seed(seed)
    sae = random_sae(16, 60)
    centres = torch.eye(16)[:3].repeat_interleave(torch.tensor([30, 20, 10]), dim=0)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(centres + 0.05 * torch.randn(60, 16, generator=generator), dim=1))
    return sae


def test_clusters_find_bundles_and_go_by_size() -> None:
    found = decoder_clusters(bundles(), 3, seed=1)
    assert found.tolist() == [0] * 30 + [1] * 20 + [2] * 10
    assert torch.equal(found, decoder_clusters(bundles(), 3, seed=1))
    assert len(decoder_clusters(random_sae(4, 3), 10).unique()) == 3
    with pytest.raises(MechintError, match="n_clusters"):
        decoder_clusters(bundles(), 0)


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_the_map_keeps_bundles_together(method: str) -> None:
    points = decoder_map(bundles(), method=method)
    assert points.shape == (60, 2) and float(points.abs().max()) == pytest.approx(1.0)
    group = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)
    distance = torch.cdist(points, points).fill_diagonal_(torch.inf)
    assert bool((group[distance.argmin(dim=1)] == group).all())
    assert torch.equal(points, decoder_map(bundles(), method=method))
    with pytest.raises(MechintError, match="unknown method"):
        decoder_map(bundles(), method="umap")


@pytest.mark.parametrize(("d_in", "d_sae"), [(1, 5), (2, 3), (3, 4)])
def test_a_map_of_very_little(d_in: int, d_sae: int) -> None:
    assert decoder_map(random_sae(d_in, d_sae)).isfinite().all()
    with pytest.raises(MechintError, match="at least 3"):
        decoder_map(random_sae(d_in, 2))


# --- search -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Activations:
    return write_store(tmp_path / "store", [30, 50, 40])  # tokens 100, 101, ...


def test_latents_on_a_token(store: Activations) -> None:
    sae = random_sae(3, 20)
    latents = gather(sae, store, GatherSettings(k=4))
    tokens = [100 + int(latents.top_rows[5, 0]), 100 + int(latents.top_rows[5, 2]), 9999]
    found = latents_on_token(latents, store, tokens)
    expected = {}
    for latent in range(20):
        rows = [row for row in latents.top_rows[latent].tolist() if row >= 0]
        hits = [i for i, row in enumerate(rows) if 100 + row in tokens]
        if hits:
            expected[latent] = (len(hits) / len(rows), len(hits), float(latents.top_values[latent, hits[0]]))
    assert {hit.latent: hit[1:] for hit in found} == {k: (pytest.approx(v[0]), *v[1:]) for k, v in expected.items()}
    assert [hit.share for hit in found] == sorted((hit.share for hit in found), reverse=True)
    assert 5 in [hit.latent for hit in found]
    first_only = latents_on_token(latents, store, tokens[1:], top=1)
    assert 5 not in [hit.latent for hit in first_only]


def test_consistency_of_all_latents_is_the_score_of_each(store: Activations) -> None:
    store.tokens[:] = store.tokens % 3  # few tokens, so that they repeat
    sae = random_sae(3, 20)
    with torch.no_grad():
        sae.b_enc[4] = -100.0
    latents = gather(sae, store, GatherSettings(k=6))
    scores = token_consistency(latents, store)
    assert scores[4].isnan()
    for latent in set(range(20)) - {4}:
        rows = [row for row in latents.top_rows[latent].tolist() if row >= 0]
        assert float(scores[latent]) == pytest.approx(feature_consistency_score(store.tokens[rows].tolist()))


def test_token_ids_by_text(model: LanguageModel) -> None:
    exact = token_ids(model.tokenizer, "Paris", exact=True)
    assert exact and all(model.tokenizer.decode([i]).strip() == "Paris" for i in exact)
    part = token_ids(model.tokenizer, "Par")
    assert set(exact) <= set(part) and len(part) > len(exact)
    for nothing in ("zzqx", ""):
        with pytest.raises(MechintError, match="no token"):
            token_ids(model.tokenizer, nothing)


def test_what_fires_on_a_text(model: LanguageModel) -> None:
    sae = random_sae(model.d_model, 40)
    for keep_bos in (False, True):
        subject = Inside(sae, model, HOOK, Path("x"), None, True, keep_bos, None)
        found = fires_on(subject, "Anna lives in Paris.", k=7)
        x = model.activations(torch.tensor([found.tokens]), HOOK)[0]
        acts = sae.encode(x).detach()
        if not keep_bos:
            assert float(acts[0].max()) > 0  # or the next line would say nothing
            acts[0] = 0
        assert torch.allclose(found.feature_acts, acts)
        assert found.latents == acts.amax(dim=0).argsort(descending=True)[:7].tolist()
        for latent, highest, position in zip(found.latents, found.highest, found.position, strict=True):
            assert float(acts[position, latent]) == pytest.approx(highest) and highest == pytest.approx(
                float(acts[:, latent].max())
            )
    other = model.activations(torch.tensor(model.tokenize(["The small dog has a red ball."], prepend_bos=True)), HOOK)
    latents = gather(sae, other[0].clone())
    relative = fires_on(subject, "Anna lives in Paris.", k=7, relative_to=latents)
    assert relative.latents != found.latents
    assert relative.latents == (acts.amax(dim=0) / latents.max.clamp_min(1e-6)).argsort(descending=True)[:7].tolist()
    assert relative.highest == pytest.approx([float(acts[:, i].max()) for i in relative.latents])
    with pytest.raises(MechintError, match="k must"):
        fires_on(subject, "x", k=0)


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_values_of_many_pairs(store: Activations, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechint.analysis.context.ROWS_AT_ONCE", 37)
    options = {"k": 4} if architecture == "topk" else {}
    sae = build_sae(architecture, 3, 20, generator=torch.Generator().manual_seed(2), options=options)
    with torch.no_grad():
        for name in ("r_mag", "b_mag", "threshold"):
            if name in dict(sae.named_parameters()):
                sae.get_parameter(name).uniform_(0.0, 0.5)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randint(0, 20, (300,), generator=generator)
    rows = torch.randint(0, store.n_rows, (300,), generator=generator)
    expected = sae.encode(store.rows(torch.arange(store.n_rows))).detach()[rows, latents]
    assert torch.allclose(latent_values(sae, store, latents, rows), expected, atol=1e-6) and float(expected.max()) > 0
    context = contexts(store, [40], window=5)[0]
    whole = context_values(sae, store, context, 3)
    pairs = latent_values(sae, store, torch.full((len(context.rows),), 3), torch.tensor(context.rows))
    assert torch.allclose(whole, pairs, atol=1e-6)
    assert latent_values(sae, store, latents[:0], rows[:0]).shape == (0,)
    with pytest.raises(MechintError, match="between 0 and 19"):
        latent_values(sae, store, torch.tensor([20]), torch.tensor([0]))


def test_hostile_text_is_shown_and_never_markup() -> None:
    hostile = [
        "<script>alert(1)</script>",
        "</div>",
        '" onmouseover="x',
        "<img src=x onerror=alert(1)>",
        "&lt;",
        "\u202e",
    ]
    page = highlight_html(hostile, [1.0] * len(hostile), center=2)
    inner = page.removeprefix('<div style="white-space:pre-wrap;font-family:monospace">').removesuffix("</div>")
    assert inner.count("<") == 2 * len(hostile) and inner.count("<span ") == inner.count("</span>") == len(hostile)
    assert "&amp;lt;" in inner and "onmouseover=&quot;x" in inner
