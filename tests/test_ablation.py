"""Ablation against a few lines of float64 with plain transformers hooks, and everything that a user can get wrong."""

import csv
import dataclasses
import logging
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from given_files import write_texts

import mechint.inside
from mechint import ablation
from mechint.ablation import engines, kl, rank
from mechint.ablation.engines import GeneralEngine, NeoXEngine, Pair
from mechint.cli.ablate import main
from mechint.config import AblateConfig
from mechint.errors import MechintError
from mechint.models import load_model, matmul
from mechint.models.suffix import NeoXSuffix
from mechint.sae import StandardSAE, save_checkpoint

HOOK = "blocks.3.hook_resid_post"
TEXTS = ["the cat sat on the mat", 'and the dog, "far" away', "home", "ran far far away from home again and again"]
D_SAE = 72


@pytest.fixture(scope="module")
def sharp_neox_dir(tiny_neox_dir, tmp_path_factory) -> Path:
    """The small model with logits as large as a trained model's, so that there is something to lose."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("sharp_neox")
    hf = AutoModelForCausalLM.from_pretrained(tiny_neox_dir)
    with torch.no_grad():
        hf.get_output_embeddings().weight.mul_(40.0)
    hf.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_neox_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(sharp_neox_dir):
    return load_model(str(sharp_neox_dir), device="cpu")


@pytest.fixture(scope="module")
def sae(model) -> StandardSAE:
    """Latents from imperceptible to overwhelming: their activations span eight powers of ten; the last six are dead."""
    torch.manual_seed(5)
    sae = StandardSAE(model.d_model, D_SAE)
    bos = model.activations(torch.tensor([[model.bos_token_id]]), HOOK)[0, 0]
    with torch.no_grad():
        sae.b_dec.copy_(0.1 * torch.randn(model.d_model))
        sae.W_enc[:, :6] = 0.2 * (bos / bos.norm())[:, None] + 0.05 * torch.randn(model.d_model, 6)
        sae.W_enc *= torch.logspace(-4, 1.5, D_SAE)[torch.randperm(D_SAE)]
        sae.b_enc.copy_(0.01 * torch.randn(D_SAE))
        sae.W_enc[:, -6:] = 0
        sae.b_enc[-6:] = -1
    sae.metadata = {"hook_name": HOOK, "processing": "raw", "prepend_bos": True}
    return sae


def reference(folder, sae, texts, *, layer=3, centred=False, features=None, token_lists) -> list[dict]:
    """All in float64: the whole model by transformers with a hook, and KL from two log-softmaxes."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    W_enc, b_enc, W_dec, b_dec = (getattr(sae, n).detach().double() for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    features = list(range(sae.d_sae) if features is None else features)
    active, per_text, ce_change = [], [], []

    def remove(module, args, out):
        value = out - out.mean(-1, keepdim=True) if centred else out
        f = torch.relu((value[0] - b_dec) @ W_enc[:, features] + b_enc[features])
        active.append((f > 0).sum(0))
        return out - f.T[:, :, None] * W_dec[features][:, None, :]

    for tokens in token_lists:
        with torch.no_grad():
            log_p = F.log_softmax(hf(torch.tensor([tokens])).logits, -1)
            handle = hf.gpt_neox.layers[layer].register_forward_hook(remove)
            log_q = F.log_softmax(hf(torch.tensor([tokens] * len(features))).logits, -1)
            handle.remove()
        per_text.append((log_p.exp() * (log_p - log_q)).sum(-1))
        following = torch.tensor(tokens[1:])[None, :, None]
        lost = log_p[:, :-1].gather(2, following) - log_q[:, :-1].gather(2, following.expand(len(features), -1, -1))
        ce_change.append(lost.mean((1, 2)) if len(tokens) > 1 else torch.zeros(len(features)))
    return [
        {
            "feature_idx": feature,
            "mean_kl": sum(float(kl[row].mean()) for kl in per_text) / len(texts),
            "mean_kl_no_bos": sum(float(kl[row][1:].mean()) for kl in per_text) / len(texts),
            "max_kl": max(float(kl[row].max()) for kl in per_text),
            "mean_ce_change": sum(float(change[row]) for change in ce_change) / len(texts),
            "n_active_positions": sum(int(count[row]) for count in active),
            "n_active_texts": sum(bool(count[row]) for count in active),
            "kl": [kl[row] for kl in per_text],
        }
        for row, feature in enumerate(features)
    ]


@pytest.fixture(scope="module")
def expected(sharp_neox_dir, sae, model):
    return reference(sharp_neox_dir, sae, TEXTS, token_lists=model.tokenize(TEXTS, prepend_bos=True))


def by_feature(rows):
    return {row["feature_idx"]: row for row in rows}


