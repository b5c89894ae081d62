"""SAEs in a model, and the store of tokens and activations, on a small random GPT-NeoX."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_saelens_api import IN, OUT, drawn_transcoder

from mechint.errors import MechintError
from mechint.models import load_model
from mechint.saelens import SAE, ActivationsStore, HookedSAETransformer

HOOK = "blocks.3.hook_resid_post"
POST = f"{HOOK}.hook_sae_acts_post"
TOKENS = torch.tensor([[0, 20, 30, 40, 50, 60], [0, 61, 52, 43, 34, 25]])
TEXTS = ["the cat sat on the mat", "the dog ran far away from home again", "again the cat ran home"] * 6


@pytest.fixture(scope="module")
def model(tiny_neox_dir: Path) -> HookedSAETransformer:
    return HookedSAETransformer.from_pretrained(str(tiny_neox_dir), device="cpu")


@pytest.fixture(autouse=True)
def nothing_stays_attached(model: HookedSAETransformer) -> Any:
    yield
    model.reset_saes()


def sae_at(hook_name: str = HOOK, *, d_in: int = 32, processing: str = "raw", seed: int = 0) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "W_enc": torch.randn(d_in, 64, generator=generator) / d_in**0.5,
        "b_enc": torch.randn(64, generator=generator) / 4,
        "W_dec": torch.randn(64, d_in, generator=generator) / d_in**0.5,
        "b_dec": torch.randn(d_in, generator=generator) / 4,
    }
    metadata = {"hook_name": hook_name, "processing": processing, "context_size": 16, "prepend_bos": True}
    return SAE.from_tensors("standard", tensors, metadata=metadata).requires_grad_(False)


def with_metadata(sae: SAE, **values: Any) -> SAE:
    other = copy.deepcopy(sae)
    other.cfg.metadata.update(values)
    return other


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-4, atol=1e-4)


def test_the_model_runs_on_with_the_reconstruction(model: HookedSAETransformer):
    sae = sae_at()
    expected = model.language_model.logits_with(TOKENS, HOOK, sae)
    clean = model(TOKENS)
    found = model.run_with_saes(TOKENS, saes=[sae])
    same(found, expected)
    assert (found - clean).abs().max() > 0.1
    same(model.run_with_saes(TOKENS, saes=sae, use_error_term=True), clean)
    same(model(TOKENS), clean)  # nothing stayed
    model.add_sae(sae)
    same(model(TOKENS), expected)
    assert model.acts_to_saes == {HOOK: sae}
    model.reset_saes()
    same(model(TOKENS), clean)
    assert model.acts_to_saes == {} and not [name for name in model.hook_dict if "hook_sae" in name]


def test_the_cache_holds_the_stages(model: HookedSAETransformer):
    sae = sae_at()
    residual = model.language_model.activations(TOKENS, HOOK).clone()
    _, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae])
    same(cache[f"{HOOK}.hook_sae_input"], residual)
    same(cache[f"{HOOK}.hook_sae_acts_pre"], (residual - sae.b_dec) @ sae.W_enc + sae.b_enc)
    same(cache[POST], sae.encode(residual))
    for name in ("hook_sae_recons", "hook_sae_output"):
        same(cache[f"{HOOK}.{name}"], sae(residual))
    assert f"{HOOK}.hook_sae_error" not in cache
    same(cache["blocks.4.hook_resid_pre"], sae(residual))
    _, cache = model.run_with_cache_with_saes(
        TOKENS, saes=[sae], use_error_term=True, names_filter=lambda n: "sae" in n
    )
    same(cache[f"{HOOK}.hook_sae_error"], residual - sae(residual))
    same(cache[f"{HOOK}.hook_sae_output"], residual)
    assert {name.rsplit(".", 1)[1] for name in cache} == set(sae.hook_dict)
    assert model.get_sae_hook_name(sae) == POST


def test_functions_at_the_stages_change_what_comes_after(model: HookedSAETransformer):
    sae = sae_at()
    residual = model.language_model.activations(TOKENS, HOOK).clone()
    acts = sae.encode(residual)
    latent = int(acts.sum(dim=(0, 1)).argmax())

    def without(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts = acts.clone()
        acts[..., latent] = 0
        return acts

    edited = acts.clone()
    edited[..., latent] = 0
    for use_error_term in (False, True):
        # with the error term, only what the latent contributes is missing
        out = sae.decode(edited) + (residual - sae.decode(acts) if use_error_term else 0)
        expected = model.language_model.logits_with(TOKENS, HOOK, lambda value, out=out: out)
        found = model.run_with_hooks_with_saes(
            TOKENS, saes=[sae], use_error_term=use_error_term, fwd_hooks=[(POST, without)]
        )
        same(found, expected)
    with pytest.raises(MechintError, match="hook_sae_acts_post"):
        model.run_with_hooks_with_saes(TOKENS, saes=[sae], fwd_hooks=[(f"{HOOK}.hook_sae_acts_pos", without)])
    model.add_sae(sae)
    same(model.run_with_hooks(TOKENS, fwd_hooks=[(POST, without)]), expected_logits(model, sae.decode(edited)))


def expected_logits(model: HookedSAETransformer, out: torch.Tensor) -> torch.Tensor:
    attached = model.acts_to_saes
    model.reset_saes()
    logits = model.language_model.logits_with(TOKENS, HOOK, lambda value: out)
    for sae in attached.values():
        model.add_sae(sae)
    return logits


@pytest.mark.parametrize(
    "hook_name", ["blocks.2.attn.hook_z", "blocks.2.hook_mlp_out", "blocks.2.hook_attn_out", "blocks.0.hook_resid_pre"]
)
def test_other_hooks(model: HookedSAETransformer, hook_name: str):
    sae, clean = sae_at(hook_name), model(TOKENS)
    _, before = model.run_with_cache(TOKENS)
    value = before[hook_name].reshape(*TOKENS.shape, 32)  # heads side by side
    assert (model.run_with_saes(TOKENS, saes=[sae]) - clean).abs().max() > 1e-2
    same(model.run_with_saes(TOKENS, saes=[sae], use_error_term=True), clean)
    wanted = f"{hook_name}.hook_sae_acts_post"
    _, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae], names_filter=[wanted])
    assert list(cache) == [wanted]
    same(cache[wanted], sae.encode(value))
    assert model.to("cpu").eval() is model


def test_a_block_leaves_things_as_they_were(model: HookedSAETransformer):
    first, second, other = sae_at(), sae_at(seed=1), sae_at("blocks.1.hook_resid_pre", seed=2)
    model.add_sae(first, use_error_term=True)
    before = model(TOKENS)
    with model.saes([second, other]) as inside:
        assert inside is model
        assert model.acts_to_saes == {HOOK: second, "blocks.1.hook_resid_pre": other}
        assert (model(TOKENS) - before).abs().max() > 0.1
    assert model.acts_to_saes == {HOOK: first}
    same(model(TOKENS), before)
    with pytest.raises(ZeroDivisionError), model.saes([second]):
        _ = 1 / 0
    assert model.acts_to_saes == {HOOK: first}
    with model.saes([other], reset_saes_end=False):
        pass
    assert set(model.acts_to_saes) == {HOOK, "blocks.1.hook_resid_pre"}
    model.reset_saes(HOOK)
    assert set(model.acts_to_saes) == {"blocks.1.hook_resid_pre"}


def test_hooks_of_the_user_survive(model: HookedSAETransformer):
    seen = []
    model.add_hook(HOOK, lambda value, hook: seen.append(1))
    model.run_with_saes(TOKENS, saes=[sae_at()])
    model(TOKENS)
    assert len(seen) == 2
    model.reset_hooks()


def test_an_sae_of_the_centred_stream_in_a_raw_model_predicts_as_in_a_centred_one(
    model: HookedSAETransformer, tiny_neox_dir: Path
):
    sae = sae_at(processing="centred")
    centred = HookedSAETransformer.from_pretrained(str(tiny_neox_dir), device="cpu", center_writing_weights=True)
    there, _ = centred.run_with_cache_with_saes(TOKENS, saes=[sae])
    here, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae])
    same(here.log_softmax(-1), there.log_softmax(-1))
    same(cache[f"{HOOK}.hook_sae_input"].mean(-1), torch.zeros(TOKENS.shape))
    exact, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae], use_error_term=True)
    same(exact, model(TOKENS))
    # the mean that was taken off is there again
    same(cache["blocks.4.hook_resid_pre"], model.language_model.activations(TOKENS, HOOK))
    with pytest.raises(MechintError, match="raw.*center_writing_weights"):
        centred.add_sae(sae_at())


def test_special_tokens_can_be_passed_by(model: HookedSAETransformer):
    sae = sae_at()
    residual = model.language_model.activations(TOKENS, HOOK).clone()
    for exclude, mask in ((True, TOKENS == 0), ([30, 0], (TOKENS == 0) | (TOKENS == 30))):
        _, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae], exclude_special_tokens=exclude)
        expected = torch.where(mask[..., None], residual, sae(residual))
        same(cache[f"{HOOK}.hook_sae_output"], expected)
        same(cache["blocks.4.hook_resid_pre"], expected)
    assert not model.hook_dict["embed.hook_in"].fwd_hooks


def test_what_does_not_fit_is_refused(model: HookedSAETransformer):
    with pytest.raises(MechintError, match="no hook 'blocks.9"):
        model.add_sae(sae_at("blocks.9.hook_resid_post"))
    with pytest.raises(MechintError, match="d_in 16"):
        model.run_with_saes(TOKENS, saes=[sae_at(d_in=16)])
    nameless = sae_at()
    del nameless.cfg.metadata["hook_name"]
    with pytest.raises(MechintError, match="which hook"):
        model.add_sae(nameless)
    with pytest.raises(MechintError, match="there is none"):
        model.reset_saes(HOOK)
    with pytest.raises(MechintError, match="expected an SAE"):
        model.add_sae("an SAE")
    with pytest.raises(MechintError, match="fold_ln"):
        HookedSAETransformer.from_pretrained("builtin/pythia-tiny", fold_lm=True)
    assert model.acts_to_saes == {}


# --- the store --------------------------------------------------------------------------------------------------------


def test_the_store_gives_tokens_and_their_activations(model: HookedSAETransformer):
    sae = sae_at()
    store = ActivationsStore.from_sae(
        model, sae, TEXTS, store_batch_size_prompts=3, train_batch_size_tokens=20, n_batches_in_buffer=2
    )
    tokens = store.get_batch_tokens()
    assert tokens.shape == (3, 16) and tokens.dtype == torch.int64 and bool((tokens[:, 0] == 0).all())
    ids = model.language_model.tokenize(TEXTS, prepend_bos=False)
    assert tokens[0, 1 : 1 + len(ids[0])].tolist() == ids[0]
    acts = store.get_activations(tokens)
    assert acts.shape == (3, 16, 32)
    same(acts, model.language_model.activations(tokens, HOOK))
    assert store.next_batch().shape == (20, 32)
    assert next(iter(store)).shape == (20, 32)
    plain = ActivationsStore.from_sae(load_model(model.language_model.location), sae, [{"text": t} for t in TEXTS])
    assert torch.equal(plain.get_batch_tokens(3), tokens)


def test_an_epoch_ends_where_asked_and_begins_again(model: HookedSAETransformer):
    store = ActivationsStore.from_sae(model, sae_at(), [{"tokens": list(range(20))}, {"tokens": [7] * 16}])
    assert store.get_batch_tokens(2, raise_at_epoch_end=True).tolist() == [list(range(16)), [7] * 16]
    with pytest.raises(StopIteration):
        store.get_batch_tokens(1, raise_at_epoch_end=True)
    assert store.get_batch_tokens(3)[:, 1].tolist() == [1, 7, 1]


def test_mistakes_of_the_store_are_told(model: HookedSAETransformer, tmp_path: Path):
    sae = sae_at()
    with pytest.raises(MechintError, match="does not say its dataset"):
        ActivationsStore.from_sae(model, sae)
    with pytest.raises(MechintError, match="no such file"):
        ActivationsStore.from_sae(model, sae, str(tmp_path / "none.txt"))
    with pytest.raises(MechintError, match="text, problem, tokens, input_ids; found columns words"):
        ActivationsStore.from_sae(model, sae, [{"words": "x"}]).get_batch_tokens()
    with pytest.raises(MechintError, match="does not fill one window"):
        ActivationsStore.from_sae(model, sae, ["short"]).get_batch_tokens()
    with pytest.raises(MechintError, match="rows of 3 tokens"):
        ActivationsStore.from_sae(model, sae, [{"tokens": [1, 2, 3]}]).get_batch_tokens()
    with pytest.raises(MechintError, match="context_size must be from 2 to 128"):
        ActivationsStore.from_sae(model, sae, TEXTS, context_size=4096)
    with pytest.raises(MechintError, match="seqpos_slice"):
        ActivationsStore.from_sae(model, with_metadata(sae, seqpos_slice=(20, 30)), TEXTS)
    with pytest.raises(MechintError, match="no head 9"):
        store = ActivationsStore.from_sae(
            model, with_metadata(sae_at("blocks.3.attn.hook_z", d_in=8), hook_head_index=9), TEXTS
        )
        store.get_activations(TOKENS)
    with pytest.raises(MechintError, match="which hook"):
        ActivationsStore.from_sae(model, with_metadata(sae, hook_name=None), TEXTS)


def test_activations_are_those_that_the_sae_was_trained_on(model: HookedSAETransformer, tiny_neox_dir: Path):
    residual = model.language_model.activations(TOKENS, HOOK).clone()
    centred = ActivationsStore.from_sae(model, sae_at(processing="centred"), TEXTS).get_activations(TOKENS)
    same(centred, residual - residual.mean(-1, keepdim=True))
    assert (centred - residual).abs().max() > 0.1
    other = HookedSAETransformer.from_pretrained(str(tiny_neox_dir), device="cpu", center_writing_weights=True)
    same(ActivationsStore.from_sae(other, sae_at(processing="centred"), TEXTS).get_activations(TOKENS), centred)
    with pytest.raises(MechintError, match="trained on the raw"):
        ActivationsStore.from_sae(other, sae_at(), TEXTS)
    # positions and heads
    sliced = with_metadata(sae_at(), seqpos_slice=(2, -1))
    store = ActivationsStore.from_sae(model, sliced, TEXTS, store_batch_size_prompts=2, train_batch_size_tokens=13)
    same(store.get_activations(TOKENS), residual[:, 2:-1])
    assert store.training_context_size == 13 and store.get_batch_tokens().shape == (2, 16)
    assert store.next_batch().shape == (13, 32)
    heads = model.language_model.activations(TOKENS, "blocks.3.attn.hook_z")
    assert heads.shape == (2, 6, 4, 8)
    one = with_metadata(sae_at("blocks.3.attn.hook_z", d_in=8), hook_head_index=2)
    same(ActivationsStore.from_sae(model, one, TEXTS).get_activations(TOKENS), heads[:, :, 2])


def test_rows_of_special_tokens_can_be_left_out(model: HookedSAETransformer):
    sae = sae_at()
    given = {"store_batch_size_prompts": 2, "train_batch_size_tokens": 10, "n_batches_in_buffer": 1}
    store = ActivationsStore.from_sae(model, sae, TEXTS, exclude_special_tokens=True, **given)
    tokens = store.get_batch_tokens()
    assert bool((tokens[:, 0] == 0).all())
    first = store.get_activations(tokens)[:, 0]
    store.reset_input_dataset()
    rows = torch.cat([store.next_batch() for _ in range(6)])
    assert (torch.cdist(rows, first) > 1e-3).all()
    every = ActivationsStore.from_sae(model, sae, TEXTS, **given)
    rows = torch.cat([every.next_batch() for _ in range(6)])
    assert (torch.cdist(rows, first) < 1e-3).any()


# --- transcoders ------------------------------------------------------------------------------------------------------


def test_a_transcoder_replaces_what_it_writes_by_what_it_reads(model: HookedSAETransformer):
    sae = drawn_transcoder(skip=True, d_in=32, d_out=32).requires_grad_(False)
    x, y = (model.language_model.activations(TOKENS, name).clone() for name in (IN, OUT))
    out, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae])
    expected = model.language_model.logits_with(TOKENS, OUT, lambda value: sae(x))
    same(out, expected)
    same(cache[f"{OUT}.hook_sae_input"], x)
    same(cache[f"{OUT}.hook_sae_acts_post"], sae.encode(x))
    same(cache[f"{OUT}.hook_sae_recons"], sae.decode(sae.encode(x)))
    same(cache[f"{OUT}.hook_sae_output"], sae(x))
    assert model.get_sae_hook_name(sae) == f"{OUT}.hook_sae_acts_post"
    exact, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae], use_error_term=True)
    same(exact, model(TOKENS))
    same(cache[f"{OUT}.hook_sae_error"], y - sae(x))
    _, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae], exclude_special_tokens=True)
    same(cache[f"{OUT}.hook_sae_output"], torch.where((TOKENS == 0)[..., None], y, sae(x)))
    # attached: known by the hook that it reads; an SAE where it writes takes its place, and gives it back
    model.add_sae(sae)
    assert model.acts_to_saes == {IN: sae}
    with model.saes([sae_at(OUT)]):
        assert set(model.acts_to_saes) == {OUT}
    assert set(model.acts_to_saes) == {IN}
    same(model(TOKENS), expected)
    model.reset_saes(IN)
    assert not model.hook_dict[IN].fwd_hooks and not model.hook_dict[OUT].fwd_hooks
    same(model(TOKENS), model.language_model.logits(TOKENS))


def test_a_transcoder_of_the_centred_stream_predicts_as_in_a_centred_model(
    model: HookedSAETransformer, tiny_neox_dir: Path
):
    loaded = drawn_transcoder(d_in=32, d_out=32)
    metadata = {**loaded.metadata, "processing": "centred", "hook_name": "blocks.3.hook_resid_pre"}
    sae = loaded.variant(metadata=metadata).requires_grad_(False)
    centred = HookedSAETransformer.from_pretrained(str(tiny_neox_dir), device="cpu", center_writing_weights=True)
    same(
        model.run_with_saes(TOKENS, saes=[sae]).log_softmax(-1),
        centred.run_with_saes(TOKENS, saes=[sae]).log_softmax(-1),
    )
    same(model.run_with_saes(TOKENS, saes=[sae], use_error_term=True), model(TOKENS))


def test_transcoders_that_do_not_fit_are_refused(model: HookedSAETransformer):
    with pytest.raises(MechintError, match="d_out 24.*hook_mlp_out.*32 wide"):
        model.run_with_saes(TOKENS, saes=[drawn_transcoder(d_in=32, d_out=24).requires_grad_(False)])
    sae = drawn_transcoder(d_in=32, d_out=32).requires_grad_(False)
    with pytest.raises(MechintError, match="which the model computes first"):
        turned = with_metadata(sae, hook_name="blocks.4.hook_resid_post", hook_name_out="blocks.2.hook_resid_post")
        model.run_with_saes(TOKENS, saes=[turned])
    with pytest.raises(MechintError, match="no hook 'blocks.3.hook_mlp_ou'"):
        model.add_sae(with_metadata(sae, hook_name_out="blocks.3.hook_mlp_ou"))
    with pytest.raises(MechintError, match="which hook it writes"):
        model.add_sae(with_metadata(sae, hook_name_out=None))
    assert model.acts_to_saes == {}
