"""The SAELens-style API: an SAE's form, the hooked model, the store, the runner's translation, the Hub."""

import copy
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback_hub import LoopbackHub

from mechint import SAE, LanguageModelSAERunnerConfig, SAEConfig, SAETrainingRunner
from mechint.errors import MechintError
from mechint.formats import reference_decode, reference_encode
from mechint.huggingface.releases import VARIABLE, find_release
from mechint.runs import Run
from mechint.saelens import LoggingConfig, StandardTrainingSAEConfig, TopKTrainingSAEConfig, upload
from mechint.saelens.nested import JumpReLUTrainingSAEConfig, MatryoshkaBatchTopKTrainingSAEConfig
from mechint.saelens.neuronpedia import neuronpedia_id, neuronpedia_url, parse_neuronpedia
from mechint.saelens.windows import mixed, token_windows

ROOT = Path(__file__).resolve().parent.parent
HOOK = "blocks.3.hook_resid_post"
IN, OUT = "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"
D_IN, D_SAE = 16, 48


def drawn(architecture: str = "standard", *, d_in: int = D_IN, **settings: Any) -> SAE:
    """An SAE with nothing at its default: biases, thresholds and row norms are drawn too."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"W_enc": normal(d_in, D_SAE), "W_dec": normal(D_SAE, d_in), "b_dec": normal(d_in)}
    if architecture == "gated":
        tensors |= {name: normal(D_SAE) for name in ("b_gate", "b_mag", "r_mag")}
    else:
        tensors["b_enc"] = normal(D_SAE)
    if architecture == "jumprelu":
        tensors["threshold"] = normal(D_SAE).abs()
    options = {"k": 5} if architecture == "topk" else {}
    metadata = {"hook_name": HOOK, "model_name": "tiny", "processing": "raw", "context_size": 8, "prepend_bos": True}
    return SAE.from_tensors(architecture, tensors, metadata=metadata, **options, **settings)


def drawn_transcoder(
    architecture: str = "standard", *, skip: bool = False, d_in: int = D_IN, d_out: int = D_IN + 8, **settings: Any
) -> SAE:
    """A transcoder with nothing at its default."""
    loaded = drawn(architecture, d_in=d_in, apply_b_dec_to_input=False, **settings)
    generator = torch.Generator().manual_seed(8)
    others = {"W_dec": (D_SAE, d_out), "b_dec": (d_out,)} | ({"W_skip": (d_out, d_in)} if skip else {})
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in others.items()}
    metadata = {**loaded.metadata, "hook_name": IN, "hook_name_out": OUT}
    return loaded.variant(tensors={**loaded.weights(), **tensors}, transcoder=True, metadata=metadata)


SETTINGS = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False, "input_scale": 0.25}),
    ("standard", {"normalize_activations": "constant_norm_rescale"}),
    ("standard", {"normalize_activations": "layer_norm"}),
    ("topk", {}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("topk", {"relu": False}),
    ("jumprelu", {}),
    ("gated", {"apply_b_dec_to_input": False}),
]


@pytest.mark.parametrize(("architecture", "settings"), SETTINGS)
@pytest.mark.parametrize("leading", [(6,), (2, 3), (3, 1, 2)])
def test_computes_what_its_file_defines_for_any_leading_shape(
    architecture: str, settings: dict[str, Any], leading: tuple[int, ...]
):
    loaded = drawn(architecture, **settings)
    sae = loaded
    x = 3 * torch.randn(*leading, D_IN, generator=torch.Generator().manual_seed(1))
    rows = x.reshape(-1, D_IN)
    acts = reference_encode(loaded, rows)
    expected = reference_decode(loaded, acts, rows).reshape(x.shape)
    with torch.no_grad():
        found = sae.encode(x)
        assert found.shape == (*leading, D_SAE)
        torch.testing.assert_close(found.double(), acts.reshape(found.shape), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.decode(found).double(), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(sae(x).double(), expected, rtol=1e-5, atol=1e-4)


TRANSCODERS = [
    ("transcoder", "standard", False),
    ("skip_transcoder", "standard", True),
    ("jumprelu_transcoder", "jumprelu", False),
    ("jumprelu_skip_transcoder", "jumprelu", True),
]


@pytest.mark.parametrize(("name", "architecture", "skip"), [*TRANSCODERS, ("topk_skip_transcoder", "topk", True)])
def test_transcoders_compute_what_their_file_defines(tmp_path: Path, name: str, architecture: str, skip: bool):
    loaded = drawn_transcoder(architecture, skip=skip)
    sae = loaded
    x = torch.randn(2, 3, D_IN, generator=torch.Generator().manual_seed(1))
    acts = reference_encode(loaded, x.flatten(0, 1))
    expected = reference_decode(loaded, acts, x.flatten(0, 1)).reshape(2, 3, D_IN + 8)
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x).double(), acts.reshape(2, 3, D_SAE), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(x).double(), expected, rtol=1e-5, atol=1e-4)
        without = expected - x.double() @ loaded.weights()["W_skip"].double().T if skip else expected
        torch.testing.assert_close(sae.decode(sae.encode(x)).double(), without, rtol=1e-5, atol=1e-4)
        sae.use_error_term = True  # what it should have given is not in its input: no error to add
        torch.testing.assert_close(sae(x).double(), expected, rtol=1e-5, atol=1e-4)
    cfg = sae.cfg
    assert (cfg.architecture, cfg.d_in, cfg.d_out, cfg.d_sae) == (name, D_IN, D_IN + 8, D_SAE) and cfg.is_transcoder
    assert (cfg.hook_name, cfg.hook_name_out, cfg.apply_b_dec_to_input) == (IN, OUT, False)
    assert cfg.activation_fn_str == ("topk" if architecture == "topk" else "relu")
    assert SAEConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert "d_out" not in drawn().cfg.to_dict()
    new = SAE(cfg)  # another one of this kind
    assert {k: v.shape for k, v in new.named_parameters()} == {k: v.shape for k, v in sae.named_parameters()}
    assert new(x).shape == (2, 3, D_IN + 8) and bool((new.b_dec == 0).all())
    if architecture == "topk":
        with pytest.raises(MechintError, match="topk"):
            sae.save_model(tmp_path / "s")
        return
    sae.save_model(tmp_path / "s")
    again = SAE.load_from_disk(tmp_path / "s")
    assert again.cfg == cfg
    for key, value in sae.named_parameters():
        assert torch.equal(value, again.get_parameter(key)), key
    again.fold_W_dec_norm()
    with torch.no_grad():
        torch.testing.assert_close(again(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_transcoders_that_are_none_are_refused():
    whole = {"d_in": 4, "d_sae": 8, "d_out": 6}
    for given, words in (
        ({"architecture": "skip_transcode"}, "skip_transcoder"),
        ({"architecture": "gated_transcoder"}, "transcoder"),
        ({"architecture": "transcoder", "d_out": None}, "d_out"),
        ({"architecture": "transcoder", "normalize_activations": "layer_norm"}, "layer_norm"),
    ):
        with pytest.raises(MechintError, match=words):
            SAE(SAEConfig(**{**whole, **given}))


def test_a_device_that_is_not_there_is_told_before_anything_is_done(tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    sae = drawn()
    folder = sae.save_model(tmp_path / "s")[0].parent
    for call in (
        lambda: SAE.load_from_disk(folder, device="cuda"),
        lambda: SAE.from_pretrained(release="nobody/nothing", sae_id="x", device="cuda"),
        lambda: SAE(SAEConfig(d_in=4, d_sae=8, device="cuda")),
    ):
        with pytest.raises(MechintError, match="device 'cuda' cannot be used here.*device=\"cpu\"") as told:
            call()
        assert "\n" not in str(told.value)
    assert SAE.load_from_disk(folder, device=torch.device("cpu")).cfg.device == "cpu"


def test_attributes_and_cfg_under_old_and_new_names():
    sae = drawn("topk")
    assert sae.W_enc.shape == (D_IN, D_SAE) and sae.W_dec.shape == (D_SAE, D_IN)
    assert sae.b_enc.shape == (D_SAE,) and sae.b_dec.shape == (D_IN,)
    cfg = sae.cfg
    assert (cfg.d_in, cfg.d_sae, cfg.dtype, cfg.device) == (D_IN, D_SAE, "float32", "cpu")
    assert cfg.architecture == "topk" == cfg.architecture()  # a string before version 6, a method since
    assert (cfg.activation_fn_str, cfg.activation_fn_kwargs, cfg.k) == ("topk", {"k": 5}, 5)
    assert cfg.hook_name == cfg.metadata.hook_name == HOOK and cfg.hook_layer == 3
    assert cfg.model_name == "tiny" and cfg.metadata.nothing_of_that_name is None
    with pytest.raises(AttributeError, match="no_such"):
        _ = cfg.no_such
    assert sae.get_name() == f"sae_tiny_{HOOK}_{D_SAE}"
    again = SAEConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert again == cfg
    old = SAEConfig.from_dict(
        {"d_in": 4, "d_sae": 8, "hook_name": HOOK, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    )
    assert old.architecture == "topk" and old.k == 3 and old.hook_name == HOOK
    half = copy.deepcopy(sae).to(torch.float64)
    assert half.cfg.dtype == "float64" and sae.cfg.dtype == "float32"


def test_unpacks_as_the_triple_of_before_version_6():
    sae = drawn()
    first, cfg_dict, sparsity = sae
    assert first is sae and cfg_dict["metadata"]["hook_name"] == HOOK and sparsity is None
    assert sae[0] is sae and sae[1] == cfg_dict


def test_heads_come_one_by_one_or_side_by_side(tmp_path: Path):
    sae = drawn().variant(metadata={"hook_name": "blocks.1.attn.hook_z"})
    assert sae.cfg.reshape_activations == "hook_z"
    heads = torch.randn(2, 3, 4, 4)
    flat = heads.flatten(-2)
    assert torch.equal(sae.encode(heads), sae.encode(flat)) and sae.encode(heads).shape == (2, 3, D_SAE)
    assert torch.equal(sae(heads), sae(flat).reshape(2, 3, 4, 4))
    sae.save_model(tmp_path / "s")  # SAELens goes by what this file says
    assert json.loads((tmp_path / "s" / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    sae.save_model(tmp_path / "run" / "sae")
    assert json.loads((tmp_path / "run" / "sae" / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    with pytest.raises(MechintError, match="d_in 16"):
        drawn().encode(heads)
    for said in ("none", "hook_z"):  # what a file says is kept
        cfg = json.loads((tmp_path / "s" / "cfg.json").read_text()) | {"reshape_activations": said}
        (tmp_path / "s" / "cfg.json").write_text(json.dumps(cfg))
        again = SAE.load_from_disk(tmp_path / "s")
        assert again.cfg.reshape_activations == said
        again.save_model(tmp_path / "t")
        assert json.loads((tmp_path / "t" / "cfg.json").read_text())["reshape_activations"] == said


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_folding_decoder_norms_changes_no_reconstruction(architecture: str):
    sae, x = drawn(architecture), torch.randn(9, D_IN)
    before = sae(x).detach()
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(sae(x).detach(), before, rtol=1e-4, atol=1e-4)


def test_folding_where_it_would_choose_other_latents_is_refused():
    with pytest.raises(MechintError, match="would change which latents"):
        drawn("topk").fold_W_dec_norm()


@pytest.mark.parametrize(
    ("architecture", "settings"), [("standard", {}), ("topk", {}), ("jumprelu", {}), ("gated", {})]
)
def test_save_and_load_are_bit_exact_and_replace(tmp_path: Path, architecture: str, settings: dict[str, Any]):
    sae = drawn(architecture, **settings)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "cfg.json").write_text("{}")  # of an SAE saved there before
    weights, cfg = sae.save_model(tmp_path / "x", sparsity=torch.linspace(-3, 0, D_SAE))
    assert weights.name == "sae_weights.safetensors" and cfg == tmp_path / "x" / "cfg.json"
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
    ]
    again = SAE.load_from_disk(tmp_path / "x")
    for name, tensor in sae.named_parameters():
        assert torch.equal(tensor, again.get_parameter(name)), name
    assert again.sparsity is not None and torch.equal(again.sparsity, torch.linspace(-3, 0, D_SAE))
    assert again.cfg.hook_name == HOOK and again.cfg.architecture == architecture
    by_release = SAE.from_pretrained(release=str(tmp_path), sae_id="x", device="cpu")
    assert torch.equal(by_release.W_enc, sae.W_enc)
    assert SAE.load_from_disk(again.save_model(tmp_path / "y")[0].parent).sparsity is not None  # kept as it is known
    sae.save_model(tmp_path / "x")
    assert SAE.load_from_disk(tmp_path / "x").sparsity is None  # nothing of another SAE stays beside this one


def test_mistakes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    sae = drawn()
    with pytest.raises(MechintError, match="d_in 16.*width 5"):
        sae.encode(torch.randn(2, 5))
    with pytest.raises(MechintError, match="encode the same batch first"):
        drawn(normalize_activations="constant_norm_rescale").decode(torch.zeros(2, D_SAE))
    with pytest.raises(MechintError, match="no SAE at"):
        SAE.load_from_disk(tmp_path / "none")
    with pytest.raises(MechintError, match="gpt2-small-res-jb"):
        SAE.from_pretrained("gpt2-small-res", "blocks.8.hook_resid_pre")
    with pytest.raises(MechintError, match="blocks.8.hook_resid_pre"):
        SAE.from_pretrained("gpt2-small-res-jb", "blocks.8.hook_resid_pr")
    with pytest.raises(MechintError, match="inside"):
        SAE.from_pretrained("user/repo", "../other")
    with pytest.raises(MechintError, match="converter='len' is not taken"):
        SAE.from_pretrained("user/repo", "x", "cpu", "float32", False, len)
    with pytest.raises(MechintError, match="dtype 'int3'"):
        SAE.load_from_disk(sae.save_model(tmp_path / "s")[0].parent, dtype="int3")
    with pytest.raises(MechintError, match="no SAEs to upload"):
        upload.upload_saes_to_huggingface({}, "user/repo")
    with pytest.raises(MechintError, match="not an SAE in SAELens's layout"):
        upload.upload_saes_to_huggingface({"x": tmp_path}, "user/repo")
    with pytest.raises(MechintError, match="inside the repository"):
        upload.upload_saes_to_huggingface({"../x": sae}, "user/repo")


# --- releases ---------------------------------------------------------------------------------------------------------


def test_a_registry_file_leads_to_repository_path_and_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entry = {
        "repo_id": "user/repo",
        "model": "pythia-70m",
        "config_overrides": {"model_from_pretrained_kwargs": {"center_writing_weights": True}},
        "saes": [{"id": "a", "path": "layer_3/a", "neuronpedia": "pythia-70m/3-me", "norm_scaling_factor": 0.5}],
    }
    (tmp_path / "mine.json").write_text(json.dumps({"mine": entry}))
    (tmp_path / "mine.yaml").write_text("yours:\n  repo_id: user/other\n  saes:\n  - id: b\n    path: b\n")
    monkeypatch.setenv(VARIABLE, os.pathsep.join([str(tmp_path / "mine.json"), str(tmp_path / "mine.yaml")]))
    where = find_release("mine", "a")
    assert (where.repo_id, str(where.folder), where.norm_scaling_factor) == ("user/repo", "layer_3/a", 0.5)
    assert where.metadata["neuronpedia_id"] == "pythia-70m/3-me" and where.metadata["processing"] == "centred"
    assert find_release("yours", "b").repo_id == "user/other"
    assert find_release("user/repo", "any/where").repo_id == "user/repo"
    (tmp_path / "bad.json").write_text('{"mine": {"saes": {}}}')
    with pytest.raises(MechintError, match="needs repo_id"):
        find_release("mine", "a", tmp_path / "bad.json")
    entry["saes"][0]["path"] = "../../etc"
    (tmp_path / "out.json").write_text(json.dumps({"mine": entry}))
    with pytest.raises(MechintError, match="does not lie in the repository"):
        find_release("mine", "a", tmp_path / "out.json")


def test_names_of_gemma_scope_say_what_its_files_do_not():
    place = find_release("google/gemma-scope-9b-it-res", "layer_20/width_16k/average_l0_91")
    assert (place.metadata["model_name"], place.metadata["hook_name"]) == (
        "gemma-2-9b-it",
        "blocks.20.hook_resid_post",
    )
    place = find_release("google/gemma-scope-2b-pt-transcoders", "layer_7/width_16k/average_l0_70")
    assert place.metadata["hook_name_out"] == "blocks.7.hook_mlp_out"
    for other in ("somebody/gemma-scope-2b-pt-res", "google/gemma-2b"):
        assert find_release(other, "layer_7/width_16k/average_l0_70").metadata == {}


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_windows_are_the_texts_end_to_end():
    texts = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11]]
    windows = list(token_windows(iter(texts), 4, bos=0, separator=0))
    # BOS first in each, once where a separator would double it; the tail is dropped
    assert windows == [[0, 1, 2, 3], [0, 4, 5, 0], [0, 6, 7, 8], [0, 9, 10, 11]]
    assert list(token_windows(iter(texts), 4, bos=None, separator=None)) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert list(token_windows(iter([[0, 1, 2], [3]]), 3, bos=0, separator=99)) == [[0, 1, 2]]
    assert list(token_windows(iter(texts), 4, bos=0, separator=0, concat=False)) == [[0, 1, 2, 3], [0, 6, 7, 8]]


def test_mixed_batches_serve_every_row_once_and_out_of_order():
    parts = (torch.arange(i, i + 10.0)[:, None] for i in range(0, 200, 10))
    batches = list(mixed(parts, 60, 20, torch.Generator().manual_seed(0)))
    rows = torch.cat(batches).flatten()
    assert all(len(batch) == 20 for batch in batches)
    assert sorted(rows.tolist()) == list(range(200))
    assert (rows[:60].diff() != 1).any() and (batches[0].max() - batches[0].min()) > 30


# --- the runner's translation -----------------------------------------------------------------------------------------


def test_the_flat_form_becomes_our_settings():
    cfg = LanguageModelSAERunnerConfig(
        model_name="gpt2-small",
        hook_name="blocks.8.hook_resid_pre",
        hook_layer=8,
        d_in=768,
        architecture="standard",
        d_sae=768 * 8,
        activation_fn="relu",
        lr=4e-4,
        l1_coefficient=8e-5,
        lp_norm=1.0,
        lr_scheduler_name="constant",
        lr_warm_up_steps=500,
        l1_warm_up_steps=1000,
        use_ghost_grads=True,
        feature_sampling_window=1000,
        dead_feature_window=5000,
        dead_feature_threshold=1e-8,
        dataset_path="monology/pile-uncopyrighted",
        streaming=True,
        context_size=128,
        train_batch_size_tokens=4096,
        store_batch_size_prompts=16,
        n_batches_in_buffer=64,
        training_tokens=100_000_000,
        log_to_wandb=True,
        wandb_project="sae-training",
        wandb_log_frequency=100,
        checkpoint_path="checkpoints",
        n_checkpoints=5,
        device="cuda",
        dtype="float32",
    )
    collect = cfg.collect_config("store", 7)
    assert (collect.model, collect.hook, collect.dataset) == (
        "gpt2-small",
        "blocks.8.hook_resid_pre",
        "monology/pile-uncopyrighted",
    )
    assert (collect.context_size, collect.batch_size, collect.device, collect.keep_bos) == (128, 16, "cuda", True)
    train = cfg.train_config("store", 768)
    assert (train.expansion, train.epochs, train.batch_size) == (8, 100_000_000 // 4096, 4096)
    assert (train.learning_rate, train.warmup_steps, train.schedule, train.decay_share) == (4e-4, 500, "constant", 0.0)
    assert (train.l1_lambda, train.l1_reduction, train.lambda_warmup_steps) == (8e-5, "sum", 1000)
    assert (train.revive, train.dead_after, train.track, train.log_every) == ("auxk", 5000 * 4096, "wandb", 100)
    assert (train.runs_root, train.save_every) == ("checkpoints", train.epochs // 6)
    said = " ".join(cfg.notes)
    assert "AuxK" in said and "held out" in said and "feature_sampling_window" in said


def test_the_nested_form_becomes_our_settings():
    cfg = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=32, d_sae=128, l1_coefficient=5.0, l1_warm_up_steps=9),
        logger=LoggingConfig(run_name="mine"),
        hook_name=HOOK,
        training_tokens=40_960,
    )
    train = cfg.train_config("store", 32)
    assert (train.decoder, train.init, train.init_decoder_norm) == ("free", "tied", 0.1)
    assert (train.l1_lambda, train.lambda_warmup_steps, train.run_name, train.track) == (5.0, 9, "mine", "none")
    topk = LanguageModelSAERunnerConfig(sae=TopKTrainingSAEConfig(d_in=32, d_sae=64, k=7), hook_name=HOOK)
    assert topk.train_config("x", 32).k == 7 and topk.train_config("x", 32).architecture == "topk"
    jump = JumpReLUTrainingSAEConfig(d_in=32, d_sae=64, jumprelu_sparsity_loss_mode="tanh", l0_coefficient=2.0)
    train = LanguageModelSAERunnerConfig(sae=jump, hook_name=HOOK).train_config("x", 32)
    assert (train.penalty, train.tanh_scale, train.l1_lambda, train.init_threshold) == ("tanh", 4.0, 2.0, 0.01)
    nested = MatryoshkaBatchTopKTrainingSAEConfig(d_in=32, d_sae=64, matryoshka_widths=[16, 32])
    assert LanguageModelSAERunnerConfig(sae=nested, hook_name=HOOK).train_config("x", 32).widths == (16, 32, 64)
    by_dict = LanguageModelSAERunnerConfig(sae={"architecture": "gated", "d_in": 8, "d_sae": 16}, hook_name=HOOK)
    assert by_dict.sae_architecture == "gated" and by_dict.latents(8) == 16


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"architecture": "standart"}, "standard"),
        ({"hook_name": HOOK, "hook_layer": 4}, "contradicts"),
        ({"lp_norm": 0.5}, "lp_norm"),
        ({"lr_scheduler_name": "linear"}, "constant"),
        ({"training_tokens": 10}, "less than one batch"),
        ({"normalize_activations": "layer_norm"}, "expected_average_only_in"),
        ({"hook_head_index": 2}, "hook_head_index"),
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input"),
        ({"dataset_trust_remote_code": True}, "never run"),
        ({"sae": {"architecture": "standard", "d_in": 8, "d_sae": 16, "l1": 3}}, "l1_coefficient"),
        ({"activation_fn": "tanh-relu"}, "relu, topk"),
        ({"sae": {"architecture": "standard", "d_in": 8, "d_sae": 16, "lp_norm": 2.0}}, "lp_norm 2.0"),
        ({"sae": {"architecture": "gated", "d_in": 8, "d_sae": 16, "apply_b_dec_to_input": False}}, "apply_b_dec"),
        ({"seqpos_slice": (5, None)}, r"seqpos_slice=\(5, None\) is not trained here; leave it at \(None,\)"),
        ({"is_dataset_tokenized": True}, "is_dataset_tokenized"),
        ({"logger": {"wandb_projekt": "x"}}, "wandb_project"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_once(given: dict[str, Any], words: str):
    with pytest.raises(MechintError, match=words):
        LanguageModelSAERunnerConfig(**given)


def test_a_run_that_could_not_be_logged_or_computed_begins_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    given: dict[str, Any] = {"model_name": "builtin/pythia-tiny", "hook_name": HOOK, "dataset_path": "builtin/tales"}
    with pytest.raises(MechintError, match="pip install wandb.*metrics.csv"):
        SAETrainingRunner(LanguageModelSAERunnerConfig(**given, log_to_wandb=True)).run()
    if not torch.cuda.is_available():
        with pytest.raises(MechintError, match="device 'cuda' cannot be used here.*device=\"cpu\""):
            SAETrainingRunner(LanguageModelSAERunnerConfig(**given, device="cuda")).run()
    assert not list(tmp_path.iterdir())


def test_what_is_done_otherwise_is_said():
    assert len(LanguageModelSAERunnerConfig().notes) == 1
    for given, words in (
        ({"log_to_wandb": True, "wandb_id": "abc"}, "without effect here: wandb_id"),
        ({"logger": {"log_to_wandb": True, "log_weights_to_wandb": True}}, "log_weights_to_wandb"),
        ({"decoder_heuristic_init": True}, "decoder_heuristic_init"),
        ({"exclude_special_tokens": [0, 5]}, "rows of BOS are left out"),
        ({"use_ghost_grads": True}, "AuxK"),
        ({"lr_scheduler_name": "cosineannealing", "lr_end": 1e-5}, "not to lr_end"),
    ):
        assert words in " ".join(LanguageModelSAERunnerConfig(**given).notes), given


def test_short_forms_are_enough():
    for given in ({"architecture": "gated"}, {"architecture": "jumprelu"}, {"architecture": "standard"}):
        assert LanguageModelSAERunnerConfig(**given).sae_architecture == given["architecture"]
    by_function = LanguageModelSAERunnerConfig(activation_fn="topk", activation_fn_kwargs={"k": 50})
    assert by_function.train_config("x", 64).architecture == "topk" and by_function.train_config("x", 64).k == 50


def test_widths():
    with pytest.raises(MechintError, match="d_in is 64"):
        LanguageModelSAERunnerConfig(d_in=64).latents(128)
    with pytest.raises(MechintError, match="d_sae 200 and expansion_factor 2 contradict each other.* 256"):
        LanguageModelSAERunnerConfig(d_sae=200, expansion_factor=2).latents(128)
    for given, latents, expansion in (
        ({}, 512, 4),
        ({"expansion_factor": 16}, 2048, 16),
        ({"d_sae": 256}, 256, 2),
        ({"d_sae": 256, "expansion_factor": 2}, 256, 2),
        ({"d_sae": 200}, 200, None),  # no multiple of d_in
        ({"sae": TopKTrainingSAEConfig(d_in=128, d_sae=200)}, 200, None),
    ):
        cfg = LanguageModelSAERunnerConfig(**given)
        train = cfg.train_config("x", 128)
        assert (cfg.latents(128), train.num_features, train.d_sae, train.expansion) == (*[latents] * 3, expansion)


class StandInWandb(types.ModuleType):
    """What is asked of wandb, and where it would put the run."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(UsageError=type("UsageError", (Exception,), {}))
        self.asked: dict[str, Any] = {}
        self.rows = 0

    def init(self, **kwargs: Any) -> "StandInWandb":
        self.asked = {**kwargs, "entity": os.environ.get("WANDB_ENTITY")}
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows += 1

    def finish(self) -> None:
        self.asked["finished"] = True


