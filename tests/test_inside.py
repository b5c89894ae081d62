"""An SAE in its model: every hook, heads, transcoders, and what does not belong together."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HOOK, make_tiny_neox

from mechint import ablation
from mechint.ablation import interventions, rank_latents
from mechint.analysis.search import fires_on
from mechint.errors import MechintError
from mechint.eval import evaluate_texts, texts_from_tokens
from mechint.formats.saelens import save_folder
from mechint.inside import Inside, check_fit, open_inside, put_inside, written_hook
from mechint.models import LanguageModel, load_model
from mechint.sae import SAE, SAEConfig
from mechint.sae.config import SAEMetadata
from mechint.steering import ablate_latent, clamp_latent, steer

TEXTS = ["Anna lives in Paris.", "The small dog has a red ball."]
HEADS = "blocks.3.attn.hook_z"


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return load_model("builtin/pythia-tiny", device="cpu", backend="bridge")


def make_sae(d_in: int, d_out: int | None = None, *, settings: dict[str, object] | None = None, **metadata) -> SAE:
    """A small SAE many of whose latents fire; with `d_out` a transcoder with a skip connection."""
    torch.manual_seed(3)
    kind = "standard" if d_out is None else "skip_transcoder"
    sae = SAE(SAEConfig(d_in, 12, kind, d_out=d_out, metadata=SAEMetadata(metadata), **(settings or {})))
    with torch.no_grad():
        sae.b_enc.fill_(0.5)
        if sae.cfg.has_skip:
            sae.W_skip.normal_(std=0.05)
    return sae.requires_grad_(False)


def at(sae: SAE, model: LanguageModel, hook_name: str) -> Inside:
    return Inside(sae, model, hook_name, Path("x"), None, True, True, None)


def accepted_hooks(model: LanguageModel) -> dict[str, str]:
    """Each hook point of the model by one of its names, and why collect refuses it ("": it does not)."""
    points: dict[int, str] = {}
    for name, point in model.bridge.hook_dict.items():
        points.setdefault(id(point), name)
    found = {}
    for name in points.values():
        try:
            model.hook_shape(name)
            found[name] = ""
        except MechintError as error:
            found[name] = str(error)
    return found


@pytest.mark.parametrize("layers", ["4", pytest.param("01235", marks=pytest.mark.slow)])
def test_at_every_hook_that_collect_accepts_every_reader_works(tiny: LanguageModel, layers: str):
    verdicts = accepted_hooks(tiny)
    names = [name for name, why in verdicts.items() if not why]
    # by reason: not on the way, no vector a token, only looked at
    assert "no pass" in verdicts["blocks.3.attn.hook_result"] and "not use" in verdicts["rotary_emb.hook_in"]
    assert "not one vector" in verdicts["blocks.3.attn.hook_pattern"]
    for part in ("hook_in", "hook_attn_out", "mlp.hook_post", *(f"attn.hook_{x}" for x in "qkvz")):
        assert all(f"blocks.{layer}.{part}" in names for layer in range(tiny.n_layers)), part
    token_lists = tiny.tokenize(TEXTS, prepend_bos=True)
    texts = texts_from_tokens(token_lists, prepend_bos=True, keep_bos=True)
    clean = tiny.logits(torch.tensor(token_lists[:1]))
    for name in names:
        if name.startswith("blocks.") and name.split(".")[1] not in layers:
            continue
        sae = make_sae(tiny.hook_width(name))
        check_fit(sae, tiny, name)
        found = evaluate_texts(at(sae, tiny, name), texts, n_resamples=0)
        assert found["ce_sae"] != found["ce_clean"], name
        # no prediction is left where a LayerNorm divides by 0
        assert found["kl_clean_zero"] is None if name.endswith("hook_scale") else found["kl_clean_zero"] > 0, name
        firing = fires_on(at(sae, tiny, name), TEXTS[0])
        assert len(firing.tokens) == len(token_lists[0]), name
        rows, _ = rank_latents(sae, tiny, name, texts, top=2, control=0, draws=1, exact_texts=1)
        strongest = rows[0]["feature_idx"]
        removed = ablation.latent_text_kl(sae, tiny, name, TEXTS[0], strongest)
        edit = ablate_latent(sae, strongest)
        log_probs = [
            logits.log_softmax(-1) for logits in (clean, tiny.logits_with(torch.tensor(token_lists[:1]), name, edit))
        ]
        kl = (log_probs[0].exp() * (log_probs[0] - log_probs[1])).sum(-1)[0]
        assert removed["kl"] == pytest.approx(kl.tolist(), abs=2e-5), name
        (steered,) = steer(tiny, TEXTS[:1], name, {"clamp": clamp_latent(sae, 1, 3.0)}, max_new_tokens=2)
        assert steered[1].next_kl >= 0 and len(steered) == 2, name


# --- heads ------------------------------------------------------------------------------------------------------------


def test_heads_lie_side_by_side_and_are_put_back(tiny: LanguageModel):
    tokens = torch.tensor(tiny.tokenize(TEXTS[:1], prepend_bos=True))
    assert tiny.hook_shape(HEADS) == (4, 32) and tiny.hook_width(HEADS) == 128
    seen = []
    hooks = [(HEADS, lambda value, hook: seen.append(value.clone()))]
    clean = tiny.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
    assert torch.equal(tiny.activations(tokens, HEADS), seen[0].flatten(2))
    only = torch.zeros(128)
    only[32:64] = 1  # of the second head

    def without_head_1(value: torch.Tensor, hook: object) -> torch.Tensor:
        value[:, :, 1] = 0
        return value

    expected = tiny.bridge.run_with_hooks(tokens, fwd_hooks=[(HEADS, without_head_1)], return_type="logits")
    found = tiny.logits_with(tokens, HEADS, lambda value: value * (1 - only))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, clean)


def test_two_tokens_are_not_taken_for_heads(tiny: LanguageModel):
    """2 tokens of 64 numbers are no vector of 128, whatever else looks at the last two dimensions."""
    with pytest.raises(MechintError, match="d_in 256, but blocks.3.hook_resid_post .* is 128 wide"):
        check_fit(make_sae(256), tiny, HOOK)

    from mechint.saelens.hooked import HookedSAETransformer

    hooked = HookedSAETransformer(tiny)
    twice = make_sae(256, hook_name=HOOK)
    with pytest.raises(MechintError, match="d_in 256, but .* is 128 wide"):
        hooked.run_with_saes(torch.tensor([[0, 5]]), saes=[twice])
    pattern = make_sae(4 * 4, hook_name="blocks.3.attn.hook_pattern")
    with pytest.raises(MechintError, match="not one vector"):
        hooked.run_with_saes(torch.tensor([[0, 5, 6, 7]]), saes=[pattern])
    heads = make_sae(128, hook_name=HEADS)
    assert hooked.run_with_saes(torch.tensor([[0, 5]]), saes=[heads]).shape == (1, 2, tiny.d_vocab)


def test_a_pattern_is_refused_whatever_the_number_of_heads(tmp_path: Path):
    """With as many heads as tokens, [batch, head, pos, pos] has the shape of [batch, pos, head, d_head]."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    made = make_tiny_neox(tmp_path / "plain")
    config = AutoConfig.from_pretrained(made)
    config.num_attention_heads, config.num_hidden_layers, config.hidden_size, config.intermediate_size = 7, 1, 56, 64
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "seven")
    AutoTokenizer.from_pretrained(made).save_pretrained(tmp_path / "seven")
    model = load_model(str(tmp_path / "seven"), device="cpu", backend="bridge")
    assert model.hook_shape("blocks.0.attn.hook_z") == (7, 8)
    with pytest.raises(MechintError, match="not one vector"):
        model.hook_shape("blocks.0.attn.hook_pattern")


