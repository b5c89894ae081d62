"""Releases and repositories on a loopback Hub, and the feature export of a real small run."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback_hub import LoopbackHub, closed_endpoint
from safetensors.torch import save_file
from small_run import make_small_run
from test_saelens_api import D_SAE, HOOK, drawn

from mechint.analysis import load_or_gather
from mechint.errors import MechintError
from mechint.sae import load_sae
from mechint.saelens import SAE, neuronpedia_features

PRELUDE = """
import json, sys
import torch
from mechint import SAE, upload_saes_to_huggingface
from mechint.errors import MechintError
out = {}

def error(call):
    try:
        call()
    except MechintError as told:
        return str(told)
    return "nothing was raised"
"""


def run(script: str, env: dict[str, str]) -> dict[str, Any]:
    """Run a script that fills the dict `out`, and return it."""
    code = PRELUDE + textwrap.dedent(script) + "\nprint(json.dumps(out))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_repositories_releases_and_the_cache(tmp_path: Path):
    sae = SAE(drawn("jumprelu")).requires_grad_(False)
    sae.save_model(tmp_path / "repo" / "layer_3" / "a", sparsity=torch.full((D_SAE,), -2.0))
    (tmp_path / "repo" / "layer_3" / "a" / "optimizer.bin").write_bytes(b"0" * 1000)
    scaled = drawn()
    (tmp_path / "repo" / "scaled").mkdir()
    save_file(scaled.tensors, tmp_path / "repo" / "scaled" / "sae_weights.safetensors")
    cfg = {
        "architecture": "standard",
        "d_in": scaled.d_in,
        "d_sae": D_SAE,
        "apply_b_dec_to_input": True,
        "normalize_activations": "expected_average_only_in",
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": HOOK},
    }
    (tmp_path / "repo" / "scaled" / "cfg.json").write_text(json.dumps(cfg))
    registry = {
        "mine": {
            "repo_id": "lab/saes",
            "model": "pythia-70m",
            "saes": [
                {"id": "three", "path": "layer_3/a", "neuronpedia": "pythia-70m/3-mine"},
                {"id": "scaled", "path": "scaled", "norm_scaling_factor": 0.25},
            ],
        }
    }
    (tmp_path / "mine.json").write_text(json.dumps(registry))
    script = """
    one = SAE.from_pretrained("lab/saes", "layer_3/a")
    first, cfg, sparsity = SAE.from_pretrained(release="mine", sae_id="three", device="cpu")
    out["same"] = all(torch.equal(a, b) for a, b in zip(one.parameters(), first.parameters(), strict=True))
    out["sum"], out["sparsity"] = float(one.W_enc.sum()), sparsity.tolist()[:2]
    out["id"], out["hook"] = first.cfg.neuronpedia_id, cfg["metadata"]["hook_name"]
    scaled = SAE.from_pretrained("mine", "scaled")
    out["scaled"] = [float(scaled(torch.ones(1, 16)).sum()), float(scaled.to_mechint()(torch.ones(1, 16))[0].sum())]
    """
    told = """
    out["id"] = error(lambda: SAE.from_pretrained("lab/saes", "layer_3/b"))
    out["root"] = error(lambda: SAE.from_pretrained("lab/saes"))
    out["repo"] = error(lambda: SAE.from_pretrained("lab/sae", "layer_3/a"))
    out["scale"] = error(lambda: SAE.from_pretrained("lab/saes", "scaled"))
    """
    with LoopbackHub(tmp_path / "hub", orgs=("lab",)) as hub:
        hub.add_repo("lab/saes", tmp_path / "repo")
        env = hub.env(tmp_path / "hf") | {"MECHINT_SAE_REGISTRY": str(tmp_path / "mine.json")}
        found = run(script, env)
        assert not hub.seen("GET", "optimizer.bin")  # of another's repository only the SAE is downloaded
        errors = run(told, env)
        assert not hub.seen("OUTSIDE")
    assert found["same"] and found["sum"] == pytest.approx(float(sae.W_enc.sum()))
    assert (found["sparsity"], found["id"], found["hook"]) == ([-2.0, -2.0], "pythia-70m/3-mine", HOOK)
    # the factor of the release scales the input, and folds
    x = torch.ones(1, 16)
    by_hand = SAE(drawn()).requires_grad_(False)(0.25 * x).sum() / 0.25
    assert found["scaled"] == pytest.approx([float(by_hand)] * 2, rel=1e-4)
    assert "layer_3/a" in errors["id"] and "at its root" in errors["root"] and "lab/sae" in errors["repo"]
    assert "norm_scaling_factor" in errors["scale"]
    # the Hub is gone: what was downloaded opens, the rest says what is missing
    gone = env | {"HF_ENDPOINT": closed_endpoint()}
    again = run(
        """
        out["sum"] = float(SAE.from_pretrained("mine", "three").W_enc.sum())
        out["told"] = error(lambda: SAE.from_pretrained("lab/other", "x"))
        """,
        gone,
    )
    assert again["sum"] == found["sum"] and "cannot be reached" in again["told"]


@pytest.mark.slow
def test_an_upload_is_one_commit_and_keeps_the_token(tmp_path: Path):
    SAE(drawn("topk")).save_model(tmp_path / "folder")
    script = f"""
    from pathlib import Path
    one, two = SAE.load_from_disk({str(tmp_path / "folder")!r}), SAE.load_from_disk({str(tmp_path / "folder")!r})
    upload_saes_to_huggingface(saes=[one, two], repo_id="tester/both", token="{{token}}", show_progress=False)
    upload_saes_to_huggingface({{{{"deep/path": {str(tmp_path / "folder")!r}}}}}, "tester/both", token="{{token}}")
    out["told"] = error(lambda: upload_saes_to_huggingface(saes=one, repo_id="tester/x", token="hf_wrong"))
    out["again"] = SAE.from_pretrained("tester/both", "deep/path").cfg.k
    """
    with LoopbackHub(tmp_path / "hub") as hub:
        found = run(script.format(token=hub.token), hub.env(tmp_path / "hf"))
        files, history = hub.files("tester/both"), hub.history("tester/both")
    first, second = f"{HOOK}/width_{D_SAE}", f"{HOOK}/width_{D_SAE}_2"
    assert {f"{name}/cfg.json" for name in (first, second, "deep/path")} <= set(files)
    assert len(history) <= 3  # the making of the repository, and one for each call
    assert "hf_wrong" not in found["told"] and "failed" in found["told"] and found["again"] == 5
    assert files["README.md"].count(b"- `") == 2  # written once, by the first call
    assert hub.token.encode() not in b"".join(files.values())


@pytest.mark.slow
def test_features_are_exported_as_dashboards_read_them(tmp_path: Path):
    small = make_small_run(tmp_path)
    files = neuronpedia_features(small.path, tmp_path / "out", sae_id="pythia-tiny/3-mine", latents=[3, 5, 7], batch=2)
    assert [file.name for file in files] == ["batch-0.json", "batch-1.json"]
    pages = [json.loads(file.read_text()) for file in files]
    assert [(page["model_id"], page["layer"], page["sae_set"]) for page in pages] == [("pythia-tiny", 3, "mine")] * 2
    features = [feature for page in pages for feature in page["features"]]
    assert [feature["feature_index"] for feature in features] == [3, 5, 7]
    latents = load_or_gather(small)
    sae = load_sae(small.path)
    for feature in features:
        latent = feature["feature_index"]
        strongest = feature["activations"][0]
        assert strongest["bin_min"] == strongest["bin_contains"] == -1
        at = strongest["values"][strongest["qualifying_token_index"]]
        assert at == pytest.approx(float(latents.max[latent]), abs=2e-3)
        assert len(strongest["tokens"]) == len(strongest["values"])
        assert feature["frac_nonzero"] == pytest.approx(float(latents.density[latent]))
        assert sum(feature["freq_hist_data_bar_heights"]) == int(latents.counts[latent])
        assert feature["pos_values"] == sorted(feature["pos_values"], reverse=True) and len(feature["pos_str"]) == 10
        assert feature["neg_values"][0] < 0 < feature["pos_values"][0]
        assert feature["neuron_alignment_indices"][0] == int(sae.W_dec[latent].abs().argmax())
        for example in feature["activations"]:
            if example["bin_contains"] > 0:
                value = example["values"][example["qualifying_token_index"]]
                assert example["bin_min"] - 2e-3 <= value <= example["bin_max"] + 2e-3
    with pytest.raises(MechintError, match="not overwritten"):
        neuronpedia_features(small.path, tmp_path / "out", sae_id="pythia-tiny/3-mine")
    with pytest.raises(MechintError, match="latent 9999"):
        neuronpedia_features(small.path, tmp_path / "other", sae_id="pythia-tiny/3-mine", latents=[9999])
