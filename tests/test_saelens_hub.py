"""Releases and repositories on a loopback Hub, and the feature export of a real small run."""

import importlib.util
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
from mechint.data import open_activations
from mechint.errors import MechintError
from mechint.formats.convert import find_format, held_variant
from mechint.sae import load_sae
from mechint.saelens import neuronpedia_features

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
    sae = drawn("jumprelu").requires_grad_(False)
    sae.save_model(tmp_path / "repo" / "layer_3" / "a", sparsity=torch.full((D_SAE,), -2.0))
    (tmp_path / "repo" / "layer_3" / "a" / "optimizer.bin").write_bytes(b"0" * 1000)
    scaled = drawn()
    (tmp_path / "repo" / "scaled").mkdir()
    save_file(scaled.weights(), tmp_path / "repo" / "scaled" / "sae_weights.safetensors")
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
    # other formats in a repository: a folder, and a file of a name of its own
    for at, name, loaded in (
        ("scope/params.npz", "gemma_scope", drawn("jumprelu", apply_b_dec_to_input=False)),
        ("pt/layer_3.pt", "openai", drawn()),
    ):
        (tmp_path / "repo" / at).parent.mkdir()
        target = find_format(name, to=True)
        assert target.write is not None
        target.write(held_variant(loaded, target)[0], tmp_path / "repo" / at)
    script = """
    one = SAE.from_pretrained("lab/saes", "layer_3/a")
    out["others"] = [SAE.from_pretrained("lab/saes", id).cfg.architecture for id in ("scope", "pt/layer_3.pt")]
    first, cfg, sparsity = SAE.from_pretrained(release="mine", sae_id="three", device="cpu")
    out["same"] = all(torch.equal(a, b) for a, b in zip(one.parameters(), first.parameters(), strict=True))
    out["sum"], out["sparsity"] = float(one.W_enc.sum()), sparsity.tolist()[:2]
    out["id"], out["hook"] = first.cfg.neuronpedia_id, cfg["metadata"]["hook_name"]
    scaled = SAE.from_pretrained("mine", "scaled")
    out["scaled"] = [float(scaled(torch.ones(1, 16)).sum()), float(scaled(torch.ones(1, 16))[0].sum())]
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
    assert found["others"] == ["jumprelu", "standard"]
    assert found["same"] and found["sum"] == pytest.approx(float(sae.W_enc.sum()))
    assert (found["sparsity"], found["id"], found["hook"]) == ([-2.0, -2.0], "pythia-70m/3-mine", HOOK)
    # the factor of the release scales the input, and folds
    x = torch.ones(1, 16)
    by_hand = drawn().requires_grad_(False)(0.25 * x).sum() / 0.25
    assert found["scaled"] == pytest.approx([float(by_hand)] * 2, rel=1e-4)
    assert "layer_3/a" in errors["id"] and "at its root" in errors["root"] and "lab/sae" in errors["repo"]
    assert "norm_scaling_factor" in errors["scale"]
    # the Hub is gone: what was downloaded opens, the rest says what is missing
    gone = env | {"HF_ENDPOINT": closed_endpoint()}
    again = run(
        """
        out["sum"] = float(SAE.from_pretrained("mine", "three").W_enc.sum())
        out["file"] = SAE.from_pretrained("lab/saes", "pt/layer_3.pt").cfg.architecture
        out["told"] = error(lambda: SAE.from_pretrained("lab/other", "x"))
        """,
        gone,
    )
    assert again["sum"] == found["sum"] and again["file"] == "standard" and "cannot be reached" in again["told"]


@pytest.mark.slow
def test_an_upload_is_one_commit_and_keeps_the_token(tmp_path: Path):
    drawn("topk").save_model(tmp_path / "folder")
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
    assert "hf_wrong" not in found["told"] and "hf auth login" in found["told"] and found["again"] == 5
    assert files["README.md"].count(b"- `") == 2  # written once, by the first call
    assert hub.token.encode() not in b"".join(files.values())


# The JSON of sae-dashboard 0.8.0, neuronpedia/neuronpedia_dashboard.py: keys and types of a batch file.
EXAMPLE = {
    **dict.fromkeys(("bin_min", "bin_max", "bin_contains"), float),
    "tokens": [str],
    "values": [float],
    "qualifying_token_index": int,
}
FEATURE = {
    **dict.fromkeys(("feature_index", "n_prompts_total", "n_tokens_in_prompt"), int),
    **dict.fromkeys(("neuron_alignment_indices", "correlated_neurons_indices", "correlated_features_indices"), [int]),
    **{f"{of}_{kind}": [float] for of in ("correlated_neurons", "correlated_features") for kind in ("l1", "pearson")},
    **dict.fromkeys(("neuron_alignment_values", "neuron_alignment_l1", "neg_values", "pos_values"), [float]),
    **dict.fromkeys(("neg_str", "pos_str"), [str]),
    **{f"{of}_hist_data_bar_{part}": [float] for of in ("freq", "logits") for part in ("values", "heights")},
    **dict.fromkeys(("decoder_weights_dist", "vector"), [float]),
    "frac_nonzero": float,
    "dataset": str,
    "activations": [EXAMPLE],
}
BATCH = {"model_id": str, "layer": int, "sae_set": str, "sae_id_suffix": str, "features": [FEATURE]}


def assert_has_shape(value: Any, shape: Any) -> None:
    """Exactly these keys, with values of these types (a whole number is a float too, as JSON has it)."""
    if isinstance(shape, dict):
        assert isinstance(value, dict) and value.keys() == shape.keys()
        for name, part in shape.items():
            assert_has_shape(value[name], part)
    elif isinstance(shape, list):
        assert isinstance(value, list)
        for item in value:
            assert_has_shape(item, shape[0])
    else:
        assert isinstance(value, (int, float) if shape is float else shape) and not isinstance(value, bool)


def read_by_saedashboard(folder: Path, pages: list[dict[str, Any]]) -> None:
    """Where sae-dashboard is installed (`pip install --no-deps` is enough): its own classes hold all of it."""
    found = importlib.util.find_spec("sae_dashboard")
    if found is None or found.origin is None:
        return
    modules = []
    for name in ("neuronpedia_dashboard", "neuronpedia_runner_config"):  # alone: the package imports what it shows with
        file = Path(found.origin).parent / "neuronpedia" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        modules.append(importlib.util.module_from_spec(spec))
        sys.modules[name] = modules[-1]
        spec.loader.exec_module(modules[-1])
    for page in pages:
        assert modules[0].NeuronpediaDashboardBatch(**page).to_dict() == page
    modules[1].NeuronpediaRunnerConfig(**json.loads((folder / "run_settings.json").read_text()))


def encode(sae: Any, activations: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([sae.encode(batch.float()) for batch in activations.batches(512)])


@pytest.mark.slow
def test_features_are_exported_as_dashboards_read_them(tmp_path: Path):
    small = make_small_run(tmp_path)
    files = neuronpedia_features(
        small.path, tmp_path / "out", sae_id="pythia-tiny/3-mine__l0-9", latents=[3, 5, 7], batch=2
    )
    assert [file.name for file in files] == ["batch-0.json", "batch-1.json"]
    pages = [json.loads(file.read_text()) for file in files]
    assert [(page["model_id"], page["layer"], page["sae_set"]) for page in pages] == [("pythia-tiny", 3, "mine")] * 2
    assert [page["sae_id_suffix"] for page in pages] == ["l0-9"] * 2
    for page in pages:
        assert_has_shape(page, BATCH)
    features = [feature for page in pages for feature in page["features"]]
    assert [feature["feature_index"] for feature in features] == [3, 5, 7]
    latents = load_or_gather(small)
    sae, activations = load_sae(small.path), open_activations(small.activations_path())
    for feature in features:
        latent = feature["feature_index"]
        strongest = feature["activations"][0]
        assert strongest["bin_min"] == strongest["bin_contains"] == -1
        assert strongest["bin_max"] == pytest.approx(float(latents.max[latent]), abs=1e-3)
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
                assert example["bin_contains"] == pytest.approx(float(latents.density[latent]) / 5)
        others = feature["correlated_features_indices"]
        assert others and feature["correlated_features_pearson"] == sorted(
            feature["correlated_features_pearson"], reverse=True
        )
        fires = encode(sae, activations) > 0
        for other, phi, cosine in zip(
            others, feature["correlated_features_pearson"], feature["correlated_features_l1"], strict=True
        ):
            a, b = fires[:, latent].double(), fires[:, other].double()
            assert phi == pytest.approx(float(torch.corrcoef(torch.stack([a, b]))[0, 1]), abs=2e-3)
            assert cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=2e-3)
        assert (feature["n_prompts_total"], feature["dataset"]) == (activations.info["n_texts"], "builtin/tales")
    settings = json.loads((tmp_path / "out" / "run_settings.json").read_text())
    assert (settings["model_id"], settings["layer"], settings["n_prompts_total"]) == (
        "pythia-tiny",
        3,
        activations.info["n_texts"],
    )
    skipped = json.loads((tmp_path / "out" / "skipped_indexes.json").read_text())
    assert skipped["skipped_indexes"] == (latents.counts == 0).nonzero().flatten().tolist()
    assert str(tmp_path) not in json.dumps([settings, skipped])
    read_by_saedashboard(tmp_path / "out", pages)
    with pytest.raises(MechintError, match="not overwritten"):
        neuronpedia_features(small.path, tmp_path / "out", sae_id="pythia-tiny/3-mine")
    with pytest.raises(MechintError, match="latent 9999"):
        neuronpedia_features(small.path, tmp_path / "other", sae_id="pythia-tiny/3-mine", latents=[9999])
