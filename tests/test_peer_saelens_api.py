"""Our SAELens-style API against SAELens itself: files, numbers, the hooked model, token windows, the list of releases.

Runs where SAELens is: `make test-peers`. Written against sae-lens 6.54.12. Tolerances: 1e-6 relative to the largest
value where no folding is needed.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback_hub import LoopbackHub
from test_saelens_api import D_IN, IN, OUT, TRANSCODERS, drawn, drawn_transcoder

from mechint.huggingface.releases import KNOWN, find_release
from mechint.models import load_model
from mechint.saelens import SAE, ActivationsStore, HookedSAETransformer
from mechint.saelens.windows import token_windows

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sae_lens") is None, reason="SAELens is not in this environment: `make test-peers`"
)

HOOK = "blocks.3.hook_resid_post"
TOKENS = torch.tensor([[0, 20, 30, 40, 50, 60], [0, 61, 52, 43, 34, 25]])
SETTINGS = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("standard", {"normalize_activations": "constant_norm_rescale"}),
    ("standard", {"normalize_activations": "layer_norm"}),
    ("topk", {}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("jumprelu", {}),
    ("gated", {}),
]


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize(("architecture", "settings"), SETTINGS)
def test_saelens_loads_what_we_write_and_we_what_it_writes(tmp_path: Path, architecture: str, settings: dict[str, Any]):
    from sae_lens import SAE as Theirs  # pyright: ignore[reportMissingImports]

    ours = drawn(architecture, **settings)
    ours.save_model(tmp_path / "ours")
    theirs = Theirs.load_from_disk(str(tmp_path / "ours"))
    assert theirs.cfg.architecture() == architecture == ours.cfg.architecture
    assert theirs.cfg.metadata.hook_name == HOOK and theirs.cfg.d_sae == ours.cfg.d_sae
    x = 3 * torch.randn(2, 5, D_IN, generator=torch.Generator().manual_seed(3))
    assert_same(ours.encode(x), theirs.encode(x))
    assert_same(ours(x), theirs(x))
    theirs.save_model(str(tmp_path / "theirs"))
    again = SAE.load_from_disk(tmp_path / "theirs")
    for name, tensor in ours.named_parameters():
        assert torch.equal(tensor, again.get_parameter(name)), name
        assert torch.equal(tensor, theirs.get_parameter(name)), name
    assert_same(again(x), theirs(x))
    assert again.cfg.hook_name == HOOK and again.cfg.normalize_activations == theirs.cfg.normalize_activations


def test_folding_decoder_norms_gives_their_weights(tmp_path: Path):
    from sae_lens import SAE as Theirs  # pyright: ignore[reportMissingImports]

    for architecture in ("standard", "jumprelu", "gated"):
        ours = drawn(architecture)
        ours.save_model(tmp_path / architecture)
        theirs = Theirs.load_from_disk(str(tmp_path / architecture), fold_W_dec_norm=True)
        ours.fold_W_dec_norm()
        for name, tensor in ours.named_parameters():
            assert_same(tensor, theirs.get_parameter(name))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("concat", [True, False])
def test_windows_of_tokens_are_theirs(seed: int, concat: bool):
    from sae_lens.tokenization_and_batching import concat_and_batch_sequences  # pyright: ignore[reportMissingImports]

    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (60,), generator=generator).tolist()
    # few different tokens, so that texts often begin with BOS or the separator
    texts = [torch.randint(0, 4, (length,), generator=generator) for length in lengths]
    for bos, separator, context_size in ((0, 0, 5), (0, 1, 6), (None, 1, 4), (None, None, 7), (0, None, 2)):
        theirs = concat_and_batch_sequences(
            iter(texts),
            context_size,
            begin_batch_token_id=bos,
            sequence_separator_token_id=separator,
            disable_concat_sequences=not concat,
        )
        ours = token_windows(
            (text.tolist() for text in texts), context_size, bos=bos, separator=separator, concat=concat
        )
        assert list(ours) == [window.tolist() for window in theirs], (bos, separator, context_size)


@pytest.fixture(scope="module")
def models(tiny_neox_dir: Path) -> tuple[HookedSAETransformer, Any]:
    """Ours, and SAELens's bridge around the same weights."""
    from sae_lens.analysis.sae_transformer_bridge import (  # pyright: ignore[reportMissingImports]
        SAETransformerBridge,
    )

    fresh = load_model(str(tiny_neox_dir), device="cpu")
    theirs = SAETransformerBridge.boot_transformers(
        str(tiny_neox_dir), hf_model=fresh.hf_model, tokenizer=fresh.tokenizer, device="cpu", dtype=torch.float32
    )
    theirs.enable_compatibility_mode(no_processing=True)
    return HookedSAETransformer.from_pretrained(str(tiny_neox_dir), device="cpu"), theirs


