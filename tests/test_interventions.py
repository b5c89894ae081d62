"""Edits of latents against plain transformers hooks in float64."""

import pytest
import torch
import torch.nn.functional as F

from mechint.ablation import interventions
from mechint.ablation.interventions import (
    Edit,
    acts_of,
    continuation,
    intervene,
    logit_difference,
    mean_of,
    remove,
    resample_of,
    scale,
    set_to,
)
from mechint.errors import MechintError
from mechint.eval import Text
from mechint.models import load_model
from mechint.sae import StandardSAE

HOOK = "blocks.3.hook_resid_post"
D_SAE = 24
TOKENS = [[0, 9, 40, 17, 3, 88, 250], [0, 5, 6, 7], [0, 200, 131, 77, 9, 9, 30, 12, 4]]
TEXTS = [Text(tokens, [False] + [True] * (len(tokens) - 1)) for tokens in TOKENS]
SET = (20, 3, 23)


@pytest.fixture(scope="module", params=["raw", "centred"])
def model(tiny_neox_dir, request):
    model = load_model(str(tiny_neox_dir), device="cpu", processing=request.param)
    model.hf_model.double()
    model.hf_model.get_output_embeddings().weight.mul_(20.0)
    return model


@pytest.fixture(scope="module")
def sae(model):
    torch.manual_seed(3)
    sae = StandardSAE(model.d_model, D_SAE)
    with torch.no_grad():
        sae.b_dec.copy_(0.1 * torch.randn(model.d_model))
        sae.b_enc.copy_(torch.linspace(-2, 1, D_SAE))
    return sae.double().requires_grad_(False)


def plain_logits(model, tokens, edit=None):
    """`edit` gets the stream and its processed value, both `[1, pos, d_model]`."""
    hf = model.hf_model

    def hook(module, args, out):
        return edit(out, out - out.mean(-1, keepdim=True) if model.processing == "centred" else out)

    handle = hf.gpt_neox.layers[3].register_forward_hook(hook) if edit else None
    logits = hf(torch.tensor([tokens])).logits[0]
    if handle:
        handle.remove()
    return logits


def plain_acts(sae, value):
    return torch.relu((value - sae.b_dec) @ sae.W_enc + sae.b_enc)


def all_acts(model, sae):
    """f at every touched position of all texts, row by row."""
    found = []
    for tokens in TOKENS:
        plain_logits(model, tokens, lambda out, value: found.append(plain_acts(sae, value)[0, 1:]) or out)
    return torch.cat(found)


def outcome_of(model, tokens, edit):
    clean, edited = plain_logits(model, tokens), plain_logits(model, tokens, edit)
    log_p, log_q = clean.log_softmax(-1), edited.log_softmax(-1)
    following = torch.tensor(tokens[1:])[:, None]
    ce = (log_p[:-1].gather(1, following) - log_q[:-1].gather(1, following))[:, 0]
    return (log_p.exp() * (log_p - log_q)).sum(-1), F.pad(ce, (0, 1)), clean, edited


@pytest.mark.parametrize("kind", ["remove", "boost", "turn around", "set", "mean"])
def test_edits_are_what_a_plain_hook_does(model, sae, kind):
    amounts = {"set": [0.5, 0.0, 2.0], "mean": all_acts(model, sae)[:, list(SET)].mean(0).tolist()}
    edit = {
        "remove": remove(SET),
        "boost": scale(SET, 3.0),
        "turn around": scale(SET, -1.0),
        "set": set_to(SET, amounts["set"]),
        "mean": mean_of(sae, model, HOOK, TEXTS, SET, batch_size=2),
    }[kind]
    factor = {"remove": 0.0, "boost": 3.0, "turn around": -1.0}.get(kind)

    def plain(out, value):
        f = plain_acts(sae, value)
        for place, latent in enumerate(SET):
            new = f[..., latent] * factor if factor is not None else torch.full_like(f[..., 0], amounts[kind][place])
            change = (new - f[..., latent])[..., None] * sae.W_dec[latent]
            change[:, 0] = 0  # the SAE may not touch BOS
            out = out + change
        return out

    for batch_size in (1, 16):
        found = intervene(sae, model, HOOK, TEXTS, edit, tokens=[7, 40], batch_size=batch_size)
        assert len(found) == len(TEXTS)
        for tokens, outcome in zip(TOKENS, found, strict=True):
            kl, ce, clean, edited = outcome_of(model, tokens, plain)
            torch.testing.assert_close(outcome.kl, kl, rtol=1e-8, atol=1e-11)
            torch.testing.assert_close(outcome.ce_change, ce, rtol=1e-8, atol=1e-11)
            torch.testing.assert_close(outcome.logits_before, clean[:, [7, 40]])
            torch.testing.assert_close(outcome.logits_after, edited[:, [7, 40]])
            assert outcome.kl[0] < 1e-14 and outcome.kl.max() > 1e-6
            before, after = logit_difference(outcome, [7, 40], 40, 7)
            assert before == pytest.approx(float(clean[-1, 40] - clean[-1, 7]))
            assert after == pytest.approx(float(edited[-1, 40] - edited[-1, 7]))


def test_sets_act_together(model, sae):
    """Removing two latents at once is not the sum of removing each."""
    both, one, other = (
        torch.cat([outcome.kl for outcome in intervene(sae, model, HOOK, TEXTS, remove(latents))])
        for latents in ((20, 23), (20,), (23,))
    )
    assert not torch.allclose(both, one + other, rtol=0.01)