def worst_error(rows, expected, keys=("mean_kl", "mean_kl_no_bos", "max_kl", "mean_ce_change")) -> float:
    found = by_feature(rows)
    assert len(found) == len(rows) == len(expected)
    return max(abs(found[row["feature_idx"]][key] - row[key]) for row in expected for key in keys)


@pytest.fixture(scope="module")
def rows(sae, model):
    return ablation.rank_features_by_ablation(sae, model, HOOK, TEXTS, show_progress=False)


def test_every_latent_is_within_1e_6_of_float64(rows, expected):
    means = sorted(row["mean_kl"] for row in expected)
    assert means[-1] > 2 and max(row["max_kl"] for row in expected) > 5, "the test set must hold large effects"
    assert sum(1e-12 < value < 1e-6 for value in means) >= 5, "and small ones"
    assert worst_error(rows, expected) < 1e-6
    found = by_feature(rows)
    for row in expected:
        assert found[row["feature_idx"]]["n_active_positions"] == row["n_active_positions"]
        assert found[row["feature_idx"]]["n_active_texts"] == row["n_active_texts"]
        if row["mean_kl"] > 1e-9:  # small effects keep their leading digits
            assert found[row["feature_idx"]]["mean_kl"] == pytest.approx(row["mean_kl"], rel=2e-2)


def test_rows_are_sorted_and_name_the_text_and_token(rows, expected, model):
    assert [row["mean_kl"] for row in rows] == sorted((row["mean_kl"] for row in rows), reverse=True)
    token_lists = model.tokenize(TEXTS, prepend_bos=True)
    wanted = by_feature(expected)
    for row in rows[:30]:
        text = TEXTS.index(row["max_kl_prompt"])
        position = row["max_kl_token_position"]
        assert row["max_kl_token"] == model.tokenizer.decode([token_lists[text][position]])
        assert float(wanted[row["feature_idx"]]["kl"][text][position]) == pytest.approx(row["max_kl"], abs=1e-6)
        assert row["num_texts"] == len(TEXTS)


def test_dead_latents_have_rows_of_zeros(rows):
    dead = [by_feature(rows)[feature] for feature in range(D_SAE - 6, D_SAE)]
    assert [row["feature_idx"] for row in rows[-6:]] == list(range(D_SAE - 6, D_SAE)), "ties keep their order"
    for row in dead:
        assert (row["mean_kl"], row["max_kl"], row["mean_kl_no_bos"]) == (0.0, 0.0, 0.0)
        assert (row["max_kl_prompt"], row["max_kl_token"], row["max_kl_token_position"]) == ("", "", -1)
        assert (row["n_active_positions"], row["n_active_texts"]) == (0, 0)


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_batch_size_does_not_matter(sae, model, rows, batch_size):
    subset = [row["feature_idx"] for row in rows[::4]]
    again = ablation.rank_features_by_ablation(
        sae, model, HOOK, TEXTS, subset, show_progress=False, batch_size=batch_size
    )
    assert worst_error(again, [by_feature(rows)[feature] for feature in subset]) < 2e-7


def test_only_firing_latents_from_the_first_firing_on_are_run(sae, model, monkeypatch):
    ran = []
    original = NeoXSuffix.run

    def spy(self, rows, spans, clean, changed=None):
        if self.dtype == torch.float32:
            ran.append(rows.shape[0])
        return original(self, rows, spans, clean, changed)

    monkeypatch.setattr(NeoXSuffix, "run", spy)
    ablation.rank_features_by_ablation(sae, model, HOOK, TEXTS, show_progress=False)
    expected_rows = 0
    for tokens in model.tokenize(TEXTS, prepend_bos=True):
        active = sae.encode(model.activations(torch.tensor([tokens]), HOOK)[0]) > 0
        expected_rows += sum(len(tokens) - int(column.int().argmax()) for column in active.T if column.any())
    assert sum(ran) == expected_rows < D_SAE * sum(map(len, model.tokenize(TEXTS, prepend_bos=True)))


def test_general_engine_agrees_and_says_so(sae, model, expected, rows, monkeypatch, caplog):
    monkeypatch.setattr(engines, "entry_point", lambda hf_model, hook_name: "it was asked for")
    with caplog.at_level(logging.WARNING):
        general = ablation.rank_features_by_ablation(sae, model, HOOK, TEXTS, show_progress=False, batch_size=9)
    assert "because it was asked for" in caplog.text
    assert worst_error(general, expected) < 2e-5  # float32 logits of the model: see GeneralEngine
    assert worst_error(general, rows) < 2e-5
    assert [row["n_active_positions"] for row in general] != []


