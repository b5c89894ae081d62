"""Both backends give the same tensors, those of Hugging Face; names and hooks are checked before any work.

Run on both supported majors of TransformerLens.
"""

import time
from pathlib import Path

import pytest
import torch
from conftest import HOOK

from mechint.cli.flags import parse
from mechint.config import CollectConfig, canonical_hook, layer_of_hook
from mechint.errors import MechintError
from mechint.models import LanguageModel, load_model
from mechint.models.resolve import resolve_model

TEXTS = ["the cat sat on the mat", "the dog", "home again and again, far away from the mat"]
# Backends order the same float32 sums differently (eager and fused attention); values here are of order 10.
TOLERANCE = {"atol": 2e-5, "rtol": 0.0}


@pytest.fixture(scope="module")
def models(tiny_neox_dir: Path) -> dict[tuple[str, str], LanguageModel]:
    return {
        (backend, processing): load_model(str(tiny_neox_dir), backend=backend, processing=processing, device="cpu")
        for backend in ("transformers", "bridge")
        for processing in ("raw", "centred")
    }


@pytest.fixture(scope="module")
def tokens(models: dict[tuple[str, str], LanguageModel]) -> torch.Tensor:
    rows = models["transformers", "raw"].tokenize(TEXTS, prepend_bos=True)
    longest = max(map(len, rows))
    return torch.tensor([row + [7] * (longest - len(row)) for row in rows])


@pytest.fixture(scope="module")
def hidden_states(tiny_neox_dir: Path, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    from transformers import AutoModelForCausalLM

    hf_model = AutoModelForCausalLM.from_pretrained(tiny_neox_dir, attn_implementation="eager", dtype=torch.float32)
    with torch.inference_mode():
        return hf_model(tokens, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("backend", ["transformers", "bridge"])
@pytest.mark.parametrize(("hook", "index"), [(HOOK, 4), ("blocks.0.hook_resid_pre", 0), ("blocks.2.hook_resid_pre", 2)])
def test_activations_are_the_hidden_states(models, tokens, hidden_states, backend: str, hook: str, index: int):
    raw = models[backend, "raw"].activations(tokens, hook)
    torch.testing.assert_close(raw, hidden_states[index], **TOLERANCE)
    centred = models[backend, "centred"].activations(tokens, hook)
    expected = hidden_states[index] - hidden_states[index].mean(-1, keepdim=True)
    torch.testing.assert_close(centred, expected, **TOLERANCE)
    assert (raw - centred).abs().max() > 0.01, "the two processings must differ, or this shows nothing"


def test_padding_does_not_reach_real_tokens(models, tokens):
    model = models["transformers", "raw"]
    whole = model.activations(tokens, HOOK)
    row = model.tokenize(TEXTS[1:2], prepend_bos=True)[0]
    alone = model.activations(torch.tensor([row]), HOOK)[0]
    torch.testing.assert_close(whole[1, : len(row)], alone, **TOLERANCE)


@pytest.mark.parametrize("backend", ["transformers", "bridge"])
@pytest.mark.parametrize("processing", ["raw", "centred"])
@pytest.mark.parametrize("hook", [HOOK, "blocks.2.hook_resid_pre"])
def test_editing_a_hook(models, tokens, backend: str, processing: str, hook: str):
    model, reference = models[backend, processing], models["transformers", "raw"]
    clean = reference.logits(tokens).log_softmax(-1)
    same = model.logits_with(tokens, hook, lambda value: value).log_softmax(-1)
    torch.testing.assert_close(same, clean, **TOLERANCE)
    direction = torch.linspace(-1, 1, model.d_model)
    edited = model.logits_with(tokens, hook, lambda value: value + direction).log_softmax(-1)
    expected = reference.logits_with(tokens, hook, lambda value: value + direction).log_softmax(-1)
    torch.testing.assert_close(edited, expected, **TOLERANCE)
    assert (edited - clean).abs().max() > 0.01


def test_edit_sees_the_processed_value(models, tokens):
    seen = []
    model = models["transformers", "centred"]
    model.logits_with(tokens, HOOK, lambda value: seen.append(value) or value)
    torch.testing.assert_close(seen[0], model.activations(tokens, HOOK), **TOLERANCE)
    assert not model.blocks[3]._forward_hooks, "the hook is removed"


def test_tokens_begin_with_bos_zero_when_asked_for(models):
    model = models["transformers", "raw"]
    assert model.bos_token_id == 0  # an id that a truthiness test would take for "none"
    with_bos = model.tokenize(TEXTS, prepend_bos=True)
    without = model.tokenize(TEXTS, prepend_bos=False)
    assert [row[0] for row in with_bos] == [0, 0, 0]
    assert [row[1:] for row in with_bos] == without
    assert [len(row) for row in model.tokenize(TEXTS, prepend_bos=True, context_size=3)] == [3, 3, 3]
    assert max(len(row) for row in model.tokenize(["the cat " * 500], prepend_bos=True)) == model.n_ctx
    assert model.tokenize([], prepend_bos=True) == []


def test_weights_hash_is_of_the_loaded_weights(models, tiny_neox_dir: Path, tmp_path: Path):
    hashes = {model.weights_sha256() for model in models.values()}
    assert len(hashes) == 1, "the bridge's processing must not change what is recorded"
    from conftest import make_tiny_neox

    other = load_model(str(make_tiny_neox(tmp_path / "other", seed=1)))
    assert other.weights_sha256() not in hashes


@pytest.mark.parametrize("backend", ["transformers", "bridge"])
def test_unknown_hooks_name_the_nearest(models, backend: str):
    model = models[backend, "raw"]
    with pytest.raises(MechintError, match=r"nearest: .*blocks\.3\.hook_resid_post"):
        model.check_hook("blocks.3.hook_residpost")
    with pytest.raises(MechintError, match=r"6 layers, so the last block is blocks\.5"):
        model.check_hook("blocks.17.hook_resid_post")
    model.check_hook(HOOK)


def test_other_hooks_need_the_bridge(models, tokens):
    with pytest.raises(MechintError, match="--backend bridge"):
        models["transformers", "raw"].check_hook("blocks.3.mlp.hook_post")
    models["bridge", "raw"].check_hook("blocks.3.mlp.hook_post")
    value = models["bridge", "raw"].activations(tokens, "blocks.3.mlp.hook_post")
    assert value.shape == (*tokens.shape, 64)


def test_auto_backend_follows_the_hook(tiny_neox_dir: Path):
    assert load_model(str(tiny_neox_dir), hook_name=HOOK).backend == "transformers"
    assert load_model(str(tiny_neox_dir), hook_name="blocks.3.hook_mlp_out").backend == "transformers"
    assert load_model(str(tiny_neox_dir), hook_name="blocks.3.mlp.hook_post").backend == "bridge"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("model.layers.2", "blocks.2.hook_resid_post"),
        ("gpt_neox.layers.3", "blocks.3.hook_resid_post"),
        ("transformer.h.11", "blocks.11.hook_resid_post"),
        ("layers.0", "blocks.0.hook_resid_post"),
        ("model.language_model.layers.4.mlp", "blocks.4.mlp.hook_out"),
        ("gpt_neox.layers.3.attention", "blocks.3.attn.hook_out"),
        ("model.layers.2.self_attn", "blocks.2.attn.hook_out"),
        ("model.vision_tower.encoder.layers.2", "model.vision_tower.encoder.layers.2"),
        ("model.layers.2.input_layernorm", "model.layers.2.input_layernorm"),
        ("blocks.2.hook_resid_post", "blocks.2.hook_resid_post"),
        ("blocks.2.mlp.hook_post", "blocks.2.mlp.hook_post"),
    ],
)
def test_names_of_modules_are_understood(given: str, name: str):
    assert CollectConfig.from_dict({"hook": given}).hook == name
    assert parse(CollectConfig, ["--hook", given], prog="collect").hook == name
    assert layer_of_hook(given) == layer_of_hook(name)


