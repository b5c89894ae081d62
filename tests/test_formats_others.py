"""Formats of other tools: what is written is read back bit for bit, and a file means what its tool computes. Files that
are broken: test_formats_hostile.py. The tools themselves: test_peer_formats_others.py.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from other_formats import OTHERS, any_file, codes, example_of, linear_state, make, read, write
from safetensors.torch import save_file
from torch import Tensor

from mechint.errors import MechintError
from mechint.formats import FORMATS
from mechint.formats.folds import variants
from mechint.sae import SAE

# (format, architecture) -> settings in which it is held: b_dec subtracted?, normalisation, top-k with ReLU? A format
# that is not in it is held to its own answers.
HELD: dict[tuple[str, str], set[tuple[bool, str, bool]]] = {
    ("mistudio", "standard"): {
        (False, how, relu) for how in ("none", "constant_norm_rescale", "layer_norm") for relu in (True, False)
    },
    ("mistudio", "jumprelu"): {
        (False, how, relu) for how in ("none", "constant_norm_rescale", "layer_norm") for relu in (True, False)
    },
    ("saev", "standard"): {(False, "none", True), (False, "none", False)},
    ("saev", "topk"): {(False, "none", False)},
    ("dictionary_learning", "standard"): {(False, "none", True), (False, "none", False)},  # rows not of unit norm
    ("dictionary_learning", "topk"): {(True, "none", True)},
    ("dictionary_learning", "jumprelu"): {(False, "none", True), (False, "none", False)},
    ("dictionary_learning", "gated"): {(True, "none", True), (True, "none", False)},
    ("sparsify", "topk"): {(True, "none", True)},
    ("mech_platform", "topk"): {(False, "none", False)},
    ("gemma_scope", "standard"): {(False, "none", True), (False, "none", False)},
    ("gemma_scope", "jumprelu"): {(False, "none", True), (False, "none", False)},
    ("gemma_scope_2", "jumprelu"): {(False, "none", True), (False, "none", False)},
    ("openai", "standard"): {(True, "none", True), (True, "none", False)},
    ("openai", "topk"): {(True, "layer_norm", True), (True, "layer_norm", False)},
}
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")


# --- round trips ------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(OTHERS),
    st.sampled_from(ARCHITECTURES),
    st.booleans(),
    st.sampled_from(["none", "constant_norm_rescale", "layer_norm"]),
    st.booleans(),
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(0, 1000),
)
@settings(max_examples=300, deadline=None)
def test_what_is_held_comes_back_bit_for_bit_and_the_rest_is_refused(
    name: str, architecture: str, subtracts: bool, normalize: Any, relu: bool, d_in: int, d_sae: int, seed: int
):
    loaded = make(
        architecture, d_in, d_sae, seed, apply_b_dec_to_input=subtracts, normalize_activations=normalize, relu=relu
    )
    several = d_sae > 1  # one latent alone has one threshold for all
    held = HELD.get((name, architecture), set()) if any(name == other for other, _ in HELD) else None
    is_held = FORMATS[name].holds(loaded) is None if held is None else (subtracts, normalize, relu) in held
    with tempfile.TemporaryDirectory() as folder:
        if not is_held:
            if several:
                assert FORMATS[name].holds(loaded)
                with pytest.raises(MechintError, match="cannot hold"):
                    write(name, loaded, Path(folder))
                assert not list(Path(folder).iterdir())
            return
        assert FORMATS[name].holds(loaded) is None
        path = write(name, loaded, Path(folder))
        assert [form.name for form in FORMATS.values() if form.sniff(path)] == [name]
        back = read(name, path)
        if path.is_file():  # the folder that holds it will do as well
            assert FORMATS[name].sniff(path.parent)
            assert_same(read(name, path.parent), back)
    assert_same(back, loaded)


def assert_same(back: SAE, loaded: SAE) -> None:
    assert (back.architecture, back.options) == (loaded.architecture, loaded.options)
    assert (back.cfg.apply_b_dec_to_input, back.cfg.normalize_activations, back.cfg.input_scale) == (
        loaded.cfg.apply_b_dec_to_input,
        loaded.cfg.normalize_activations,
        loaded.cfg.input_scale,
    )
    if loaded.architecture == "topk":
        assert back.relu == loaded.relu
    assert back.weights().keys() == loaded.weights().keys()
    for name, tensor in loaded.weights().items():
        assert torch.equal(back.weights()[name], tensor), name


@given(st.sampled_from(OTHERS), st.sampled_from(OTHERS), st.sampled_from(ARCHITECTURES), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_from_format_to_format_the_function_stays(first: str, second: str, architecture: str, seed: int):
    """Whatever both can hold after exact folds computes the same after both."""
    loaded = make(architecture, 6, 10, seed)
    _, f, x_hat = codes(loaded)
    with tempfile.TemporaryDirectory() as folder:
        for name in (first, second):
            held = next((found for found, _ in variants(loaded) if FORMATS[name].holds(found) is None), None)
            if held is None:
                return
            (Path(folder) / name).mkdir(exist_ok=True)
            path = Path(folder) / name
            loaded = read(name, write(name, held, path) if first != second else write(name, held, _fresh(path)))
    _, f_after, x_hat_after = codes(loaded)
    torch.testing.assert_close(x_hat_after, x_hat, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(f_after, f, rtol=1e-5, atol=2e-5)


def _fresh(folder: Path) -> Path:
    path = folder / str(len(list(folder.iterdir())))
    path.mkdir()
    return path


@pytest.mark.parametrize("name", OTHERS)
def test_what_lies_there_is_not_overwritten(name: str, tmp_path: Path):
    held = example_of(name)
    path = write(name, held, tmp_path)
    with pytest.raises(MechintError, match="not overwritten"):
        write(name, held, tmp_path)
    assert_same(read(name, path), held)


def test_metadata_survives_where_the_tool_leaves_room(tmp_path: Path):
    for name, architecture, subtracts in (
        ("dictionary_learning", "jumprelu", False),
        ("sparsify", "topk", True),
        ("mistudio", "standard", False),
    ):
        (tmp_path / name).mkdir()
        loaded = make(architecture, apply_b_dec_to_input=subtracts)
        assert read(name, write(name, loaded, tmp_path / name)).metadata == loaded.metadata


def test_mistudio_keeps_a_threshold_of_zero(tmp_path: Path):
    loaded = make("jumprelu", apply_b_dec_to_input=False)
    loaded.weights()["threshold"][2] = 0.0
    assert read("mistudio", write("mistudio", loaded, tmp_path)).weights()["threshold"][2] == 0


def test_batchtopk_with_its_k_is_held_without_folding(tmp_path: Path):
    loaded = make("jumprelu")
    loaded = loaded.variant(metadata={"training_architecture": "batchtopk", "training_options": {"k": 3}})
    assert "BatchTopK" in str(FORMATS["dictionary_learning"].holds(loaded))  # thresholds differ
    loaded.weights()["threshold"].fill_(0.4)
    path = write("dictionary_learning", loaded, tmp_path)
    assert json.loads((path / "config.json").read_text())["trainer"]["dict_class"] == "BatchTopKSAE"
    assert_same(read("dictionary_learning", path), loaded)
    loaded = loaded.variant(apply_b_dec_to_input=False)
    path = write("saev", loaded, tmp_path)
    assert json.loads(path.read_bytes().split(b"\n")[0])["cfg"]["activation"]["params"]["top_k"] == 3
    assert_same(read("saev", path), loaded)


# --- what each tool computes, written out here ------------------------------------------------------------------------


def agrees(loaded: SAE, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]) -> None:
    x, f, x_hat = codes(loaded)
    torch.testing.assert_close(f, encode(x).double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x_hat, decode(f).double(), rtol=1e-6, atol=1e-6)
    assert 0 < (f != 0).double().mean() < 1


def test_mistudio_standard_adds_both_biases_and_subtracts_none(tmp_path: Path):
    s = linear_state()
    s |= {"decoder.bias": torch.randn(5), "decoder_bias": torch.randn(5), "unused": torch.zeros(1)}
    optimizer = {"optimizer.state.0.exp_avg": torch.zeros(3)}
    del s["unused"]
    file = tmp_path / "checkpoint.safetensors"
    save_file({f"model.{name}": tensor for name, tensor in s.items()} | optimizer, file)
    d = {name: tensor.double() for name, tensor in s.items()}
    for path in (file, tmp_path):
        agrees(
            read("mistudio", path),
            lambda x: (x @ d["encoder.weight"].T + d["encoder.bias"]).relu(),
            lambda f: f @ d["decoder.weight"].T + d["decoder.bias"] + d["decoder_bias"],
        )


def test_mistudio_tied_topk_and_normalised(tmp_path: Path):
    s = linear_state()
    del s["decoder.weight"]
    s["decoder_bias"] = torch.randn(5)
    folder = tmp_path / "layer_4_mlp"
    folder.mkdir()
    file = folder / "checkpoint.safetensors"
    save_file({f"model.{name}": tensor for name, tensor in s.items()}, file, metadata={"step": "100"})
    (folder / "metadata.json").write_text(json.dumps({"top_k_sparsity": 30}))  # 2.1 of 7: 2
    loaded = read("mistudio", tmp_path)
    assert loaded.metadata["hook_name"] == "blocks.4.hook_mlp_out"
    assert loaded.saved_options() == {"k": 2}
    assert loaded.cfg.normalize_activations == "constant_norm_rescale" and "constant_norm_rescale" in loaded.notes[0]
    d = {name: tensor.double() for name, tensor in s.items()}
    norms: list[Tensor] = []

    def encode(x: Tensor) -> Tensor:
        norms.append(x.norm(dim=1, keepdim=True) / 5**0.5)
        f = (x / norms[0] @ d["encoder.weight"].T + d["encoder.bias"]).relu()
        top = f.topk(2, dim=1)
        return torch.zeros_like(f).scatter(1, top.indices, top.values)

    agrees(loaded, encode, lambda f: (f @ d["encoder.weight"] + d["decoder_bias"]) * norms[0])
    (folder / "metadata.json").write_text(json.dumps({"normalize_activations": "none"}))
    assert read("mistudio", tmp_path).cfg.normalize_activations == "none"


def test_mistudio_jumprelu(tmp_path: Path):
    torch.manual_seed(0)
    s = {"W_enc": torch.randn(7, 5), "b_enc": torch.randn(7), "W_dec": torch.randn(5, 7), "b_dec": torch.randn(5)}
    s["activation.log_threshold"] = torch.randn(7) - 1
    save_file({f"model.{name}": tensor for name, tensor in s.items()}, tmp_path / "checkpoint.safetensors")
    d = {name: tensor.double() for name, tensor in s.items()}

    def encode(x: Tensor) -> Tensor:
        pre = x @ d["W_enc"].T + d["b_enc"]
        return pre * (pre > d["activation.log_threshold"].exp())

    agrees(read("mistudio", tmp_path), encode, lambda f: f @ d["W_dec"].T + d["b_dec"])


def test_mistudio_folders_with_several_hooks_ask_for_one(tmp_path: Path):
    loaded = make("standard", apply_b_dec_to_input=False)
    for hook in ("layer_3", "layer_10_attention"):
        assert FORMATS["mistudio"].write
        FORMATS["mistudio"].write(loaded, tmp_path / hook)
    assert FORMATS["mistudio"].sniff(tmp_path)
    with pytest.raises(MechintError, match="layer_10_attention, layer_3"):
        read("mistudio", tmp_path)


def saev_file(path: Path, header: dict[str, Any], state: dict[str, Tensor]) -> Path:
    with open(path, "wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save(state, file)
    return path


def saev_state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"W_dec": torch.randn(8, 4), "b_dec": torch.randn(4), "W_enc": torch.randn(4, 8), "b_enc": torch.randn(8)}


RELU = {"cls": "Relu", "params": {"key": "relu", "sparsity": {"cls": "L1Sparsity", "params": {"coeff": 4e-4}}}}
TOPK = {"cls": "TopK", "params": {"kind": "top-k", "top_k": 3}}
BATCH = {"cls": "BatchTopK", "params": {"key": "batch-top-k", "top_k": 3, "sparsity": {}, "momentum": 0.1}}
OLD = {"exp_factor": 2, "n_reinit_samples": 9, "remove_parallel_grads": True, "normalize_w_dec": True, "seed": 0}
# header, whether b_dec is subtracted, what it is here
SCHEMAS: dict[str, tuple[dict[str, Any], bool, str]] = {
    "bare": ({"d_vit": 4, **OLD, "ghost_grads": False, "l1_coeff": 1e-3}, True, "standard"),
    "1A relu": ({"schema": 1, "cls": "Relu", "cfg": {"d_model": 4, **OLD}}, True, "standard"),
    "1A topk": ({"schema": 1, "cls": "TopK", "cfg": {"d_vit": 4, **OLD, "top_k": 3}}, True, "topk"),
    "1A batch": ({"schema": 1, "cls": "BatchTopK", "cfg": {"d_vit": 4, **OLD, "top_k": 3}}, True, "jumprelu"),
    "1B": (
        {"schema": 1, "cls": "SparseAutoencoderConfig", "cfg": {"d_vit": 4, **OLD, "activation": TOPK}},
        True,
        "topk",
    ),
    "2": (
        {"schema": 2, "cfg": {"d_vit": 4, **OLD, "activation": RELU}, "commit": "x", "lib": "0.1.0"},
        False,
        "standard",
    ),
    "3": ({"schema": 3, "cfg": {"d_model": 4, **OLD, "activation": BATCH}}, False, "jumprelu"),
    "4": ({"schema": 4, "cfg": {"d_model": 4, "d_sae": 8, "seed": 1, "activation": TOPK}}, False, "topk"),
    "5": ({"schema": 5, "cfg": {"d_model": 4, "d_sae": 8, "activation": RELU, "reinit_blend": 0.8}}, False, "standard"),
}


@pytest.mark.parametrize("which", SCHEMAS)
def test_saev_schemas(which: str, tmp_path: Path):
    header, subtracts, architecture = SCHEMAS[which]
    state = saev_state()
    if architecture == "jumprelu":
        state["activation.threshold"] = torch.tensor(0.7)
    path = saev_file(tmp_path / "sae.pt", header, state)
    assert [form.name for form in FORMATS.values() if form.sniff(path)] == ["saev"]
    loaded = read("saev", path)
    assert loaded.architecture == architecture
    assert bool(loaded.notes) == (which == "2")
    d = {name: tensor.double() for name, tensor in state.items()}

    def encode(x: Tensor) -> Tensor:
        h = (x - d["b_dec"] * subtracts) @ d["W_enc"] + d["b_enc"]
        if architecture == "standard":
            return h.relu()
        if architecture == "jumprelu":
            return torch.where(h > 0.7, h, 0.0)
        top = h.topk(3, dim=1)
        return torch.zeros_like(h).scatter(1, top.indices, top.values)

    agrees(loaded, encode, lambda f: f @ d["W_dec"] + d["b_dec"])


def test_saev_topk_keeps_negative_entries(tmp_path: Path):
    loaded = read("saev", saev_file(tmp_path / "sae.pt", {**SCHEMAS["4"][0]}, saev_state()))
    assert (codes(loaded)[1] < 0).any()
    for name in ("saelens", "sparsify", "dictionary_learning"):
        assert "keeps negative entries" in str(FORMATS[name].holds(loaded))


@pytest.mark.parametrize("learned", [-1.0, 0.0])
def test_saev_batchtopk_without_a_learned_threshold_is_relu(learned: float, tmp_path: Path):
    state = {**saev_state(), "activation.threshold": torch.tensor(learned)}
    loaded = read("saev", saev_file(tmp_path / "sae.pt", SCHEMAS["3"][0], state))
    assert not loaded.weights()["threshold"].any()
    d = {name: tensor.double() for name, tensor in state.items()}
    agrees(loaded, lambda x: (x @ d["W_enc"] + d["b_enc"]).relu(), lambda f: f @ d["W_dec"] + d["b_dec"])


@pytest.mark.parametrize(
    "header, says",
    [
        ({**SCHEMAS["5"][0], "schema": 6}, "unknown schema 6"),
        ({**SCHEMAS["5"][0], "schema": True}, "unknown schema True"),
        ({"schema": 5, "cfg": [1]}, "JSON object"),
        (
            {"schema": 4, "cfg": {"d_model": 4, "d_sae": 8, "activation": {"cls": "AbsBatchTopK", "params": {}}}},
            "AbsBatch",
        ),
        ({"schema": 5, "cfg": {"d_model": 4, "d_sae": 9, "activation": RELU}}, r"\[9, 4\]"),
        ({"schema": 5, "cfg": {"d_model": 4, "d_sae": 8, "activation": BATCH}}, "without its threshold"),
        ({"schema": 5, "cfg": {"activation": {"cls": "Relu", "params": {"key": "top-k"}}}}, "Relu and TopK"),
        ({"schema": 5, "cfg": {"activation": {"cls": "TopK", "params": {"top_k": 99}}}}, "1 to d_sae = 8"),
        ({"schema": 5, "cfg": {"activation": {"cls": "TopK", "params": {"top_k": "3"}}}}, "whole number"),
    ],
)
def test_saev_headers_that_mean_nothing(header: dict[str, Any], says: str, tmp_path: Path):
    path = saev_file(tmp_path / "sae.pt", header, saev_state())
    with pytest.raises(MechintError, match=says):
        read("saev", path)


def test_mech_platform(tmp_path: Path):
    s = linear_state() | {"decoder.bias": torch.randn(5)}
    save_file(s, tmp_path / "sae_weights.safetensors")
    with pytest.raises(MechintError, match="top-k without k"):
        read("mech_platform", tmp_path)
    sidecar = {"dtype": "torch.float32", "input_dim": 5, "k": 4, "n_features": 7, "training": None}
    (tmp_path / "sae_weights.safetensors.json").write_text(json.dumps(sidecar))
    (tmp_path / "spec.json").write_text(json.dumps({"parameters": {"model": "gpt2", "hook_site": "blocks.1.x"}}))
    d = {name: tensor.double() for name, tensor in s.items()}

    def encode(x: Tensor) -> Tensor:
        h = x @ d["encoder.weight"].T + d["encoder.bias"]
        top = h.topk(4, dim=1)
        return torch.zeros_like(h).scatter(1, top.indices, top.values)

    loaded = read("mech_platform", tmp_path)
    agrees(loaded, encode, lambda f: f @ d["decoder.weight"].T + d["decoder.bias"])
    assert (codes(loaded)[1] < 0).any()
    assert loaded.metadata == {"model_name": "gpt2", "hook_name": "blocks.1.x"}
    (tmp_path / "sae_weights.safetensors.json").write_text(json.dumps({**sidecar, "n_features": 8}))
    with pytest.raises(MechintError, match="n_features 8"):
        read("mech_platform", tmp_path)


def test_gemma_scope(tmp_path: Path):
    torch.manual_seed(2)
    a = {"W_enc": torch.randn(5, 7), "b_enc": torch.randn(7), "W_dec": torch.randn(7, 5), "b_dec": torch.randn(5)}
    a["threshold"] = torch.rand(7)
    a["threshold"][0] = -0.5  # ReLU(pre) * (pre > threshold): as 0
    folder = tmp_path / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in a.items()}
    np.savez(folder / "params.npz", **arrays)
    d = {name: tensor.double() for name, tensor in a.items()}

    def encode(x: Tensor) -> Tensor:
        pre = x @ d["W_enc"] + d["b_enc"]
        return pre.relu() * (pre > d["threshold"])

    for path in (folder, folder / "params.npz"):
        assert [form.name for form in FORMATS.values() if form.sniff(path)] == ["gemma_scope"]
        agrees(read("gemma_scope", path), encode, lambda f: f @ d["W_dec"] + d["b_dec"])
    np.savez(
        folder / "old.npz",
        w_enc=a["W_enc"].numpy().astype(">f8"),
        w_dec=np.asfortranarray(a["W_dec"]),
        b_enc=a["b_enc"],
    )
    loaded = read("gemma_scope", folder / "old.npz")
    assert loaded.architecture == "standard" and "b_dec" in loaded.notes[0]
    agrees(loaded, lambda x: (x @ d["W_enc"] + d["b_enc"]).relu(), lambda f: f @ d["W_dec"])


@pytest.mark.parametrize("activation", ["ReLU", "TopK", "none named"])
@pytest.mark.parametrize("tied", [False, True])
def test_openai(activation: str, tied: bool, tmp_path: Path):
    s = linear_state()
    state: dict[str, Any] = {
        "pre_bias": torch.randn(5),
        "latent_bias": s["encoder.bias"],
        "stats_last_nonzero": torch.zeros(7, dtype=torch.long),
        "encoder.weight": s["encoder.weight"],
        **({"decoder.linear.weight": s["encoder.weight"]} if tied else {"decoder.weight": s["decoder.weight"]}),
    }
    if activation != "none named":
        state["activation"] = activation
    if activation == "TopK":
        state["activation_state_dict"] = {"k": 3, "postact_fn": "ReLU"}
    torch.save(state, tmp_path / "4.pt")
    assert [form.name for form in FORMATS.values() if form.sniff(tmp_path / "4.pt")] == ["openai"]
    pre_bias, W_enc = state["pre_bias"].double(), s["encoder.weight"].double().T
    W_dec = W_enc.T if tied else s["decoder.weight"].double().T
    undo: list[tuple[Tensor, Tensor]] = []

    def encode(x: Tensor) -> Tensor:
        mean, std = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
        if activation != "TopK":
            mean, std = torch.zeros_like(mean), torch.ones_like(std)
        undo.append((mean, std))
        x = (x - mean) / (std + 1e-5) if activation == "TopK" else x
        h = (x - pre_bias) @ W_enc + s["encoder.bias"].double()
        if activation != "TopK":
            return h.relu()
        top = h.topk(3, dim=1)
        return torch.zeros_like(h).scatter(1, top.indices, top.values.relu())

    agrees(read("openai", tmp_path / "4.pt"), encode, lambda f: (f @ W_dec + pre_bias) * undo[0][1] + undo[0][0])


def dictionary(folder: Path, kind: str | None, state: dict[str, Tensor], **trainer: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "ae.pt")
    if kind is not None:
        (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind, **trainer}, "buffer": {}}))
    return folder


def test_dictionary_learning_batchtopk_and_topk_differ_by_config_alone(tmp_path: Path):
    s = linear_state() | {
        "b_dec": torch.randn(5),
        "k": torch.tensor(3, dtype=torch.int),
        "threshold": torch.tensor(0.6),
    }
    with pytest.raises(MechintError, match="AutoEncoderTopK or BatchTopKSAE"):
        read("dictionary_learning", dictionary(tmp_path / "bare", None, s))
    d = {name: tensor.double() for name, tensor in s.items()}

    def pre(x: Tensor) -> Tensor:
        return ((x - d["b_dec"]) @ d["encoder.weight"].T + d["encoder.bias"]).relu()

    def top(x: Tensor) -> Tensor:
        kept = pre(x).topk(3, dim=1)
        return torch.zeros(len(x), 7, dtype=x.dtype).scatter(1, kept.indices, kept.values)

    def decode(f: Tensor) -> Tensor:
        return f @ d["decoder.weight"].T + d["b_dec"]

    batch = read("dictionary_learning", dictionary(tmp_path / "batch", "BatchTopKSAE", s, k=3))
    agrees(batch, lambda x: pre(x) * (pre(x) > 0.6), decode)
    assert batch.metadata["training_options"] == {"k": 3}
    agrees(read("dictionary_learning", dictionary(tmp_path / "top", "AutoEncoderTopK", s, k=3)), top, decode)
    with pytest.raises(MechintError, match="k is 3 and 4"):
        read("dictionary_learning", dictionary(tmp_path / "other", "AutoEncoderTopK", s, k=4))
    s["threshold"] = torch.tensor(-1.0)  # none learned yet
    agrees(read("dictionary_learning", dictionary(tmp_path / "early", "BatchTopKSAE", s, k=3)), pre, decode)


def test_dictionary_learning_names_its_hook(tmp_path: Path):
    s = linear_state() | {"bias": torch.zeros(5)}
    trainer = {"lm_name": "EleutherAI/pythia-70m-deduped", "layer": 3, "submodule_name": "resid_post_layer_3"}
    loaded = read("dictionary_learning", dictionary(tmp_path / "a", "AutoEncoder", s, **trainer))
    assert loaded.metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert loaded.metadata["model_name"] == "EleutherAI/pythia-70m-deduped"
    assert "unit norm" in loaded.notes[0]


def test_dictionary_learning_checkpoints_have_their_config_one_folder_up(tmp_path: Path):
    s = linear_state() | {
        "b_dec": torch.randn(5),
        "k": torch.tensor(3, dtype=torch.int),
        "threshold": torch.tensor(0.6),
    }
    folder = dictionary(tmp_path / "trainer_0", "BatchTopKSAE", s, k=3)
    (folder / "checkpoints").mkdir()
    early = folder / "checkpoints" / "ae_1000.pt"
    torch.save(s | {"threshold": torch.tensor(0.25)}, early)
    assert [form.name for form in FORMATS.values() if form.sniff(early)] == ["dictionary_learning"]
    assert float(read("dictionary_learning", early).weights()["threshold"][0]) == 0.25


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_may_not_be_read_is_an_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = any_file(name, tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    for module in (f"mechint.formats.{name}", "mechint.formats.files"):
        monkeypatch.setattr(f"{module}.open", refuse, raising=False)
        monkeypatch.setattr(f"{module}.safe_open", refuse, raising=False)
    with pytest.raises(MechintError, match="denied"):
        read(name, path)
    FORMATS[name].sniff(path)


def test_a_file_saved_on_cuda_opens_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    s = linear_state() | {"bias": torch.randn(5)}
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    folder = dictionary(tmp_path / "a", "AutoEncoder", s)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(folder / "ae.pt", weights_only=True)  # it does say cuda
    assert FORMATS["dictionary_learning"].sniff(folder)
    assert torch.equal(read("dictionary_learning", folder).weights()["W_enc"], s["encoder.weight"].T)


def test_sparsify_folders_name_their_hook(tmp_path: Path):
    loaded = make("topk")
    hooks = {"layers.3": "blocks.3.hook_resid_post", "layers.11.mlp": "blocks.11.hook_mlp_out", "embed_in": None}
    hooks |= {"gpt_neox.layers.0.attention": "blocks.0.hook_attn_out", "h.7": "blocks.7.hook_resid_post"}
    (tmp_path / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m"}))
    for name, hook in hooks.items():
        assert FORMATS["sparsify"].write
        FORMATS["sparsify"].write(loaded, tmp_path / name)
        cfg = json.loads((tmp_path / name / "cfg.json").read_text())
        del cfg["mechint"]
        (tmp_path / name / "cfg.json").write_text(json.dumps(cfg))
        metadata = read("sparsify", tmp_path / name).metadata
        assert metadata.get("hook_name") == hook
        assert metadata["model_name"] == "EleutherAI/pythia-70m"
    with pytest.raises(MechintError, match="embed_in"):
        read("sparsify", tmp_path)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"activation": "groupmax"}, "groupmax"),
        ({"signed": True}, "signed"),
        ({"skip_connection": True}, "skip"),
        ({"k": None}, "whole number"),
        ({"k": 0}, "whole number"),
        ({"k": True}, "whole number"),
        ({"k": 8}, "1 to d_sae = 7"),
        ({"d_in": 6}, "d_in 6"),
        ({"num_latents": 0, "expansion_factor": 2}, "10 latents"),
        ({"num_latents": 0, "expansion_factor": {}}, "whole number"),
    ],
)
def test_sparsify_settings_that_do_not_fit(change: dict[str, Any], says: str, tmp_path: Path):
    path = write("sparsify", make("topk"), tmp_path)
    cfg = json.loads((path / "cfg.json").read_text())
    (path / "cfg.json").write_text(json.dumps({**cfg, **change}))
    with pytest.raises(MechintError, match=says):
        read("sparsify", path)
