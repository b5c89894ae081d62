"""What the formats' files may look like beyond the plain case: thresholds that a logarithm cannot say, the community's
cfg.json, Gemma Scope 2, what lies beside the weights, and what is said about files that open elsewhere.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from other_formats import OTHERS, any_file, codes, make, read, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechint.errors import MechintError
from mechint.formats import FORMATS
from mechint.formats.convert import convert, convert_each, identify, load, write_proved
from mechint.formats.mistudio import nearest_logs, of_logs
from mechint.sae import SAE, load_sae

# --- miStudio's thresholds --------------------------------------------------------------------------------------------


def test_the_nearest_logarithm_is_found():
    """Against a search over all float32 logarithms around it."""
    t = torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 6
    logs = nearest_logs(t)
    best = (of_logs(logs) - t).abs()
    other = t.double().log().float()
    for _ in range(4):
        other = torch.nextafter(other, torch.full_like(other, -torch.inf))
    for _ in range(9):
        assert bool((best <= (of_logs(other) - t).abs()).all())
        other = torch.nextafter(other, torch.full_like(other, torch.inf))
    # each has one between 1/e and e, as the module says; not elsewhere
    inside = (t > 1 / torch.e) & (t < torch.e)
    assert torch.equal(of_logs(logs)[inside], t[inside]) and inside.sum() > 500
    assert 100 < int((of_logs(logs) != t).sum()) < int((~inside).sum())
    edges = torch.tensor([0.0, 1.0])
    assert torch.equal(of_logs(nearest_logs(edges)), edges)


@settings(max_examples=60, deadline=None)
@given(
    thresholds=st.lists(st.floats(0, 2.0**127, width=32, allow_subnormal=True), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_every_threshold_survives_mistudio(
    thresholds: list[float], seed: int, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("mistudio")
    loaded = make("jumprelu", d_sae=len(thresholds), seed=seed, apply_b_dec_to_input=False)
    loaded.weights()["threshold"].copy_(torch.tensor(thresholds))
    back = read("mistudio", write("mistudio", loaded, folder))
    assert torch.equal(back.weights()["threshold"], loaded.weights()["threshold"])
    exact = of_logs(nearest_logs(loaded.weights()["threshold"])).equal(loaded.weights()["threshold"])
    assert (folder / "out" / "thresholds.safetensors").is_file() == (not exact) == bool(back.notes)


def test_ten_thousand_random_thresholds_survive_mistudio(tmp_path: Path):
    loaded = make("jumprelu", d_in=2, d_sae=10_000, apply_b_dec_to_input=False)
    generator = torch.Generator().manual_seed(5)
    loaded.weights()["threshold"].copy_(torch.rand(10_000, generator=generator) * torch.logspace(-6, 3, 10_000))
    path = write("mistudio", loaded, tmp_path)
    assert torch.equal(read("mistudio", path).weights()["threshold"], loaded.weights()["threshold"])
    # what miStudio itself reads is as near as float32 logarithms come, and the certificate says how near
    logs = load_file(path / "checkpoint.safetensors")["model.activation.log_threshold"]
    assert logs.dtype == torch.float32
    torch.testing.assert_close(of_logs(logs), loaded.weights()["threshold"], rtol=2e-6, atol=0)
    place = write_proved(loaded, tmp_path / "proved", FORMATS["mistudio"])[1]
    (note,) = json.loads(place.read_text())["notes"]
    assert re.search(r"\d+ of 10000 thresholds differ from these by up to \d?e-0[67] of their value", note), note


def test_exact_thresholds_of_another_checkpoint_are_left_aside(tmp_path: Path):
    """A checkpoint that was trained on: its logarithms count, not what lies beside them."""
    loaded = make("jumprelu", apply_b_dec_to_input=False)
    loaded.weights()["threshold"].copy_(torch.linspace(0.001, 0.2, 7))
    path = write("mistudio", loaded, tmp_path)
    place, checkpoint = path / "thresholds.safetensors", path / "checkpoint.safetensors"
    state = load_file(checkpoint)
    for change in ("nudged", "shape", "dtype", "nothing", "broken"):
        logs = state["model.activation.log_threshold"].clone()
        if change == "nudged":
            logs[3] += 1e-5
        save_file({**state, "model.activation.log_threshold": logs}, checkpoint)
        exact = loaded.weights()["threshold"]
        if change == "broken":
            place.write_bytes(b"??")
            with pytest.raises(MechintError, match="thresholds.safetensors"):
                read("mistudio", path)
            continue
        given = {"shape": exact[:3], "dtype": exact.double(), "nothing": None}.get(change, exact)
        save_file({"other": exact} if given is None else {"threshold": given}, place)
        back = read("mistudio", path)
        assert torch.equal(back.weights()["threshold"], of_logs(logs)) and "left aside" in back.notes[0]


# --- the community's layout -------------------------------------------------------------------------------------------


def community_cfg(**changes: Any) -> dict[str, Any]:
    """cfg.json as miStudio writes it for a training."""
    cfg = {
        "model_name": "gpt2-small",
        "hook_point": "blocks.8.hook_resid_post",
        "hook_name": "blocks.8.hook_resid_post",
        "hook_point_layer": 8,
        "hook_point_head_index": None,
        "d_in": 5,
        "d_sae": 7,
        "architecture": "standard",
        "activation_fn_str": "relu",
        "normalize_activations": "none",
        "context_size": 128,
        "dataset_path": "openwebtext",
        "prepend_bos": True,
        "l1_coefficient": 0.001,
        "lr": 0.0003,
        "total_training_tokens": 1000,
        "train_batch_size": 64,
        "apply_b_dec_to_input": False,
        "finetuning_scaling_factor": False,
        "dtype": "torch.float32",
        "device": "cpu",
        "mistudio_training_id": "train_1",
        "mistudio_checkpoint_step": 1000,
        "extra_metadata": {"hf_model_name": "gpt2", "top_k_sparsity": None, "warmup_steps": 0, "weight_decay": 0.0},
        "expansion_factor": 1.4,
    }
    return {**cfg, **changes}


def community(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(community_cfg(**changes)))
    save_file({"sparsity": torch.linspace(-5, -1, 7)}, folder / "sparsity.safetensors")
    return folder


def test_what_mistudio_exports_for_the_community(tmp_path: Path):
    t = make("standard").weights()
    d = {name: tensor.double() for name, tensor in t.items()}

    def pre(x: Tensor) -> Tensor:
        return x @ d["W_enc"] + d["b_enc"]

    loaded = load(community(tmp_path / "relu", t))[1]
    x, f, x_hat = codes(loaded)
    torch.testing.assert_close(f, pre(x).relu())
    torch.testing.assert_close(x_hat, f @ d["W_dec"] + d["b_dec"])
    assert loaded.metadata["hook_name"] == "blocks.8.hook_resid_post" and loaded.metadata["model_name"] == "gpt2-small"
    assert loaded.metadata["prepend_bos"] is True and not loaded.cfg.apply_b_dec_to_input
    # its default for training
    loaded = load(community(tmp_path / "rescaled", t, normalize_activations="constant_norm_rescale"))[1]
    x, f, _ = codes(loaded)
    torch.testing.assert_close(f, pre(x * 5**0.5 / x.norm(dim=1, keepdim=True)).relu())
    # top-k, whose k is a percentage in a place of its own
    extra = {"hf_model_name": "gpt2", "top_k_sparsity": 45.0}
    loaded = load(community(tmp_path / "topk", t, activation_fn_str="topk", extra_metadata=extra))[1]
    assert loaded.saved_options() == {"k": 3} and loaded.relu  # 3.15 of 7
    x, f, _ = codes(loaded)
    top = pre(x).relu().topk(3, dim=1)
    torch.testing.assert_close(f, torch.zeros_like(f).scatter(1, top.indices, top.values))
    for bad in (None, 0, 101, "many", True):
        extra = {"top_k_sparsity": bad}
        folder = community(tmp_path / f"bad {bad}", t, activation_fn_str="topk", extra_metadata=extra)
        with pytest.raises(MechintError, match="without k|percentage"):
            load(folder)
    thresholds = {**t, "threshold": torch.linspace(0.1, 0.7, 7)}
    loaded = load(community(tmp_path / "jump", thresholds, architecture="jumprelu"))[1]
    x, f, _ = codes(loaded)
    torch.testing.assert_close(f, pre(x).relu() * (pre(x) > thresholds["threshold"]))


@pytest.mark.parametrize("name", ["sae_weights.safetensors", "sae.safetensors"])
def test_bare_weights_ask_for_what_they_do_not_say(name: str, tmp_path: Path):
    """What miStudio calls huggingface_saelens: whether b_dec is subtracted is not in the file, and is not guessed."""
    save_file(make("standard").weights(), tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(MechintError, match="b_dec is subtracted") as error:
            load(path)
        assert "cfg.json" in str(error.value) and "sae_weights.safetensors" in str(error.value)
    # and with what the message asks for it opens
    (tmp_path / name).rename(tmp_path / "sae_weights.safetensors")
    cfg = {"architecture": "standard", "d_in": 5, "d_sae": 7, "apply_b_dec_to_input": False}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    assert not load(tmp_path)[1].cfg.apply_b_dec_to_input


def test_mistudio_folders_of_several_hooks_convert_one_by_one_both_ways(tmp_path: Path):
    hooks = {"layer_3": "blocks.3.hook_resid_post", "layer_3_mlp": "blocks.3.hook_mlp_out"}
    hooks |= {"layer_10_attention": "blocks.10.hook_attn_out"}
    for seed, folder in enumerate(hooks):
        loaded = make("jumprelu" if seed else "standard", seed=seed, apply_b_dec_to_input=False)
        assert FORMATS["mistudio"].write
        FORMATS["mistudio"].write(loaded.variant(metadata={}), tmp_path / "studio" / folder)
        metadata = tmp_path / "studio" / folder / "metadata.json"
        said = json.loads(metadata.read_text())
        del said["mechint"]  # as its own are
        metadata.write_text(json.dumps(said))
    done = convert_each(tmp_path / "studio", tmp_path / "lens", to="saelens")
    assert {place.name for place in done} == set(hooks)
    for folder, hook in hooks.items():
        assert load(tmp_path / "lens" / folder)[1].metadata["hook_name"] == hook
    back = convert_each(tmp_path / "lens", tmp_path / "again", to="mistudio")
    assert len(back) == 3 and all(certificate.weights_equal for certificate, _ in back.values())
    for folder in hooks:
        first, last = (load_file(tmp_path / place / folder / "checkpoint.safetensors") for place in ("studio", "again"))
        assert first.keys() == last.keys() and all(torch.equal(first[key], last[key]) for key in first)


# --- what lies beside the weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["saelens", "saelens_pre6"])
def test_sparsity_is_carried_along_or_said_to_be_left_out(name: str, tmp_path: Path):
    folder = community(tmp_path / "in", make("standard").weights())
    expected = torch.linspace(-5, -1, 7)
    _, certificate = convert(folder, tmp_path / "out", to=name)
    assert torch.equal(load_file(tmp_path / "out" / "sparsity.safetensors")["sparsity"], expected)
    assert json.loads(certificate.read_text())["notes"] == [
        "cfg.json does not say how the model's weights were processed: raw, as SAELens loads models"
    ]
    _, certificate = convert(tmp_path / "out", tmp_path / "out.pt", to="mechint")
    assert "no place for it: sparsity" in json.loads(certificate.read_text())["notes"][-1]
    assert not (tmp_path / "sparsity.safetensors").exists()


@pytest.mark.parametrize("what", ["cut", "shape", "integers", "name"])
def test_a_broken_sparsity_file_is_left_aside_and_said(what: str, tmp_path: Path):
    folder = community(tmp_path / "in", make("standard").weights())
    place = folder / "sparsity.safetensors"
    if what == "cut":
        place.write_bytes(place.read_bytes()[:-3])
    else:
        value = {"shape": torch.zeros(8), "integers": torch.zeros(7, dtype=torch.long)}.get(what, torch.zeros(7))
        save_file({"density" if what == "name" else "sparsity": value}, place)
    loaded = load(folder)[1]
    assert loaded.sparsity is None and any("left aside" in note and "sparsity" in note for note in loaded.notes)


# --- Gemma Scope 2 ----------------------------------------------------------------------------------------------------


def scope_2(folder: Path, *, affine: bool = False, d_out: int = 5, **config: Any) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(4)
    s = {
        "w_enc": torch.randn(5, 7),
        "b_enc": torch.randn(7),
        "w_dec": torch.randn(7, d_out),
        "b_dec": torch.randn(d_out),
    }
    s["threshold"] = torch.rand(7)
    if affine:
        s["affine_skip_connection"] = torch.randn(5, d_out)
    folder.mkdir(parents=True)
    save_file(s, folder / "params.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "l0": 60, **config}))
    return folder, {name: tensor.double() for name, tensor in s.items()}


def test_gemma_scope_2_sae(tmp_path: Path):
    where = {"hf_hook_point_in": "model.layers.22.output", "model_name": "gemma-v3-1b-pt", "affine_connection": False}
    folder, d = scope_2(tmp_path / "layer_22_width_16k_l0_medium", **where)
    for path in (folder, folder / "params.safetensors"):
        assert [form.name for form in FORMATS.values() if form.sniff(path)] == ["gemma_scope_2"]
        loaded = read("gemma_scope_2", path)
        x, f, x_hat = codes(loaded)
        pre = x @ d["w_enc"] + d["b_enc"]
        torch.testing.assert_close(f, pre.relu() * (pre > d["threshold"]))
        torch.testing.assert_close(x_hat, f @ d["w_dec"] + d["b_dec"])
        assert loaded.metadata["hook_name"] == "blocks.22.hook_resid_post"
        assert loaded.metadata["model_name"] == "google/gemma-3-1b-pt" and loaded.metadata["processing"] == "raw"


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("said", [True, False])
def test_gemma_scope_2_transcoders(affine: bool, said: bool, tmp_path: Path):
    where: dict[str, Any] = {
        "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
        "affine_connection": affine,
    }
    folder = tmp_path / "transcoder_all" / "layer_5_width_16k_l0_small"
    folder, d = scope_2(folder, affine=affine, d_out=4, **(where if said else {}))
    loaded = read("gemma_scope_2", folder)
    assert loaded.is_transcoder and bool(loaded.notes) == (not said and not affine)
    x, f, out = codes(loaded)
    expected = f @ d["w_dec"] + d["b_dec"] + (x @ d["affine_skip_connection"] if affine else 0)
    torch.testing.assert_close(out, expected)
    if said:
        assert loaded.metadata["hook_name_out"] == "blocks.5.hook_mlp_out" and "hook_name" not in loaded.metadata
    convert(folder, tmp_path / "lens", to="saelens")
    assert json.loads((tmp_path / "lens" / "cfg.json").read_text())["architecture"] == (
        "jumprelu_skip_transcoder" if affine else "jumprelu_transcoder"
    )
    certificate, _ = convert(tmp_path / "lens", tmp_path / "again", to="gemma_scope_2")
    assert certificate.weights_equal
    again = load_file(tmp_path / "again" / "params.safetensors")
    assert again.keys() == d.keys() and all(torch.equal(again[name].double(), d[name]) for name in d)


def test_gemma_scope_2_files_that_mean_something_else(tmp_path: Path):
    folder, _ = scope_2(tmp_path / "a", architecture="topk")
    with pytest.raises(MechintError, match="only jump_relu"):
        read("gemma_scope_2", folder)
    folder, _ = scope_2(tmp_path / "b", affine_connection=True)
    with pytest.raises(MechintError, match="disagree about affine_skip_connection"):
        read("gemma_scope_2", folder)
    folder, d = scope_2(tmp_path / "c")
    clt = {name: tensor.float() for name, tensor in d.items()} | {"w_dec": torch.randn(7, 3, 5)}
    save_file(clt, folder / "params.safetensors")
    with pytest.raises(MechintError, match="cross-layer"):
        read("gemma_scope_2", folder)


# --- saev's newest schema ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_what_we_write_for_saev_is_schema_5(architecture: str, tmp_path: Path):
    """Its loader takes these keys and no others: the line, its settings, and the order of the tensors."""
    loaded = make(architecture, apply_b_dec_to_input=False, relu=False)
    if architecture == "jumprelu":
        loaded.weights()["threshold"].fill_(0.5)
    path = write("saev", loaded, tmp_path)
    line, archive = path.read_bytes().split(b"\n", 1)
    assert archive.startswith(b"PK\x03\x04") and b": " not in line
    header = json.loads(line)
    assert list(header) == ["schema", "cfg", "commit", "lib"] and header["schema"] == 5 and header["lib"] == "0.1.0"
    cfg = header["cfg"]
    assert set(cfg) == {
        "d_model",
        "d_sae",
        "activation",
        "reinit_blend",
        "reinit_enc_dec_tranpose",
        "remove_parallel_grads",
        "normalize_w_dec",
    }
    kinds = {"standard": ("Relu", "relu"), "topk": ("TopK", "top-k"), "jumprelu": ("BatchTopK", "batch-top-k")}
    cls, key = kinds[architecture]
    own = {"standard": set(), "topk": {"top_k"}, "jumprelu": {"top_k", "momentum"}}[architecture]
    assert cfg["activation"]["cls"] == cls and cfg["activation"]["params"]["key"] == key
    assert set(cfg["activation"]["params"]) == {"key", "sparsity", "aux"} | own
    assert cfg["activation"]["params"]["aux"] == {"cls": "NoAux", "params": {"key": "no-aux"}}
    (tmp_path / "archive.pt").write_bytes(archive)
    state = torch.load(tmp_path / "archive.pt", weights_only=True)
    assert list(state)[:4] == ["W_dec", "b_dec", "W_enc", "b_enc"]
    assert list(state)[4:] == (["activation.threshold"] if architecture == "jumprelu" else [])
    assert state["W_enc"].shape == (5, 7) and state["W_dec"].shape == (7, 5)


# --- what opens elsewhere ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_the_one_door_opens_every_format(name: str, tmp_path: Path):
    """What identify accepts, every command opens: they all come through `SAE.load`."""
    folder = tmp_path / "given"
    folder.mkdir()
    path = any_file(name, folder)
    for place in (path, path.parent) if path.is_file() else (path,):
        for opened in (SAE.load(place), SAE.load(str(place)), load_sae(place), SAE.load_from_disk(place)):
            assert (opened.d_in, opened.d_sae) == (5, 7)
    assert identify(path).formats == (name,)