def test_an_edit_that_changes_nothing(model, sae):
    for outcome in intervene(sae, model, HOOK, TEXTS, scale(SET, 1.0)):
        assert outcome.kl.max() < 1e-12 and outcome.ce_change.abs().max() < 1e-12


def test_resampling(model, sae):
    edit = resample_of(sae, model, HOOK, TEXTS, SET, seed=1)
    pool = all_acts(model, sae)[:, list(SET)]
    assert edit.pool is not None
    torch.testing.assert_close(edit.pool, pool)
    torch.testing.assert_close(acts_of(sae, model, HOOK, TEXTS, SET, batch_size=1), pool)
    acts = torch.zeros(3, 9, 3, dtype=torch.float64)
    drawn = edit.new_acts(acts)
    rows = {tuple(row) for row in edit.pool.tolist()}
    assert all(tuple(row) in rows for row in drawn.flatten(0, 1).tolist()), "latents of a row stay together"
    assert len({tuple(row) for row in drawn.flatten(0, 1).tolist()}) > 5
    # the same wherever a text and a position stand in a batch
    torch.testing.assert_close(edit.new_acts(acts[:2, :4], first_position=3, first_text=1), drawn[1:, 3:7])
    assert not torch.equal(resample_of(sae, model, HOOK, TEXTS, SET, seed=2).new_acts(acts), drawn)

    one, many = (
        torch.cat([o.kl for o in intervene(sae, model, HOOK, TEXTS, edit, batch_size=size)]) for size in (1, 3)
    )
    torch.testing.assert_close(one, many, rtol=1e-8, atol=1e-11)

    def plain(out, value):
        change = (drawn[:1, : out.shape[1]] - plain_acts(sae, value)[..., list(SET)]) @ sae.W_dec[list(SET)]
        change[:, 0] = 0
        return out + change

    kl, _, _, _ = outcome_of(model, TOKENS[0], plain)
    torch.testing.assert_close(one[: len(TOKENS[0])], kl, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", ["set", "resample"])
def test_continuation_is_greedy(model, sae, kind):
    edit = set_to(SET, 8.0)
    if kind == "resample":
        edit = Edit(SET, "resample", pool=20 * torch.rand(50, 3, generator=torch.Generator().manual_seed(0)))
    prompt = Text(TOKENS[1], [False, True, True, True])

    def plain(out, value):
        acts = plain_acts(sae, value)[:, 1:, list(SET)]
        # what is drawn for a position is counted from the first one that is touched
        change = (edit.new_acts(acts, first_position=1) - acts) @ sae.W_dec[list(SET)]
        return torch.cat((out[:, :1], out[:, 1:] + change), dim=1)

    expected = []
    for hook in (None, plain):
        tokens = list(prompt.tokens)
        for _ in range(6):
            tokens.append(int(plain_logits(model, tokens, hook)[-1].argmax()))
        new = tokens[len(prompt.tokens) :]
        expected.append(new[: new.index(0)] if 0 in new else new)
    found = continuation(sae, model, HOOK, prompt, edit, max_new_tokens=6)
    assert list(found) == expected
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove([D_SAE]), f"latent {D_SAE} is out of range, the SAE has latents 0 to {D_SAE - 1}"),
        (remove([-1]), "latent -1 is out of range"),
        (remove([]), "at least one latent"),
        (remove([1, 1]), "names a latent twice"),
        (set_to([1, 2], [0.5]), "edit of 2 latents was given values for 1"),
        (Edit((1,), "resample", pool=torch.zeros(0, 1)), "nothing to resample from"),
    ],
)
def test_bad_edits(model, sae, edit, message):
    with pytest.raises(MechintError, match=message):
        intervene(sae, model, HOOK, TEXTS, edit)
    with pytest.raises(MechintError, match=message):
        continuation(sae, model, HOOK, TEXTS[0], edit)


def test_other_mistakes(model, sae):
    with pytest.raises(MechintError, match="no texts"):
        intervene(sae, model, HOOK, [], remove([1]))
    with pytest.raises(MechintError, match="token 999999 is out of range"):
        intervene(sae, model, HOOK, TEXTS, remove([1]), tokens=[999999])
    with pytest.raises(MechintError, match="latent 99 is out of range"):
        mean_of(sae, model, HOOK, TEXTS, [99])
    with pytest.raises(MechintError, match="at its start only"):
        continuation(sae, model, HOOK, Text([0, 5, 6], [True, False, True]), remove([1]))
    (outcome,) = intervene(sae, model, HOOK, TEXTS[:1], remove([1]), tokens=[7])
    with pytest.raises(MechintError, match="logits of token 8 were not kept"):
        logit_difference(outcome, [7], 7, 8)
    with pytest.raises(MechintError, match="text 1 that are not finite"):
        intervene(sae, model, HOOK, TEXTS, set_to([1], float("inf")))


def test_blocks_of_texts_are_bounded(monkeypatch):
    monkeypatch.setattr(interventions, "MAX_LOGITS", 9 * 2 * 10)
    sizes = []
    rest = TEXTS
    while rest:
        batch = interventions._next(rest, 16, 10)
        sizes.append(len(batch))
        rest = rest[len(batch) :]
    assert sizes == [2, 1]
