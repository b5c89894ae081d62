"""Models whose parts lie apart, and whose linear layers hold 8 bits: hooks hold the same, and what is slow is said."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from families import N_LAYERS, make_family

from mechint.errors import MechintError
from mechint.models import load_model
from mechint.models.splice import Splice, make_splice

pytest.importorskip("accelerate")

HOOKS = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.2.hook_attn_out")
# One layer lies on disk, and comes back for each pass.
OFFLOADED = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu",
    "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(8, 330, (2, 11), generator=torch.Generator().manual_seed(0))


def test_a_layer_that_is_offloaded_works_and_is_said_to_be_slow(llama_dir: Path, tokens, caplog):
    whole = load_model(str(llama_dir), device="cpu")
    with caplog.at_level(logging.WARNING):
        model = load_model(str(llama_dir), device="cpu", device_map=OFFLOADED)
    assert "1 of 7 parts (model.layers.1)" in caplog.text and "slow" in caplog.text
    assert any(parameter.is_meta for parameter in model.hf_model.parameters())
    clean = whole.logits(tokens).log_softmax(-1)
    torch.testing.assert_close(model.logits(tokens).log_softmax(-1), clean)
    for hook in HOOKS:
        value = model.activations(tokens, hook)
        assert type(value) is torch.Tensor and value.device.type == "cpu"
        torch.testing.assert_close(value, whole.activations(tokens, hook))
        edited, expected = (m.logits_with(tokens, hook, lambda value: 2 * value + 1) for m in (model, whole))
        torch.testing.assert_close(edited, expected)
        same = model.logits_with(tokens, hook, lambda value: value).log_softmax(-1)
        torch.testing.assert_close(same, clean, atol=1e-5, rtol=0)
    assert model.weights_sha256() == whole.weights_sha256()
    # running on from a hook passes the offloaded layer by, and leaves it as it was
    splice = make_splice(model, HOOKS[1], tokens[0].tolist())
    assert isinstance(splice, Splice), splice
    value, final = splice.clean(tokens)
    torch.testing.assert_close(splice.rerun(value), final)
    torch.testing.assert_close(model.logits(tokens).log_softmax(-1), clean)
    with pytest.raises(MechintError, match="spread over several devices"):
        load_model(str(llama_dir), device_map=OFFLOADED, hook_name="blocks.1.mlp.hook_post")


def test_auto_map(llama_dir: Path, tokens, caplog):
    model = load_model(str(llama_dir), device_map="auto")
    assert model.n_layers == N_LAYERS and not caplog.text
    whole = load_model(str(llama_dir))
    torch.testing.assert_close(model.activations(tokens, HOOKS[1]), whole.activations(tokens, HOOKS[1]))
    with pytest.raises(MechintError, match="give one of them"):
        load_model(str(llama_dir), device="cpu", device_map="auto")


@pytest.mark.parametrize(
    ("package", "settings", "flag"),
    [
        ("accelerate", {"device_map": "auto"}, "--device-map"),
        ("bitsandbytes", {"dtype": "int8"}, "--dtype int8"),
    ],
)
def test_what_is_not_installed_is_named(llama_dir, monkeypatch, package: str, settings: dict, flag: str):
    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else own(name, *more))
    with pytest.raises(MechintError, match=f"{flag} needs the package {package}: pip install {package}"):
        load_model(str(llama_dir), **settings)


def test_eight_bits(llama_dir: Path, tokens):
    pytest.importorskip("bitsandbytes")
    model = load_model(str(llama_dir), device="cpu", dtype="int8")
    whole = load_model(str(llama_dir), device="cpu")
    kinds = {type(module).__name__ for module in model.hf_model.modules()}
    assert "Linear8bitLt" in kinds
    for hook in HOOKS:
        value, expected = (m.activations(tokens, hook) for m in (model, whole))
        assert type(value) is torch.Tensor and value.dtype == torch.bfloat16
        assert (value.float() - expected).norm() < 0.05 * expected.norm(), hook