@pytest.fixture(scope="module")
def their_hooked(tiny_neox_dir: Path) -> Any:
    """Their class of the same name, which is TransformerLens's older HookedTransformer, with the same weights."""
    from sae_lens import HookedSAETransformer as Theirs  # pyright: ignore[reportMissingImports]
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.neox import convert_neox_weights

    loaded = load_model(str(tiny_neox_dir), device="cpu")
    hf, heads = loaded.hf_model.config, loaded.hf_model.config.num_attention_heads
    cfg = HookedTransformerConfig(
        n_layers=hf.num_hidden_layers,
        d_model=hf.hidden_size,
        n_ctx=hf.max_position_embeddings,
        d_head=hf.hidden_size // heads,
        n_heads=heads,
        d_mlp=hf.intermediate_size,
        d_vocab=hf.vocab_size,
        act_fn="gelu",
        eps=hf.layer_norm_eps,
        normalization_type="LN",
        positional_embedding_type="rotary",
        rotary_dim=hf.hidden_size // heads // 4,
        parallel_attn_mlp=True,
        rotary_adjacent_pairs=False,
    )
    model = Theirs(cfg)
    model.load_state_dict(convert_neox_weights(loaded.hf_model, cfg), strict=False)
    model.set_tokenizer(loaded.tokenizer)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("hook", [HOOK, "blocks.2.hook_mlp_out", "blocks.1.attn.hook_z"])
@pytest.mark.parametrize("given", [{}, {"use_error_term": True}, {"exclude_special_tokens": [0, 30]}])
def test_their_class_of_this_name_gives_the_same(
    tmp_path: Path, models: tuple[HookedSAETransformer, Any], their_hooked: Any, hook: str, given: dict[str, Any]
):
    from sae_lens import SAE as Theirs  # pyright: ignore[reportMissingImports]

    model = models[0]
    sae = drawn("jumprelu", d_in=32).requires_grad_(False)
    sae.cfg.metadata.hook_name = hook
    sae.save_model(tmp_path / "sae")
    their_sae = Theirs.load_from_disk(str(tmp_path / "sae")).requires_grad_(False)
    assert_same(model(TOKENS).log_softmax(-1), their_hooked(TOKENS).log_softmax(-1), 1e-5)
    out, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae], **given)
    expected, their_cache = their_hooked.run_with_cache_with_saes(TOKENS, saes=[their_sae], **given)
    assert_same(out.log_softmax(-1), expected.log_softmax(-1), 1e-5)
    names = [name for name in their_cache if "hook_sae" in name]
    assert {name for name in cache if "hook_sae" in name} == set(names)
    for name in names:
        assert_same(cache[name].reshape(their_cache[name].shape), their_cache[name], 1e-5)
    value = model.language_model.activations(TOKENS, hook).clone()
    value = value.unflatten(-1, model.language_model.hook_shape(hook))  # [batch, pos, head, d_head] of hook_z
    sae = SAE.load_from_disk(tmp_path / "sae").requires_grad_(False)
    assert sae.cfg.reshape_activations == their_sae.cfg.reshape_activations
    assert_same(sae.encode(value), their_sae.encode(value), 1e-5)
    assert_same(sae(value), their_sae(value), 1e-5)
    for one, its in ((model, sae), (their_hooked, their_sae)):
        with one.saes(saes=[its]):
            assert set(one.acts_to_saes) == {hook}
        assert not one.acts_to_saes
        one.add_sae(its)
        assert_same(one.run_with_saes(TOKENS).log_softmax(-1), one(TOKENS).log_softmax(-1), 1e-6)
        one.reset_saes()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize("use_error_term", [False, True])