def test_a_model_that_is_not_its_plain_weights_takes_the_general_way(sae, sharp_neox_dir, caplog):
    """What is found in the weights is checked against what the model predicts: here a hook doubles an MLP."""
    odd = load_model(str(sharp_neox_dir), device="cpu")
    odd.hf_model.gpt_neox.layers[1].mlp.register_forward_hook(lambda module, args, out: 2 * out)
    with caplog.at_level(logging.WARNING):
        assert isinstance(engines.make_engine(sae, odd, HOOK, [0, 5, 9, 3]), GeneralEngine)
    assert "not those of its plain weights" in caplog.text


def test_large_effects_are_computed_again_in_float64(sae, model, monkeypatch):
    engine = engines.make_engine(sae, model, HOOK, [0, 5, 9, 3])
    assert isinstance(engine, NeoXEngine)
    with torch.inference_mode():
        tokens = model.tokenize(TEXTS, prepend_bos=True)
        active = engine.open(tokens) != 0
        pairs = [batch for batch in engine.batches(rank._pairs(active), 10**6)][0]
        values, precise = engine.effect(pairs).kl, engine.precise_effect(pairs).kl
        again = engine.doubtful(values)
    kept = sorted(set(range(len(pairs))) - set(again))
    assert again and kept
    assert 0 < engine.limit <= kl.MAX_FLOAT32_KL
    assert (values[kept] - precise[kept]).abs().max() < engines.TOLERANCE
    nothing = torch.zeros(1, max(map(len, tokens)), dtype=torch.float64)
    nothing = kl.Effect(*[nothing.expand(len(pairs), -1)] * 2)
    monkeypatch.setattr(
        NeoXEngine, "precise_effect", lambda self, batch: kl.Effect(*(p[: len(batch)] for p in nothing))
    )
    broken = ablation.rank_features_by_ablation(sae, model, HOOK, TEXTS, show_progress=False)
    assert broken[0]["max_kl"] <= kl.MAX_FLOAT32_KL, "without it no large effect comes through"


def test_overflow_in_float32_is_no_harm(sae, model, sharp_neox_dir):
    """A latent that throws logits by hundreds: exp overflows float32, and even a token's whole probability."""
    loud = StandardSAE(model.d_model, 4)
    loud.load_state_dict(
        {
            name: value[..., :4] if name != "W_dec" else value[:4]
            for name, value in ((n, p.detach()) for n, p in sae.named_parameters())
            if name != "b_dec"
        }
        | {"b_dec": sae.b_dec.detach()}
    )
    with torch.no_grad():
        loud.b_enc.copy_(torch.tensor([3e2, 1e3, 1e4, 1e6]))
        loud.W_dec *= 50
    tokens = model.tokenize(TEXTS[:2], prepend_bos=True)
    wanted = reference(sharp_neox_dir, loud, TEXTS[:2], token_lists=tokens)
    found = by_feature(ablation.rank_features_by_ablation(loud, model, HOOK, TEXTS[:2], show_progress=False))
    for row in wanted:
        assert math.isfinite(found[row["feature_idx"]]["mean_kl"])
        assert found[row["feature_idx"]]["mean_kl"] == pytest.approx(row["mean_kl"], abs=1e-6, rel=1e-9)


@pytest.mark.parametrize(("hook", "layer"), [("blocks.2.hook_resid_pre", 1), ("blocks.5.hook_resid_post", 5)])
@pytest.mark.parametrize("centred", [False, True], ids=["raw", "centred"])
def test_other_hooks_and_processing(sae, sharp_neox_dir, hook, layer, centred):
    model = load_model(str(sharp_neox_dir), device="cpu", processing="centred" if centred else "raw")
    plain = StandardSAE(sae.d_in, sae.d_sae)
    plain.load_state_dict(sae.state_dict())
    features = list(range(0, D_SAE, 7))
    tokens = model.tokenize(TEXTS[:2], prepend_bos=False)
    wanted = reference(
        sharp_neox_dir, plain, TEXTS[:2], layer=layer, centred=centred, features=features, token_lists=tokens
    )
    found = ablation.rank_features_by_ablation(
        plain, model, hook, TEXTS[:2], features, show_progress=False, prepend_bos=False
    )
    assert worst_error(found, wanted, ("mean_kl", "max_kl")) < 1e-6
    for row in found:
        assert row["mean_kl_no_bos"] == row["mean_kl"], "without a prepended BOS no position is left out"


def test_context_size_cuts_the_texts(sae, model, sharp_neox_dir):
    tokens = [row[:4] for row in model.tokenize(TEXTS, prepend_bos=True)]
    wanted = reference(sharp_neox_dir, sae, TEXTS, features=[0, 1, 2, 30], token_lists=tokens)
    found = ablation.rank_features_by_ablation(
        sae, model, HOOK, TEXTS, [0, 1, 2, 30], show_progress=False, context_size=4
    )
    assert worst_error(found, wanted) < 1e-6