@pytest.mark.slow
def test_the_runner_in_the_nested_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    given: dict[str, Any] = {
        "model_name": "builtin/pythia-tiny",
        "hook_name": HOOK,
        "dataset_path": "builtin/tales",
        "context_size": 32,
        "training_tokens": 5120,
        "lr": 4e-3,
        "train_batch_size_tokens": 256,
        "device": "cpu",
        "checkpoint_path": str(tmp_path / "runs"),
        "output_path": str(tmp_path / "out"),
        "verbose": False,
    }
    nested = TopKTrainingSAEConfig(d_in=128, d_sae=256, k=8)
    runner = SAETrainingRunner(LanguageModelSAERunnerConfig(sae=nested, logger=LoggingConfig(run_name="mine"), **given))
    with pytest.raises(MechintError, match="call run"):
        runner.metrics()
    sae = runner.run()
    assert capsys.readouterr().out == ""
    assert runner.run_dir == tmp_path / "runs" / "mine" and Run(runner.run_dir).is_done
    assert (sae.cfg.architecture, sae.cfg.k, sae.cfg.hook_name) == ("topk", 8, HOOK)
    assert (sae.cfg.context_size, sae.cfg.dataset_path, sae.cfg.prepend_bos) == (32, "builtin/tales", True)
    metrics = runner.metrics()
    assert metrics["l0"] == pytest.approx(8, abs=0.5) and metrics["l1_loss"] is None
    assert 0 < metrics["ce_loss_score"] < 1 and 0 < metrics["explained_variance"] < 1
    assert sae.sparsity is not None and sae.sparsity.shape == (256,)
    # log10 of frequencies whose sum is L0
    assert float((10 ** sae.sparsity.double()).sum()) == pytest.approx(8, abs=0.5)
    assert torch.equal(SAE.load_from_disk(tmp_path / "out").W_dec, sae.W_dec)
    wandb = StandInWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", "of-the-user")
    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    logged: dict[str, Any] = {"log_to_wandb": True, "wandb_project": "sae-training", "wandb_entity": "lab"}
    logged |= {"wandb_log_frequency": 5, "run_name": "logged", "output_path": None}
    other = LanguageModelSAERunnerConfig(architecture="gated", d_sae=256, **{**given, **logged})
    SAETrainingRunner(other).run()
    assert (wandb.asked["project"], wandb.asked["entity"], wandb.asked["name"]) == ("sae-training", "lab", "logged")
    assert wandb.asked["finished"] and wandb.rows == 5  # of 20 steps each fifth, and the last
    assert os.environ["WANDB_PROJECT"] == "of-the-user" and "WANDB_ENTITY" not in os.environ
    again = SAETrainingRunner(LanguageModelSAERunnerConfig(sae=nested, **given)).run()
    assert torch.equal(again.W_enc, sae.W_enc)  # the same seed, the same texts
    stored = str(tmp_path / "runs" / "mine" / "heldout")
    by_path = {**given, "use_cached_activations": True, "cached_activations_path": stored, "training_tokens": 512}
    assert SAETrainingRunner(LanguageModelSAERunnerConfig(sae=nested, **by_path)).run().d_sae == 256
    runs = len(list((tmp_path / "runs").iterdir()))
    with pytest.raises(MechintError, match="is 128 wide"):
        SAETrainingRunner(LanguageModelSAERunnerConfig(d_in=64, **given)).run()
    assert len(list((tmp_path / "runs").iterdir())) == runs