def test_outputs_and_caches_of_the_hooked_model_are_theirs(
    tmp_path: Path, models: tuple[HookedSAETransformer, Any], architecture: str, use_error_term: bool
):
    from sae_lens import SAE as Theirs  # pyright: ignore[reportMissingImports]

    model, their_model = models
    sae = drawn(architecture, d_in=32).requires_grad_(False)
    sae.save_model(tmp_path / "sae")
    their_sae = Theirs.load_from_disk(str(tmp_path / "sae")).requires_grad_(False)
    out, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae], use_error_term=use_error_term)
    expected, their_cache = their_model.run_with_cache_with_saes(
        TOKENS, saes=[their_sae], use_error_term=use_error_term
    )
    clean = model(TOKENS)
    assert_same(out, expected, 1e-5)
    assert use_error_term or float((out - clean).abs().max()) > 1e-2  # the SAE does something
    stages = {name.rsplit(".", 1)[1]: name for name in their_cache if "hook_sae" in name}
    assert len(stages) == (6 if use_error_term else 5)
    for stage, their_name in stages.items():
        assert_same(cache[f"{HOOK}.{stage}"], their_cache[their_name], 1e-5)
    assert_same(cache["blocks.5.hook_resid_post"], their_cache["blocks.5.hook_resid_post"], 1e-5)
    edited = [
        run(TOKENS, saes=[one], fwd_hooks=[(name, lambda acts, hook: acts.flip(-1))])
        for run, one, name in (
            (model.run_with_hooks_with_saes, sae, f"{HOOK}.hook_sae_acts_post"),
            (their_model.run_with_hooks_with_saes, their_sae, stages["hook_sae_acts_post"]),
        )
    ]
    assert_same(edited[0], edited[1], 1e-5)
    assert use_error_term or float((edited[0] - expected).abs().max()) > 1e-2


@pytest.mark.parametrize(("name", "architecture", "skip"), TRANSCODERS)
def test_transcoders_are_theirs(tmp_path: Path, name: str, architecture: str, skip: bool):
    from sae_lens import SAE as Theirs  # pyright: ignore[reportMissingImports]

    ours = drawn_transcoder(architecture, skip=skip)
    ours.save_model(tmp_path / "ours")
    theirs = Theirs.load_from_disk(str(tmp_path / "ours"))
    assert theirs.cfg.architecture() == name == ours.cfg.architecture
    assert theirs.cfg.d_out == ours.cfg.d_out != ours.cfg.d_in
    assert (theirs.cfg.metadata.hook_name, theirs.cfg.metadata.hook_name_out) == (IN, OUT)
    x = 3 * torch.randn(2, 5, D_IN, generator=torch.Generator().manual_seed(3))
    acts = ours.encode(x)
    assert_same(acts, theirs.encode(x))
    assert_same(ours.decode(acts), theirs.decode(acts))
    assert_same(ours(x), theirs(x))
    theirs.save_model(str(tmp_path / "theirs"))
    again = SAE.load_from_disk(tmp_path / "theirs")
    for key, tensor in ours.named_parameters():
        assert torch.equal(tensor, again.get_parameter(key)) and torch.equal(tensor, theirs.get_parameter(key)), key
    assert again.cfg.architecture == name and again.cfg.hook_name_out == OUT
    theirs.fold_W_dec_norm()
    ours.fold_W_dec_norm()
    for key, tensor in ours.named_parameters():
        assert_same(tensor, theirs.get_parameter(key))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "architecture", "skip"), TRANSCODERS)
@pytest.mark.parametrize("use_error_term", [False, True])
def test_transcoders_in_the_model_are_theirs(
    tmp_path: Path,
    models: tuple[HookedSAETransformer, Any],
    name: str,
    architecture: str,
    skip: bool,
    use_error_term: bool,
):
    from sae_lens import SAE as Theirs  # pyright: ignore[reportMissingImports]

    model, their_model = models
    sae = drawn_transcoder(architecture, skip=skip, d_in=32, d_out=32).requires_grad_(False)
    sae.save_model(tmp_path / "sae")
    their_sae = Theirs.load_from_disk(str(tmp_path / "sae")).requires_grad_(False)
    out, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae], use_error_term=use_error_term)
    expected, their_cache = their_model.run_with_cache_with_saes(
        TOKENS, saes=[their_sae], use_error_term=use_error_term
    )
    stages = {key.rsplit(".", 1)[1]: key for key in their_cache if "hook_sae" in key}
    assert set(stages) == {key.rsplit(".", 1)[1] for key in cache if "hook_sae" in key}
    assert len(stages) == (6 if use_error_term else 5)
    x = model.language_model.activations(TOKENS, IN).clone()
    # SAELens leaves the skip connection out of what flows on in a model (its own call of the transcoder has it)
    added = x @ sae.W_skip.T if skip else torch.zeros_like(cache[f"{OUT}.hook_sae_recons"])
    for stage, key in stages.items():
        theirs = their_cache[key]
        if stage == "hook_sae_output" and not use_error_term:
            theirs = theirs + added
        if stage == "hook_sae_error":
            theirs = theirs - added
        assert_same(cache[f"{OUT}.{stage}"], theirs, 1e-5)
    if not skip or use_error_term:
        assert_same(out, expected, 1e-5)
    assert model.get_sae_hook_name(sae) == f"{OUT}.hook_sae_acts_post"
    assert their_model.get_sae_hook_name(their_sae) in their_cache
    their_model.add_sae(their_sae)
    model.add_sae(sae)
    assert set(model.acts_to_saes) == set(their_model.acts_to_saes) == {IN}
    for one in (model, their_model):
        one.reset_saes()