def test_a_module_alias_holds_what_the_module_gives(models, tokens):
    model = models["transformers", "raw"]
    for module in ("gpt_neox.layers.2", "gpt_neox.layers.2.mlp", "gpt_neox.layers.2.attention"):
        found = []
        handle = model.hf_model.get_submodule(module).register_forward_hook(
            lambda _, args, out, found=found: found.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.inference_mode():
            model.hf_model(tokens)
        handle.remove()
        torch.testing.assert_close(model.activations(tokens, canonical_hook(module)), found[0], **TOLERANCE)
    with pytest.raises(MechintError, match=r"here it is blocks\.2\.hook_resid_post"):
        model.check_hook("gpt_neox.layers.2")


def test_aliases():
    assert resolve_model("pythia-70m") == "EleutherAI/pythia-70m"
    assert resolve_model("EleutherAI/pythia-70m-deduped") == "EleutherAI/pythia-70m-deduped"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pythia-70", "nearest: pythia-70m"),
        ("builtin/pythia-tinny", "nearest: builtin/pythia-tiny"),
        ("./no/such/folder", "expected a Hub id"),
        ("EleutherAI/pythia-70m", "--model builtin/pythia-tiny which needs no network"),
    ],
)
def test_unknown_models_are_known_at_once(name: str, message: str):
    started = time.perf_counter()
    with pytest.raises(MechintError, match=message) as caught:
        load_model(name)
    assert time.perf_counter() - started < 20, "nothing is waited for; the library's retries alone take longer"
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_model(tmp_path: Path):
    with pytest.raises(MechintError, match=r"without config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    with pytest.raises(MechintError, match="cannot be loaded"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dtype": "float64"}, "--dtype 'float64'"),
        ({"processing": "centered"}, "nearest: centred"),
        ({"backend": "tl"}, "--backend 'tl'"),
        ({"device": "cuda:99"}, "--device cpu"),
    ],
)
def test_unusable_settings(tiny_neox_dir: Path, setting: dict, message: str):
    with pytest.raises(MechintError, match=message):
        load_model(str(tiny_neox_dir), **setting)
