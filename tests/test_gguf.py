"""A GGUF file is a model: what it holds is what transformers computes with the same weights."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from families import N_LAYERS, make_family

from mechint.errors import MechintError
from mechint.models import load_model
from mechint.models.resolve import resolve_model

gguf = pytest.importorskip("gguf")

HOOK = "blocks.1.hook_resid_post"
NO_PADDING = 2**32 - 1  # how old files say that there is none
# llama.cpp's names of the tensors of a Qwen2 layer.
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    **{f"self_attn.{x}_proj.{kind}": f"attn_{x}.{kind}" for x in "qkv" for kind in ("weight", "bias")},
    "self_attn.o_proj.weight": "attn_output.weight",
    **{f"mlp.{x}_proj.weight": f"ffn_{x}.weight" for x in ("gate", "up", "down")},
}


@pytest.fixture(scope="module")
def qwen_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("qwen2", tmp_path_factory.mktemp("qwen2"))


def write_gguf(folder: Path, path: Path, *, architecture: str = "qwen2", padding: int | None = None) -> Path:
    """The Qwen2 model in `folder` as a GGUF file with the numbers as they are."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("small")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(bpe["vocab"].items(), key=lambda pair: pair[1])]
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]])
    writer.add_eos_token_id(0)
    if padding is not None:
        writer.add_pad_token_id(padding)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    names |= {"lm_head.weight": "output.weight"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{theirs}": f"blk.{layer}.{name}" for theirs, name in LAYER.items()}
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names[name], tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("padding", [None, 1, NO_PADDING])
@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_gguf_file_is_the_model(qwen_dir: Path, tmp_path: Path, named: str, padding: int | None):
    path = write_gguf(qwen_dir, tmp_path / "small.gguf", padding=padding)
    model = load_model(str(path if named == "file" else tmp_path), device="cpu", hook_name=HOOK)
    assert model.source == str(path.resolve()) and len(model.weights_sha256()) == 64
    assert (model.n_layers, model.n_ctx, model.d_vocab) == (N_LAYERS, 64, 420)
    original = load_model(str(qwen_dir), device="cpu")
    tokens = torch.tensor(original.tokenize(["the cat sat on the mat"], prepend_bos=False))
    assert model.tokenize(["the cat sat on the mat"], prepend_bos=False) == tokens.tolist()
    torch.testing.assert_close(model.activations(tokens, HOOK), original.activations(tokens, HOOK))
    torch.testing.assert_close(model.logits(tokens), original.logits(tokens))
    model.choose_backend("blocks.1.mlp.hook_post")
    assert model.backend == "bridge"
    torch.testing.assert_close(
        model.activations(tokens, HOOK), original.activations(tokens, HOOK), atol=1e-5, rtol=1e-5
    )


def test_one_line_for_what_cannot_be_read(qwen_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    strange = write_gguf(qwen_dir, tmp_path / "strange.gguf", architecture="martian")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + strange.read_bytes()[4:200])
    for path, message in ((strange, "architecture martian"), (broken, "cannot be loaded from broken.gguf")):
        with pytest.raises(MechintError, match=message) as caught:
            load_model(str(path), device="cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(MechintError, match=r"2 \.gguf files: give one of them, .*broken\.gguf"):
        load_model(str(tmp_path), device="cpu")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(MechintError, match=r"no \.gguf one"):
        resolve_model(str(tmp_path / "weights.bin"))
    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else own(name, *more))
    with pytest.raises(MechintError, match=r"pip install 'mechint\[gguf\]'"):
        load_model(str(strange), device="cpu")


def test_collecting_from_a_gguf_file_records_what_was_read(qwen_dir: Path, tmp_path: Path):
    from mechint.config import CollectConfig
    from mechint.data import open_activations
    from mechint.data.collect import collect

    path = write_gguf(qwen_dir, tmp_path / "small.gguf", padding=NO_PADDING)
    texts = tmp_path / "texts.txt"
    texts.write_text("the cat sat\nthe dog ran away\n")
    settings = {"model": str(path), "hook": HOOK, "dataset": str(texts), "output": str(tmp_path / "acts")}
    collect(CollectConfig.from_dict({**settings, "device": "cpu"}), progress=False)
    info = open_activations(tmp_path / "acts").info
    assert info["model_source"] == str(path.resolve())
    assert info["model_sha256"] == load_model(str(path), device="cpu").weights_sha256()