def test_latent_text_kl(sae, model, sharp_neox_dir, expected):
    result = ablation.latent_text_kl(sae, model, HOOK, TEXTS[0], 3)
    torch.testing.assert_close(
        torch.tensor(result["kl"], dtype=torch.float64), by_feature(expected)[3]["kl"][0], rtol=1e-6, atol=1e-10
    )
    assert result["mean_kl"] == pytest.approx(float(by_feature(expected)[3]["kl"][0].mean()))
    assert len(result["tokens"]) == len(result["kl"]) == len(result["feature_acts"])
    assert result["tokens"][result["max_kl_token_position"]] == result["max_kl_token"]
    dead = ablation.latent_text_kl(sae, model, HOOK, TEXTS[0], D_SAE - 1)
    assert dead["mean_kl"] == 0 and dead["n_active_positions"] == 0


def test_several_latents_together_by_both_engines(sae, model, monkeypatch):
    features = [0, 3, 17, 40]
    fast = ablation.latent_text_kl(sae, model, HOOK, TEXTS[3], features)
    tokens = torch.tensor(model.tokenize(TEXTS[3:], prepend_bos=True))
    hook = ablation.single_feature_ablation_hook(sae, features)
    logits = model.logits_with(tokens, HOOK, hook)
    wanted = kl.kl_of_log_probs(model.logits(tokens)[0], logits[0])
    torch.testing.assert_close(torch.tensor(fast["kl"], dtype=torch.float64), wanted, rtol=1e-4, atol=2e-5)
    monkeypatch.setattr(engines, "entry_point", lambda hf_model, hook_name: "it was asked for")
    general = ablation.latent_text_kl(sae, model, HOOK, TEXTS[3], features)
    torch.testing.assert_close(torch.tensor(general["kl"], dtype=torch.float64), wanted, rtol=1e-6, atol=1e-6)


def test_single_feature_hook(sae):
    resid = torch.randn(2, 5, sae.d_in, generator=torch.Generator().manual_seed(0))
    out = ablation.single_feature_ablation_hook(sae, 7)(resid, None)
    f = torch.relu((resid - sae.b_dec) @ sae.W_enc[:, 7] + sae.b_enc[7])
    torch.testing.assert_close(out, resid - f[..., None] * sae.W_dec[7])
    with pytest.raises(MechintError, match="out of range"):
        ablation.single_feature_ablation_hook(sae, D_SAE)


def test_built_in_model_within_1e_6_of_float64():
    """A trained model: peaked predictions, and logits that move together by far more than they part."""
    from mechint.builtin import PYTHIA_TINY

    tiny = load_model("builtin/pythia-tiny", device="cpu")
    texts = ["Tom lives in Berlin and works as a nurse.", "The three dogs ran home, because they never liked the rain."]
    token_lists = tiny.tokenize(texts, prepend_bos=True)
    values = torch.cat([tiny.activations(torch.tensor([tokens]), HOOK)[0] for tokens in token_lists])
    directions = values - values.mean(0)
    trained = StandardSAE(tiny.d_model, 2 * len(values))
    with torch.no_grad():
        trained.b_dec.copy_(values.mean(0))
        trained.W_dec.copy_(F.normalize(directions, dim=1).repeat(2, 1))
        trained.W_enc.copy_(trained.W_dec.T)
        trained.W_enc[:, len(values) :] *= 0.02  # the same directions again, hardly removed
        trained.b_enc.fill_(-0.1 * float(directions.norm(dim=1).mean()))
        trained.b_enc[len(values) :] *= 0.02
    wanted = reference(PYTHIA_TINY, trained, texts, token_lists=token_lists)
    assert max(row["max_kl"] for row in wanted) > 1 and sum(0 < row["mean_kl"] < 1e-4 for row in wanted) > 5
    found = ablation.rank_features_by_ablation(trained, tiny, HOOK, texts, show_progress=False)
    assert worst_error(found, wanted) < 1e-6


# The numerics by themselves.