# --- transcoders ------------------------------------------------------------------------------------------------------

IN, OUT, WIDER = "blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out", "blocks.2.mlp.hook_post"


@pytest.fixture(scope="module", params=[(OUT, 128), (WIDER, 512), (HEADS, 128)])
def transcoder(request: pytest.FixtureRequest) -> SAE:
    hook_out, d_out = request.param
    return make_sae(128, d_out, hook_name=IN, hook_name_out=hook_out)


def replaced(model: LanguageModel, tokens: torch.Tensor, hook_name: str, new: torch.Tensor) -> torch.Tensor:
    """Log-probabilities with `new` at the hook, by TransformerLens alone."""
    hooks = [(hook_name, lambda value, hook: new.reshape(value.shape))]
    return model.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits").log_softmax(-1)


def test_a_transcoder_is_read_at_one_hook_and_replaces_another(tiny: LanguageModel, transcoder: SAE):
    check_fit(transcoder, tiny, IN)
    out = transcoder.hook_out
    assert written_hook(transcoder, IN) == out
    token_lists = tiny.tokenize(TEXTS, prepend_bos=True)
    texts = texts_from_tokens(token_lists, prepend_bos=True, keep_bos=True)
    found = evaluate_texts(at(transcoder, tiny, IN), texts, n_resamples=0)
    squared, square, nll, count, rows = 0.0, torch.zeros(()), 0.0, 0, []
    for row in token_lists:
        tokens = torch.tensor([row])
        x, y = tiny.activations(tokens, IN), tiny.activations(tokens, out)
        x_hat = transcoder.run(x)[0]
        squared += float((x_hat - y).square().sum())
        rows.append(y[0])
        log_probs = replaced(tiny, tokens, out, x_hat)
        nll -= float(log_probs[0, :-1].gather(1, tokens[0, 1:, None]).sum())
        count += len(row) - 1
    y = torch.cat(rows)
    square = (y - y.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(squared / float(square), rel=1e-4)
    assert found["ce_sae"] == pytest.approx(nll / count, rel=1e-4) and "ce_mean" not in found


def test_readers_take_a_transcoders_latent_out_where_it_writes(tiny: LanguageModel, transcoder: SAE):
    tokens = torch.tensor(tiny.tokenize(TEXTS[:1], prepend_bos=True))
    out = transcoder.hook_out
    x, y = tiny.activations(tokens, IN), tiny.activations(tokens, out)
    acts = transcoder.encode(x)
    texts = texts_from_tokens(tokens.tolist(), prepend_bos=True, keep_bos=True)
    rows, _ = rank_latents(transcoder, tiny, IN, texts, top=12, control=0, draws=1, exact_texts=1)
    clean = tiny.logits(tokens).log_softmax(-1)
    for row in rows[:3]:
        latent = row["feature_idx"]
        changed = replaced(tiny, tokens, out, y - acts[..., latent, None] * transcoder.W_dec[latent])
        kl = (clean.exp() * (clean - changed)).sum(-1)[0]
        found = ablation.latent_text_kl(transcoder, tiny, IN, TEXTS[0], latent)
        assert found["kl"] == pytest.approx(kl.tolist(), abs=1e-5)
        assert row["exact_kl"] == pytest.approx(found["mean_kl"], rel=1e-3)
        nll = -(changed - clean)[0, :-1].gather(1, tokens[0, 1:, None]).mean()
        assert row["exact_ce_change"] == pytest.approx(float(nll), abs=1e-5)
    # the gradient is that of the output's value: small latents' effects are near their estimate
    small = min(rows, key=lambda row: abs(row["exact_ce_change"]))
    assert small["estimated_ce_change"] == pytest.approx(small["exact_ce_change"], abs=0.05)
    # steering and other edits read the one hook and write the other
    value = 4.0
    edit = clamp_latent(transcoder, 2, value)
    expected = replaced(tiny, tokens, out, y + (value - acts[..., 2, None]) * transcoder.W_dec[2])
    found = tiny.logits_with(tokens, out, edit, reads=IN).log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    (steered,) = steer(tiny, TEXTS[:1], out, {"clamp": edit}, reads=IN, positions="new", max_new_tokens=2)
    assert steered[1].next_kl > 0
    outcome = interventions.intervene(transcoder, tiny, IN, texts, interventions.set_to([2], value))
    kl = (clean.exp() * (clean - expected)).sum(-1)[0]
    torch.testing.assert_close(outcome[0].kl, kl.double(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ((IN, None), "does not say which hook it writes"),
        ((OUT, IN), f"cannot read {OUT} and replace {IN}, which the model computes first"),
        (("blocks.4.hook_resid_post", "blocks.2.hook_resid_post"), "which the model computes first"),
        ((IN, "blocks.2.mlp.hook_post"), "d_out 128, but blocks.2.mlp.hook_post .* is 512 wide"),
        (("blocks.2.mlp.hook_post", OUT), "d_in 128, but blocks.2.mlp.hook_post .* is 512 wide"),
        ((IN, "blocks.2.hook_mlp_ou"), "no hook 'blocks.2.hook_mlp_ou'"),
        ((IN, "blocks.2.attn.hook_pattern"), "not one vector"),
    ],
)
def test_transcoders_that_do_not_fit_are_refused(tiny: LanguageModel, hooks: tuple[str, str | None], message: str):
    with pytest.raises(MechintError, match=message):
        check_fit(make_sae(128, 128, hook_name=hooks[0], hook_name_out=hooks[1]), tiny, hooks[0])


def test_a_transcoder_of_the_residual_stream_needs_no_transformer_lens():
    plain = load_model("builtin/pythia-tiny", device="cpu")
    here, there = "blocks.1.hook_resid_post", "blocks.3.hook_resid_post"
    sae = make_sae(128, 128, hook_name=here, hook_name_out=there)
    check_fit(sae, plain, here)
    tokens = torch.tensor(plain.tokenize(TEXTS[:1], prepend_bos=True))
    x_hat = sae.run(plain.activations(tokens, here))[0]
    found = plain.logits_with(tokens, there, lambda value, x: sae.run(x)[0], reads=here)
    torch.testing.assert_close(found, plain.logits_with(tokens, there, lambda value: x_hat))


# --- SAEs that change their input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"normalize_activations": "layer_norm"}, {"normalize_activations": "constant_norm_rescale"}, {"input_scale": 0.2}],
)
@pytest.mark.parametrize("hook", [HOOK, "blocks.2.mlp.hook_in"])
def test_what_a_latent_adds_is_counted_behind_the_decoder(tiny: LanguageModel, settings: dict, hook: str):
    """Removing a latent takes off what the reconstruction loses when its activation is 0."""
    sae = make_sae(128, settings=settings)
    tokens = torch.tensor(tiny.tokenize(TEXTS[:1], prepend_bos=True))
    x = tiny.activations(tokens, hook)
    acts = sae.encode(x)
    latent = int(acts.sum((0, 1)).argmax())
    without = acts.clone()
    without[..., latent] = 0
    new = x + sae.decode(without) - sae.decode(acts)
    clean, changed = tiny.logits(tokens).log_softmax(-1), replaced(tiny, tokens, hook, new)
    kl = (clean.exp() * (clean - changed)).sum(-1)[0]
    assert kl.max() > 1e-4
    assert ablation.latent_text_kl(sae, tiny, hook, TEXTS[0], latent)["kl"] == pytest.approx(kl.tolist(), abs=2e-5)
    found = tiny.logits_with(tokens, hook, ablate_latent(sae, latent)).log_softmax(-1)
    torch.testing.assert_close(found, changed, atol=1e-4, rtol=1e-4)
    texts = texts_from_tokens(tokens.tolist(), prepend_bos=True, keep_bos=True)
    outcome = interventions.intervene(sae, tiny, hook, texts, interventions.remove([latent]))
    torch.testing.assert_close(outcome[0].kl, kl.double(), atol=2e-5, rtol=1e-3)