# --- Neuronpedia ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("gpt2-small/8-res-jb", ("gpt2-small", 8, "res-jb", None)),
        ("https://www.neuronpedia.org/gpt2-small/8-res-jb/1234?embed=true", ("gpt2-small", 8, "res-jb", 1234)),
        (
            "neuronpedia.org/gemma-2-2b/0-gemmascope-res-16k__l0-105/5",
            ("gemma-2-2b", 0, "gemmascope-res-16k__l0-105", 5),
        ),
        ("https://neuronpedia.org/api/feature/gpt2-small/0-res_mid_32k-oai/7", ("gpt2-small", 0, "res_mid_32k-oai", 7)),
        ("pythia-70m-deduped/e-att-sm", ("pythia-70m-deduped", "e", "att-sm", None)),
    ],
)
def test_neuronpedia_ids_both_ways(text: str, parts: tuple[Any, ...]):
    found = parse_neuronpedia(text)
    assert (found.model, found.layer, found.source, found.index) == parts
    assert parse_neuronpedia(str(found)) == found
    sae = drawn()
    sae.cfg.metadata.neuronpedia_id = str(found)
    index = 7
    assert parse_neuronpedia(neuronpedia_url(sae, index)).index == index
    assert parse_neuronpedia(neuronpedia_url(sae, index, api=True)) == parse_neuronpedia(neuronpedia_id(sae, index))