def test_delta_form_against_float64():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9000, 24, generator=generator) + 0.5  # more than two tiles, with a common mean
    bias = torch.randn(9000, generator=generator)
    head = kl.ChangedHead(weight, bias)
    clean = torch.randn(7, 24, generator=generator, dtype=torch.float64)
    position = torch.randint(0, 7, (50,), generator=generator)
    change = torch.randn(50, 24, generator=generator) * torch.logspace(-5, -0.5, 50)[:, None]
    log_p = torch.log_softmax(clean @ weight.double().T + bias, -1)[position]
    log_q = torch.log_softmax((clean[position] + change) @ weight.double().T + bias, -1)
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1)
    nothing = torch.full((50,), -1)
    with torch.inference_mode():
        got = head.effect(change, head.clean(clean), position, nothing).kl
        precise = head.precise_effect(clean, clean[position] + change, position, nothing).kl
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-8)
    torch.testing.assert_close(precise, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(kl.kl_of_log_probs(log_p, log_q), wanted, rtol=1e-9, atol=1e-12)


def test_a_common_move_of_all_logits_costs_no_digits():
    """Logits that all move by about 5 and differ by 1e-2: without the shift the error is 1e-6."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3000, 16, generator=generator)
    weight[:, 0] = 5.0
    head = kl.ChangedHead(weight, None)
    clean = torch.randn(1, 16, generator=generator, dtype=torch.float64)
    change = 3e-3 * torch.randn(40, 16, generator=generator)
    change[:, 0] = 1 + 0.1 * torch.randn(40, generator=generator)
    log_p = torch.log_softmax(clean @ weight.double().T, -1)
    log_q = torch.log_softmax((clean + change) @ weight.double().T, -1)
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1)
    nothing = torch.full((40,), -1)
    with torch.inference_mode():
        got = head.effect(change, head.clean(clean), torch.zeros(40, dtype=torch.int64), nothing).kl
    assert (got - wanted).abs().max() < 3e-8


def test_logit_error_is_that_of_the_logits():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5000, 8, generator=generator)
    error = 1e-6 * torch.randn(3, 8, generator=generator)
    head = kl.ChangedHead(weight, None)
    with torch.inference_mode():
        predictions = head.clean(torch.randn(3, 8, generator=generator, dtype=torch.float64))
        got = head.logit_error(error, predictions)
    difference, p = error @ weight.T, torch.cat(predictions.probs, 1)
    variance = (p * difference**2).sum(1) - (p * difference).sum(1) ** 2
    assert got == pytest.approx(float(variance.max().sqrt()), rel=1e-3)


def test_float32_limit_keeps_the_promise():
    assert kl.float32_limit(0.0, 5e-7) == kl.MAX_FLOAT32_KL
    limit = kl.float32_limit(1e-5, 5e-7)
    assert 2 * 1e-5 * math.sqrt(limit) == pytest.approx(5e-7)


def test_the_bound_behind_the_limit():
    """|sum (q - p) e| <= sqrt(2 KL (E_p e^2 + E_q e^2)), on distributions from alike to almost disjoint."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 0.3, 1.0, 4.0, 10.0):
        log_p, change, e = (torch.randn(200, 50, generator=generator, dtype=torch.float64) for _ in range(3))
        log_p = torch.log_softmax(scale * log_p, -1)
        log_q = torch.log_softmax(log_p + scale * change, -1)
        p, q = log_p.exp(), log_q.exp()
        divergence = (p * (log_p - log_q)).sum(-1)
        bound = (2 * divergence * ((p + q) * e**2).sum(-1)).sqrt()
        assert (((q - p) * e).sum(-1).abs() <= bound * (1 + 1e-9)).all()


@pytest.mark.parametrize("onednn", [True, False])
def test_linear_is_float32_exact(onednn, monkeypatch):
    if onednn and not matmul.onednn_pays():
        pytest.skip("oneDNN is not used on this machine")
    monkeypatch.setattr(matmul, "onednn_pays", lambda: onednn)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(100, 300, generator=generator), torch.randn(70, 300, generator=generator)
    bias = torch.randn(70, generator=generator)
    with torch.inference_mode():
        for given in (bias, None):
            wanted = F.linear(x.double(), weight.double(), None if given is None else given.double())
            torch.testing.assert_close(matmul.linear(x, weight, given).double(), wanted, rtol=0, atol=5e-5)
        assert matmul.linear(x.double(), weight.double()).dtype == torch.float64
        assert matmul.linear(x[:1], weight).shape == (1, 70)


def test_reduced_precision_products_are_switched_off_and_back():
    torch.set_float32_matmul_precision("medium")
    try:
        with matmul.full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


# What a user can get wrong.


@pytest.mark.parametrize(
    ("subset", "found"),
    [("1,2,3", [1, 2, 3]), ("0-3, 9", [0, 1, 2, 3, 9]), ("5,5,4-6", [5, 4, 6]), ([2, torch.tensor(1)], [2, 1])],
)
def test_feature_subset(subset, found):
    assert ablation.feature_indices(subset, 10) == found
    assert ablation.feature_indices(None, 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ("", "empty"),
        (" ", "empty"),
        ([], "empty"),
        ("1,x", "'x' is not a latent's index"),
        ("1,,2", "'' is not a latent's index"),
        ("1.5", "'1.5' is not"),
        ("-1", "'-1' is not"),
        ("10", "latent 10 is out of range, the SAE has latents 0 to 9"),
        ("0-99999999999999", "latent 10 is out of range"),
        ("9999999999-99999999999999", "latent 9999999999 is out of range"),
        ("3-1", "backwards"),
        ([-1], "latent -1 is out of range"),
        ([1.0], "is not a latent's index"),
        ([True], "is not a latent's index"),
    ],
)
def test_bad_feature_subset(subset, message):
    with pytest.raises(MechintError, match=message.replace("'", ".")):
        ablation.feature_indices(subset, 10)