# --- what belongs together --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny_neox_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an SAE whose record says all there is to know."""
    model = load_model(str(tiny_neox_dir), device="cpu")
    known = {
        "hook_name": HOOK,
        "model_name": str(tiny_neox_dir),
        "model_sha256": model.weights_sha256(),
        "tokenizer_sha256": model.tokenizer_sha256(),
        "d_vocab": model.d_vocab,
        "processing": "raw",
        "prepend_bos": True,
        "dtype": "float32",
    }
    folder = tmp_path_factory.mktemp("inside") / "sae"
    save_folder(make_sae(32, **known), folder)
    return folder


def other(folder: Path, tmp_path: Path, *without: str, **changes: object) -> Path:
    """A copy of the folder whose record says something else."""
    copy = tmp_path / "other"
    shutil.copytree(folder, copy)
    cfg = json.loads((copy / "cfg.json").read_text())
    metadata = {key: value for key, value in cfg["metadata"].items() if key not in without}
    cfg["metadata"] = metadata | changes
    (copy / "cfg.json").write_text(json.dumps(cfg))
    return copy


def test_nothing_is_told_where_everything_is_recorded(folder: Path):
    inside = open_inside(folder, device="cpu")
    assert inside.notes == () and inside.hook_out == inside.hook_name == HOOK and inside.run is None