def test_neuronpedia_mistakes_are_told():
    for text in ("gpt2-small", "gpt2-small/8", "https://example.org/gpt2-small/8-res-jb", "a/8-b/x"):
        with pytest.raises(MechintError, match="no id or address"):
            parse_neuronpedia(text)
    with pytest.raises(MechintError, match="no neuronpedia_id"):
        neuronpedia_id(drawn())


# --- lightness and the example ----------------------------------------------------------------------------------------


def test_opening_an_sae_imports_little_beside_torch(tmp_path: Path):
    drawn().save_model(tmp_path / "s")
    heavy = ("transformer_lens", "transformers", "datasets", "pandas", "huggingface_hub", "tyro", "torch._dynamo")
    code = (
        "import sys\nfrom mechint import SAE\n"
        f"SAE.load_from_disk({str(tmp_path / 's')!r})\n"
        f"print(sorted({{'mechint.config', 'mechint.models', *{heavy}}} & set(sys.modules)))\n"
        "from mechint import LanguageModelSAERunnerConfig\nLanguageModelSAERunnerConfig()\n"
        f"print(sorted({set(heavy[:5])} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]


@pytest.mark.slow
def test_the_example_runs_against_a_hub(tmp_path: Path):
    entry = {"id": "three", "path": f"{HOOK}/gated", "neuronpedia": "pythia-tiny/3-res-tales"}
    registry = {"tales-res": {"repo_id": "tester/my-saes", "model": "builtin/pythia-tiny", "saes": [entry]}}
    (tmp_path / "mine.json").write_text(json.dumps(registry))
    example = str(ROOT / "examples" / "saelens_api.py")
    arguments = ["--repo", "tester/my-saes", "--tokens", "30720", "--release", "tales-res", "three"]
    with LoopbackHub(tmp_path / "hub") as hub:
        done = subprocess.run(
            [sys.executable, example, *arguments],
            env=hub.env(tmp_path / "hf", token=hub.token)
            | {"OMP_WAIT_POLICY": "PASSIVE", VARIABLE: str(tmp_path / "mine.json")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        files = hub.files("tester/my-saes")
        assert not hub.seen("OUTSIDE")
    expected = {f"{HOOK}/{file}" for file in ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")}
    assert expected <= set(files) and f"{HOOK}/gated/cfg.json" in files
    assert b"library_name: saelens" in files["README.md"]
    assert hub.token not in done.stdout + done.stderr + files["README.md"].decode()
    words = done.stdout
    for name in ("standard", "gated", "topk", "jumprelu"):
        assert f"{name}: {{'l0'" in words
    assert "with the error term by 0.00000" in words and "taken out: logits move by" in words
    assert "gpt2-small/8-res-jb/1234: feature 1234 of res-jb at layer 8 of gpt2-small" in words
    assert "tales-res three in builtin/pythia-tiny: " in words
    assert "https://www.neuronpedia.org/pythia-tiny/3-res-tales/" in words