# How token windows are asked for: what SAELens's store takes, as the SAE or the call says it.
POLICIES = [
    {},
    {"context_size": 9},
    {"prepend_bos": False},
    {"disable_concat_sequences": True},
    {"disable_concat_sequences": True, "prepend_bos": False},
    {"sequence_separator_token": None},
    {"sequence_separator_token": "eos", "prepend_bos": False},
    {"sequence_separator_token": 77, "context_size": 7},
    {"seqpos_slice": (3, None)},
    {"seqpos_slice": (1, -2)},
    {"pretokenised": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_the_store_gives_their_tokens_and_activations(
    tmp_path: Path, models: tuple[HookedSAETransformer, Any], policy: dict[str, Any]
):
    from datasets import Dataset
    from sae_lens import SAE as Theirs  # pyright: ignore[reportMissingImports]
    from sae_lens import ActivationsStore as TheirStore  # pyright: ignore[reportMissingImports]

    model, their_model = models
    sae = drawn("standard", d_in=32).requires_grad_(False)
    policy = dict(policy)
    said = {name: policy.pop(name) for name in ("prepend_bos", "seqpos_slice") if name in policy}
    sae.cfg.metadata.update({"context_size": 12, "prepend_bos": True, **said})
    sae.save_model(tmp_path / "sae")
    their_sae = Theirs.load_from_disk(str(tmp_path / "sae")).requires_grad_(False)
    texts = ["the cat sat on the mat " * n + "and the dog ran far away from home again" for n in (1, 3, 0, 5, 2)]
    if policy.pop("pretokenised", False):
        rows = Dataset.from_dict({"tokens": [list(range(n, n + 14)) for n in range(20, 32)]})
    else:
        rows = Dataset.from_dict({"text": [*texts, "the", "<|endoftext|>the cat <|endoftext|>" * 4]})
    given = {"store_batch_size_prompts": 3, "train_batch_size_tokens": 12, "n_batches_in_buffer": 4, **policy}
    ours = ActivationsStore.from_sae(model, sae, rows, **given)
    theirs = TheirStore.from_sae(their_model, their_sae, rows, **given)
    for size in (None, 1, 5, 4, 7):  # more than one epoch
        tokens, expected = ours.get_batch_tokens(size), theirs.get_batch_tokens(size)
        assert torch.equal(tokens, expected), size
    assert_same(ours.get_activations(tokens), theirs.get_activations(tokens), 1e-5)
    assert ours.training_context_size == theirs.training_context_size
    assert ours.next_batch().shape == theirs.next_batch().shape == (12, 32)


@pytest.mark.slow
@pytest.mark.parametrize("exclude", [True, [20, 0]])
def test_the_store_leaves_out_the_rows_that_theirs_does(models: tuple[HookedSAETransformer, Any], exclude: Any):
    """The order of rows is drawn at random on both sides; which rows there are is not."""
    from datasets import Dataset
    from sae_lens import ActivationsStore as TheirStore  # pyright: ignore[reportMissingImports]

    model, their_model = models
    sae = drawn("standard", d_in=32).requires_grad_(False)
    tokens = torch.tensor([[0, 20, 30 + n, 40, 0, 50, 60, 20] for n in range(8)])
    rows = Dataset.from_dict({"tokens": tokens.tolist()})
    excluded = sorted({0} if exclude is True else exclude)
    theirs = TheirStore(
        model=their_model,
        dataset=rows,
        streaming=True,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=8,
        d_in=32,
        n_batches_in_buffer=2,
        total_training_tokens=100,
        store_batch_size_prompts=4,
        train_batch_size_tokens=8,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        exclude_special_tokens=torch.tensor(excluded),
    )
    ours = ActivationsStore.from_sae(
        model,
        sae,
        rows,
        context_size=8,
        store_batch_size_prompts=4,
        train_batch_size_tokens=8,
        n_batches_in_buffer=2,
        exclude_special_tokens=exclude,
    )
    found, expected = (torch.cat([next(store) for _ in range(20)]) for store in (ours, theirs))
    distances = torch.cdist(found.double(), expected.double())
    assert float(distances.amin(dim=1).max()) < 1e-3 and float(distances.amin(dim=0).max()) < 1e-3
    kept = model.language_model.activations(tokens, HOOK)[~torch.isin(tokens, torch.tensor(excluded))]
    assert float(torch.cdist(kept.double(), found.double()).amin(dim=1).max()) < 1e-3


def test_releases_known_here_are_those_of_their_list():
    from sae_lens.loading.pretrained_saes_directory import (  # pyright: ignore[reportMissingImports]
        get_pretrained_saes_directory,
    )

    theirs = get_pretrained_saes_directory()
    for release, entry in KNOWN.items():
        assert entry["repo_id"] == theirs[release].repo_id and entry["model"] == theirs[release].model
        for item in entry["saes"]:
            assert theirs[release].saes_map[item["id"]] == item["path"]
            assert theirs[release].neuronpedia_id[item["id"]] == item["neuronpedia"]
    where = find_release("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical")
    assert where.repo_id == "google/gemma-scope-2b-pt-res" and where.metadata["neuronpedia_id"]


def test_hooks_and_models_of_gemma_scope_are_theirs():
    from sae_lens.loading import pretrained_sae_loaders as loaders  # pyright: ignore[reportMissingImports]
    from sae_lens.loading.pretrained_saes_directory import (  # pyright: ignore[reportMissingImports]
        get_pretrained_saes_directory,
    )

    config_of = {
        "gemma_2": loaders.get_gemma_2_config_from_hf,
        "gemma_2_transcoder": loaders.get_gemma_2_transcoder_config_from_hf,
    }
    seen = 0
    for release, entry in get_pretrained_saes_directory().items():
        if entry.conversion_func not in config_of or not entry.repo_id.startswith("google/"):
            continue
        ids = list(entry.saes_map)
        for sae_id in {ids[0], ids[len(ids) // 2], ids[-1]}:
            theirs = config_of[entry.conversion_func](entry.repo_id, entry.saes_map[sae_id], "cpu")
            ours = find_release(release, sae_id).metadata
            for name in ("hook_name", "hook_name_out", "model_name", "context_size", "prepend_bos", "dataset_path"):
                assert ours.get(name) == theirs.get(name), (release, sae_id, name)
            by_path = find_release(entry.repo_id, entry.saes_map[sae_id]).metadata
            assert by_path["hook_name"] == theirs["hook_name"]
            seen += 1
    assert seen > 20


@pytest.mark.slow
def test_saelens_opens_what_we_upload(tmp_path: Path):
    sae = drawn("jumprelu").requires_grad_(False)
    sae.save_model(tmp_path / "sae", sparsity=torch.full((sae.cfg.d_sae,), -2.0))
    script = f"""
import json, warnings
warnings.simplefilter("ignore")
from mechint import upload_saes_to_huggingface
upload_saes_to_huggingface({{"three": {str(tmp_path / "sae")!r}}}, "tester/saes")
from sae_lens import SAE
sae, cfg, sparsity = SAE.from_pretrained_with_cfg_and_sparsity("tester/saes", "three")
print(json.dumps([float(sae.W_enc.sum()), float(sae.threshold.sum()), cfg["architecture"], float(sparsity.mean())]))
"""
    with LoopbackHub(tmp_path / "hub") as hub:
        env = hub.env(tmp_path / "hf", token=hub.token)
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found[2] == "jumprelu" and found[3] == -2.0
    assert found[:2] == pytest.approx([float(sae.W_enc.sum()), float(sae.threshold.sum())], rel=1e-6)


def test_every_name_of_its_class_is_here_or_says_what_does_the_same(tmp_path: Path):
    """Its caches too: the same names, the same numbers, from one file."""
    from sae_lens import SAE as Theirs  # pyright: ignore[reportMissingImports]

    from mechint.sae.elsewhere import ELSEWHERE

    ours = drawn("jumprelu")
    ours.save_model(tmp_path / "x")
    theirs = Theirs.load_from_disk(str(tmp_path / "x"))
    names = {name for name in (*dir(theirs), *vars(theirs)) if not name.startswith("_")}
    lost = sorted(name for name in names if not hasattr(ours, name) and name not in ELSEWHERE)
    assert not lost
    x = torch.randn(2, 5, D_IN, generator=torch.Generator().manual_seed(3))
    ours.use_error_term = theirs.use_error_term = True
    (out, cache), (expected, their_cache) = ours.run_with_cache(x), theirs.run_with_cache(x)
    assert_same(out, expected)
    assert set(cache) == set(their_cache)
    for name, value in cache.items():
        assert_same(value, their_cache[name], 1e-5)
    hooks = [("hook_sae_acts_post", lambda value, hook: value * 0.5)]
    assert_same(ours.run_with_hooks(x, fwd_hooks=hooks), theirs.run_with_hooks(x, fwd_hooks=hooks), 1e-5)
    assert_same(ours.process_sae_in(x), theirs.process_sae_in(x))