def test_another_tokenizer_or_vocabulary_is_refused(folder: Path, tiny_neox_dir: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # the same weights behind a tokenizer two of whose tokens have changed places
    swapped = tmp_path / "swapped"
    shutil.copytree(tiny_neox_dir, swapped)
    said = json.loads((swapped / "tokenizer.json").read_text())
    vocabulary = said["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(MechintError, match="tokenizer of .* is another one"):
        open_inside(folder, model=str(swapped), device="cpu")
    sae = SAE.load(folder)
    from mechint.saelens.hooked import HookedSAETransformer
    from mechint.saelens.store import ActivationsStore

    hooked = HookedSAETransformer.from_pretrained(str(swapped), device="cpu")
    for put in (lambda: hooked.add_sae(sae), lambda: ActivationsStore.from_sae(hooked, sae, ["a"], context_size=8)):
        with pytest.raises(MechintError, match="tokenizer of .* is another one"):
            put()
    # a vocabulary with one token more
    larger = tmp_path / "larger"
    model, tokenizer = (kind.from_pretrained(tiny_neox_dir) for kind in (AutoModelForCausalLM, AutoTokenizer))
    model.resize_token_embeddings(model.config.vocab_size + 1)
    model.save_pretrained(larger)
    tokenizer.save_pretrained(larger)
    with pytest.raises(MechintError, match=f"vocabulary of {len(tokenizer)} tokens, .* has {len(tokenizer) + 1}"):
        open_inside(folder, model=str(larger), device="cpu")
    # records made before the two were kept are compared by what they hold
    old = other(folder, tmp_path, "tokenizer_sha256", "d_vocab")
    assert any("not bit for bit" in note for note in open_inside(old, model=str(larger), device="cpu").notes)


def test_other_weights_are_a_note(folder: Path, tmp_path: Path):
    same_tokens = make_tiny_neox(tmp_path / "retrained", seed=1)
    (note,) = open_inside(folder, model=str(same_tokens), device="cpu").notes
    assert "not bit for bit" in note


def test_the_precision_is_that_of_the_collection(folder: Path, tiny_neox_dir: Path, tmp_path: Path):
    low = other(folder, tmp_path, dtype="bfloat16")
    assert open_inside(low, device="cpu").model.hf_model.dtype is torch.bfloat16
    assert open_inside(low, device="cpu", dtype="float32").model.hf_model.dtype is torch.float32
    inside = open_inside(low, device="cpu")
    texts = texts_from_tokens(inside.tokenize(["the cat sat on the mat"]), prepend_bos=True, keep_bos=True)
    rows, _ = rank_latents(inside.sae, inside.model, HOOK, texts, top=2, control=0, draws=2, exact_texts=1)
    assert rows[0]["exact_kl"] is not None and evaluate_texts(inside, texts, n_resamples=0)["fvu"] > 0


def test_what_nobody_says_is_an_error_or_told(folder: Path, tiny_neox_dir: Path, tmp_path: Path):
    bare = other(folder, tmp_path, "hook_name", "model_name", "processing", "dtype")
    # our own files say how activations were processed wherever that is known; so does one of another tool
    cfg = json.loads((bare / "cfg.json").read_text())
    sae = make_sae(32)
    assert "processing" not in cfg["metadata"] and sae.metadata == {}
    with pytest.raises(MechintError, match="which hook .* give --hook"):
        put_inside(sae, bare, model=str(tiny_neox_dir), device="cpu")
    with pytest.raises(MechintError, match="which model .* give --model"):
        put_inside(sae, bare, hook=HOOK, device="cpu")
    inside = put_inside(sae, bare, hook=HOOK, model=str(tiny_neox_dir), device="cpu")
    assert inside.model.processing == "raw" and inside.prepend_bos
    assert [("taken as raw" in note, "BOS prepended" in note) for note in inside.notes] == [
        (True, False),
        (False, True),
    ]
    said: dict[str, Any] = {"model": str(tiny_neox_dir), "prepend_bos": False, "device": "cpu"}
    told = put_inside(sae, bare, hook=HOOK, processing="centred", **said)
    assert told.model.processing == "centred" and not told.prepend_bos and told.notes == ()
    # of a hook that centring does not change there is nothing to assume
    assert put_inside(make_sae(64), bare, hook="blocks.2.mlp.hook_post", **said).notes == ()
    # SAELens's words count as a record
    theirs = make_sae(32, model_from_pretrained_kwargs={"center_writing_weights": True})
    assert put_inside(theirs, bare, hook=HOOK, model=str(tiny_neox_dir), device="cpu").model.processing == "centred"


def test_an_sae_of_one_head_is_told_apart(tiny_neox_dir: Path):
    one = make_sae(8, hook_head_index=2)
    with pytest.raises(MechintError, match=r"head 2 of blocks\.2\.attn\.hook_z alone"):
        put_inside(one, Path("x"), hook="blocks.2.attn.hook_z", model=str(tiny_neox_dir), device="cpu")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hook": "blocks.2.hook_resid_post"}, f"says {HOOK}; --hook says blocks.2.hook_resid_post"),
        ({"processing": "centred"}, "trained on raw .* processing centred"),
    ],
)
def test_what_contradicts_the_record_is_refused(folder: Path, given: dict[str, Any], message: str):
    with pytest.raises(MechintError, match=message):
        open_inside(folder, device="cpu", **given)


def test_only_files_of_the_original_get_its_settings(tiny_neox_dir: Path):
    legacy = make_sae(32, processing="centred", prepend_bos=True, legacy=True)
    inside = put_inside(legacy, Path("x"), model=str(tiny_neox_dir), device="cpu")
    assert inside.hook_name == HOOK and inside.keep_bos and "original pipeline" in inside.notes[0]