def test_mismatches_name_both(sae, model, sharp_neox_dir):
    def rank_with(sae, model, hook=HOOK):
        ablation.rank_features_by_ablation(sae, model, hook, TEXTS, [0], show_progress=False)

    with pytest.raises(MechintError, match="d_in 20.*32 wide"):
        rank_with(StandardSAE(20, 160), model)
    with pytest.raises(MechintError, match="blocks.3.hook_resid_post.*blocks.2.hook_resid_post"):
        rank_with(sae, model, "blocks.2.hook_resid_post")
    with pytest.raises(MechintError, match="trained on raw.*processing centred"):
        rank_with(sae, load_model(str(sharp_neox_dir), device="cpu", processing="centred"))
    with pytest.raises(MechintError, match="blocks.6|layers"):
        rank_with(StandardSAE(model.d_model, 8 * model.d_model), model, "blocks.6.hook_resid_post")
    with pytest.raises(MechintError, match="LanguageModel.*got str"):
        rank_with(sae, "pythia-70m")
    with pytest.raises(MechintError, match="no texts"):
        ablation.rank_features_by_ablation(sae, model, HOOK, [], [0])


def test_not_finite_is_an_error_that_names_the_latent(model):
    broken = StandardSAE(model.d_model, 3)
    with torch.no_grad():
        broken.b_enc.fill_(1.0)
        broken.W_dec[1] = float("inf")
    with pytest.raises(MechintError, match="latent 1 from text 1.*not finite"):
        ablation.rank_features_by_ablation(broken, model, HOOK, TEXTS, [0, 1], show_progress=False)


