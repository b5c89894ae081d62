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
from test_saelens_api import D_IN, drawn

from mechint.models import load_model
from mechint.saelens import SAE, HookedSAETransformer
from mechint.saelens.releases import KNOWN, find_release
from mechint.saelens.windows import token_windows

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sae_lens") is None, reason="SAELens is not in this environment: `make test-peers`"
)

HOOK = "blocks.3.hook_resid_post"
TOKENS = torch.tensor([[0, 20, 30, 40, 50, 60], [0, 61, 52, 43, 34, 25]])
SETTINGS = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("standard", {"normalize": "sqrt_d"}),
    ("standard", {"normalize": "layer_norm"}),
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

    ours = SAE(drawn(architecture, **settings))
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
        ours = SAE(drawn(architecture))
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


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize("use_error_term", [False, True])
def test_outputs_and_caches_of_the_hooked_model_are_theirs(
    tmp_path: Path, models: tuple[HookedSAETransformer, Any], architecture: str, use_error_term: bool
):
    from sae_lens import SAE as Theirs  # pyright: ignore[reportMissingImports]

    model, their_model = models
    sae = SAE(drawn(architecture, d_in=32)).requires_grad_(False)
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


@pytest.mark.slow
def test_saelens_opens_what_we_upload(tmp_path: Path):
    sae = SAE(drawn("jumprelu")).requires_grad_(False)
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