def test_csv(rows, tmp_path):
    path = tmp_path / "new" / "ablation.csv"
    ablation.save_ablation_rows([{**rows[0], "max_kl_token": "\n", "max_kl_prompt": 'a "b", c'}, *rows[1:]], path)
    with open(path, newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    old = "feature_idx,mean_kl,max_kl,max_kl_prompt,max_kl_token,max_kl_token_position,num_texts"
    assert ",".join(read[0]).startswith(old + ",")
    assert list(read[0]) == list(ablation.COLUMNS)
    assert (read[0]["max_kl_token"], read[0]["max_kl_prompt"]) == ("\n", 'a "b", c')
    assert [float(row["mean_kl"]) for row in read] == [row["mean_kl"] for row in rows], "all digits are kept"
    ablation.save_ablation_rows([], path)
    assert path.read_text() == ",".join(ablation.COLUMNS) + "\n"


@pytest.fixture
def run_dir(sae, sharp_neox_dir, tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    sae.metadata = {
        "hook_name": HOOK,
        "processing": "raw",
        "prepend_bos": True,
        "model_name": str(sharp_neox_dir),
        "model_source": str(sharp_neox_dir),
    }
    save_checkpoint(sae, folder / "checkpoint.pt")
    sae.save_model(folder / "sae")
    (folder / "texts.txt").write_text("\n".join(["", *TEXTS, "  "]), encoding="utf-8")
    return folder


def flags(run_dir: Path, **changes: str) -> list[str]:
    given = {
        "checkpoint": str(run_dir / "checkpoint.pt"),
        "eval-texts-path": str(run_dir / "texts.txt"),
        "output": str(run_dir / "ablation.csv"),
        "device": "cpu",
        **{key.replace("_", "-"): value for key, value in changes.items()},
    }
    return [word for key, value in given.items() for word in (f"--{key}", value)]


def test_given_texts_are_read_as_collect_reads_them(run_dir, capsys):
    written = {}
    for kind in (".txt", ".csv", ".json.gz"):
        given, output = write_texts(run_dir, TEXTS, kind), run_dir / f"{kind}.csv"
        more = {} if kind == ".txt" else {"text_field": "text", "unit": "record"}
        assert main(flags(run_dir, eval_texts_path=str(given), output=str(output), feature_subset="0-9", **more)) == 0
        written[kind] = output.read_bytes()
    assert written[".txt"] == written[".csv"] == written[".json.gz"]


def test_a_long_text_is_ablated_window_by_window(run_dir, model, capsys):
    long = "the cat sat on the mat and the dog ran far away"
    (run_dir / "long.txt").write_text(long)
    words = {"eval_texts_path": str(run_dir / "long.txt"), "feature_subset": "0-20", "context_size": "8"}
    assert main(flags(run_dir, **words)) == 0
    assert "1 of 1 text longer than 8 tokens: split into windows, each after BOS" in capsys.readouterr().err
    with open(run_dir / "ablation.csv", newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    windows = {row["max_kl_prompt"] for row in written} - {""}
    assert len(windows) > 1 and all(window in long for window in windows) and long not in windows
    assert {int(row["num_texts"]) for row in written} == {math.ceil(len(model.token_lists([long])[0]) / 7)}


def test_command(run_dir, rows, capsys):
    assert main(flags(run_dir, feature_subset="0-20")) == 0
    out, err = capsys.readouterr()
    with open(run_dir / "ablation.csv", newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert len(written) == 21
    best = max((row for row in rows if row["feature_idx"] <= 20), key=lambda row: row["mean_kl"])
    lines = out.splitlines()
    assert lines == [
        f"ablation_output: {run_dir / 'ablation.csv'}",
        f"top_feature: {best['feature_idx']} mean_kl={best['mean_kl']:.6f}",
    ]
    assert "note" not in err

    before = (run_dir / "ablation.csv").read_bytes()
    assert main(flags(run_dir, feature_subset="1")) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (run_dir / "ablation.csv").read_bytes() == before
    assert main([*flags(run_dir, feature_subset="1"), "--overwrite"]) == 0
    assert len((run_dir / "ablation.csv").read_text().splitlines()) == 2
    assert {path.name for path in run_dir.iterdir()} == {"checkpoint.pt", "sae", "texts.txt", "ablation.csv"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_subset": ""}, "empty"),
        ({"feature_subset": "72"}, "latent 72 is out of range, the SAE has latents 0 to 71"),
        ({"feature_subset": "a"}, "not a latent's index"),
        ({"eval_texts_path": "nowhere.txt"}, "not found"),
        ({"checkpoint": "nowhere.pt"}, "checkpoint not found"),
        ({"processing": "centred"}, "raw activations"),
        ({"hook": "blocks.1.hook_resid_post"}, "blocks.3.hook_resid_post"),
        ({"batch_size": "0"}, "--batch-size"),
        ({"context_size": "1"}, "--context-size"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(run_dir, changes, message, monkeypatch, capsys):
    monkeypatch.setattr(mechint.inside, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    assert main(flags(run_dir, **changes)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (run_dir / "ablation.csv").exists()


def test_empty_text_file(run_dir, capsys):
    (run_dir / "texts.txt").write_text(" \n\n")
    assert main(flags(run_dir)) == 2
    assert "empty" in capsys.readouterr().err


def test_device_reaches_the_model(run_dir, monkeypatch, capsys):
    asked = []

    def spy(name, **settings):
        asked.append(settings["device"])
        return load_model(name, **settings)

    monkeypatch.setattr(mechint.inside, "load_model", spy)
    assert main(flags(run_dir, feature_subset="1")) == 0
    assert asked == ["cpu"]
    assert main([*flags(run_dir, feature_subset="1", device="no-such-device"), "--overwrite"]) == 2
    assert "no-such-device" in capsys.readouterr().err


def test_legacy_checkpoint_is_centred_with_a_note(run_dir, sae, sharp_neox_dir, capsys):
    old = run_dir / "old" / "sae_model_2x.pt"
    old.parent.mkdir()
    save_checkpoint(sae, old)
    arguments = flags(run_dir, checkpoint=str(old), model=str(sharp_neox_dir), feature_subset="0-9")
    assert main(arguments) == 0
    assert "centred residual, BOS prepended" in capsys.readouterr().err
    with open(run_dir / "ablation.csv", newline="") as file:
        found = {int(row["feature_idx"]): float(row["mean_kl"]) for row in csv.DictReader(file)}
    model = load_model(str(sharp_neox_dir), device="cpu")
    wanted = reference(
        sharp_neox_dir,
        sae,
        TEXTS,
        centred=True,
        features=range(10),
        token_lists=model.tokenize(TEXTS, prepend_bos=True),
    )
    for row in wanted:
        assert found[row["feature_idx"]] == pytest.approx(row["mean_kl"], abs=1e-6)


def test_a_killed_run_goes_on_from_the_finished_texts(run_dir, monkeypatch):
    config = AblateConfig(
        checkpoint=run_dir / "checkpoint.pt",
        eval_texts_path=run_dir / "texts.txt",
        output=run_dir / "ablation.csv",
        device="cpu",
    )
    monkeypatch.setattr(rank, "MAX_TEXT_LATENTS", 1)  # one text a block
    monkeypatch.setattr(rank, "SAVE_SECONDS", 0.0)
    whole = ablation.ablate(dataclasses.replace(config, output=run_dir / "whole.csv"), progress=False).rows
    opened = []
    original = NeoXEngine.open

    def open_then_stop(self, token_lists, seen=None):
        opened.append(len(token_lists))
        if len(opened) == 3:
            raise KeyboardInterrupt
        return original(self, token_lists, seen)

    monkeypatch.setattr(NeoXEngine, "open", open_then_stop)
    with pytest.raises(KeyboardInterrupt):
        ablation.ablate(config, progress=False)
    assert ablation.partial_path(config.output).exists() and not config.output.exists()
    kept = ablation.partial_path(config.output).read_bytes()

    assert ablation.ablate(config, progress=False).rows == whole
    assert len(opened) == 3 + 2, "two of four texts were left to do"
    assert not ablation.partial_path(config.output).exists()
    assert config.output.read_bytes() == (run_dir / "whole.csv").read_bytes()

    # Sums of other inputs are not taken over.
    ablation.partial_path(config.output).write_bytes(kept)
    opened[:] = [0] * 9
    changed = dataclasses.replace(config, feature_subset="0-9", overwrite=True)
    ablation.ablate(changed, progress=False)
    assert len(opened) == 9 + 4


def test_pairs_start_at_the_first_firing():
    active = torch.zeros(2, 4, 3, dtype=torch.bool)
    active[0, 2:, 1] = True
    active[1, 1, 2] = active[1, 3, 2] = True
    assert rank._pairs(active) == [Pair(0, (1,), 2), Pair(1, (2,), 1)]


@pytest.mark.parametrize(
    ("max_positions", "max_texts", "size"), [(100, 9, 4), (100, 2, 2), (1, 9, 1), (12, 9, 2), (13, 9, 2)]
)
def test_block_is_bounded(max_positions, max_texts, size):
    token_lists = [[0] * 4, [0] * 6, [0] * 5, [0] * 5]
    assert rank._block(token_lists, max_positions, max_texts) == token_lists[:size]


# TransformerLens, whose import takes seconds.


@pytest.mark.slow
@pytest.mark.parametrize("processing", ["raw", "centred"])
def test_a_bridge_gives_the_same_ranking(sae, rows, sharp_neox_dir, processing, caplog):
    """Raw weights are recognised and take the fast way; folded ones do not, and agree all the same."""
    bridge = ablation.build_transformer_model(str(sharp_neox_dir), device="cpu", processing=processing)
    plain = StandardSAE(sae.d_in, sae.d_sae)
    plain.load_state_dict(sae.state_dict())
    plain.metadata = {"hook_name": HOOK, "processing": processing}
    features = list(range(0, D_SAE, 3))
    found = ablation.rank_features_by_ablation(plain, bridge, HOOK, TEXTS, features, False)
    assert ("whole sequences" in caplog.text) == (processing == "centred")
    if processing == "raw":
        wanted = [by_feature(rows)[feature] for feature in features]
    else:
        model = load_model(str(sharp_neox_dir), device="cpu", processing="centred")
        wanted = ablation.rank_features_by_ablation(plain, model, HOOK, TEXTS, features, False)
    assert worst_error(found, wanted) < (1e-7 if processing == "raw" else 3e-5)
    other = {"raw": "centred", "centred": "raw"}[processing]
    plain.metadata = {"processing": other}
    with pytest.raises(MechintError, match=f"trained on {other}.*processing {processing}"):
        ablation.rank_features_by_ablation(plain, bridge, HOOK, TEXTS, features, False)
    with pytest.raises(MechintError, match="no hook 'blocks.3.hook_nothing'"):
        ablation.rank_features_by_ablation(plain, bridge, "blocks.3.hook_nothing", TEXTS, features, False)


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["blocks.2.hook_mlp_out", "blocks.2.hook_attn_out", "blocks.2.mlp.hook_post"])
def test_hooks_off_the_residual_stream(sae, sharp_neox_dir, hook, caplog):
    """Outputs of a sublayer are edited in the stream they are added to; other hooks take the general way."""
    model = load_model(str(sharp_neox_dir), device="cpu", backend="bridge", hook_name=hook)
    tokens = torch.tensor(model.tokenize(TEXTS[3:], prepend_bos=True))
    width = model.activations(tokens, hook).shape[-1]
    torch.manual_seed(0)
    plain = StandardSAE(width, 8)
    remove = [ablation.single_feature_ablation_hook(plain, feature) for feature in range(8)]
    with torch.inference_mode():
        wanted = [
            kl.kl_of_log_probs(model.logits(tokens)[0], model.logits_with(tokens, hook, edit)[0]) for edit in remove
        ]
    found = by_feature(ablation.rank_features_by_ablation(plain, model, hook, TEXTS[3:], None, False, prepend_bos=True))
    assert ("whole sequences" in caplog.text) == (hook == "blocks.2.mlp.hook_post")
    assert max(float(value.max()) for value in wanted) > 1e-4
    for feature, value in enumerate(wanted):
        assert found[feature]["mean_kl"] == pytest.approx(float(value.mean()), abs=1e-5)
        assert found[feature]["max_kl"] == pytest.approx(float(value.max()), abs=5e-5)
