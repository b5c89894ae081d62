"""An SAE of a training run of this machine: imported as the guide prints it, its features, its report."""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")


import torch
from live_server import SAES, Server
from loopback_hub import LoopbackHub
from small_run import make_small_run
from test_server_api import TOKEN, USER, printed

from mechint.analysis import load_latents, logit_effects
from mechint.config import ReportConfig
from mechint.models import load_model
from mechint.report.html import make_report
from mechint.runs import Run
from mechint.sae import load_sae

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path_factory.mktemp("hub"), user=USER, token=TOKEN) as found:
        yield found


@pytest.fixture(scope="module")
def server(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its runs folder has the run `train_abc123` with its report."""
    folder = tmp_path_factory.mktemp("server")
    run = make_small_run(folder)
    run.path.rename(run.path.with_name("train_abc123"))
    make_report(ReportConfig(runs=(run.path.with_name("train_abc123"),), figures=False, device="cpu"))
    with Server(folder, env=hub.env(folder / "hf"), workers=1) as found:
        yield found


@pytest.fixture(scope="module")
def imported(server: Server) -> dict[str, Any]:
    before = server.get(f"{SAES}/training/train_abc123/available").json()
    assert before["total_count"] == 1 and before["imported_saes"] == [] and before["training_id"] == "train_abc123"
    assert before["available_saes"][0].keys() == {"layer", "hook_type", "path", "size_bytes"}
    assert before["available_saes"][0]["size_bytes"] > 0
    reply = server.post(
        f"{SAES}/import/training",
        printed("""{
          "training_id": "train_abc123",
          "name": "My Trained SAE",
          "description": "SAE trained on custom dataset"
        }"""),
    )
    assert reply.status == 202, reply.text
    found = reply.json()
    assert found["imported_count"] == 1 and found["training_id"] == "train_abc123" and found["message"]
    assert [sae["id"] for sae in found["saes"]] == found["sae_ids"]
    sae = server.wait_sae(found["sae_ids"][0])
    assert (sae["name"], sae["description"]) == ("My Trained SAE", "SAE trained on custom dataset")
    assert sae["source"] == "trained" and sae["training_id"] == "train_abc123" and sae["d_model"] == 128
    after = server.get(f"{SAES}/training/train_abc123/available").json()
    assert [one["sae_id"] for one in after["imported_saes"]] == [sae["id"]]
    assert after["imported_saes"][0].keys() == {"layer", "hook_type", "sae_id", "sae_name", "imported_at"}
    return sae


def test_features_are_those_of_the_runs_analysis(server: Server, imported: dict[str, Any]):
    run = Run(server.runs_root / "train_abc123")
    latents, _ = load_latents(run.path)
    found = server.get(f"{SAES}/{imported['id']}/features?limit=1000").json()
    assert found["n_features"] == latents.d_sae == len(found["features"]) and found["analysed"] and not found["note"]
    for feature in found["features"]:
        i = feature["feature_idx"]
        assert feature["activation_count"] == int(latents.counts[i])
        assert feature["density"] == pytest.approx(float(latents.density[i]))
        assert feature["max_activation"] == pytest.approx(float(latents.max[i]))
        assert bool(feature["top_tokens"]) == (int(latents.counts[i]) > 0)
        assert feature["feature_id"] == f"{imported['id']}:{i}" and feature["layer"] == imported["layer"]
    alive = [feature for feature in found["features"] if feature["top_tokens"]]
    assert len(alive) > 50 and all(feature["label"] for feature in alive)
    by_density = server.get(f"{SAES}/{imported['id']}/features?sort_by=density&limit=3").json()["features"]
    assert [f["density"] for f in by_density] == sorted((f["density"] for f in found["features"]), reverse=True)[:3]
    token = max(alive, key=lambda feature: len(feature["top_tokens"][0].strip()))["top_tokens"][0].strip()
    hits = server.get(f"{SAES}/{imported['id']}/features?search={token.upper()}&limit=1000").json()
    expected = [
        feature["feature_idx"]
        for feature in found["features"]
        if any(token.casefold() in word.casefold() for word in (*feature["top_tokens"], feature["label"] or ""))
    ]
    assert expected and [feature["feature_idx"] for feature in hits["features"]] == expected
    assert hits["pagination"]["total"] == len(expected)
    assert server.get(f"{SAES}/{imported['id']}/features?search=no-such-token-anywhere").json()["features"] == []


def test_one_feature_in_full(server: Server, imported: dict[str, Any]):
    run = Run(server.runs_root / "train_abc123")
    latents, _ = load_latents(run.path)
    feature = int(latents.counts.argmax())
    found = server.get(f"{SAES}/{imported['id']}/features/{feature}").json()
    assert found["notes"] == [] and len(found["contexts"]) == 10
    for context, value in zip(found["contexts"], latents.top_values[feature].tolist(), strict=False):
        assert len(context["tokens"]) == len(context["values"]) and all(context["tokens"])
        assert context["activation"] == pytest.approx(value)
        assert context["values"][context["center"]] == pytest.approx(value, rel=1e-4)
    sae, model = load_sae(run.checkpoint_path), load_model("builtin/pythia-tiny", device="cpu")
    effects = logit_effects(sae, model, k=10, latents=torch.tensor([feature]))
    assert [one["effect"] for one in found["promoted"]] == pytest.approx(effects.promoted_effect[0].tolist(), rel=1e-4)
    assert found["promoted"][0]["token"] == model.tokenizer.decode([int(effects.promoted[0, 0])])
    assert all(one["effect"] < 0 for one in found["suppressed"])
    assert sum(found["histogram"]) == int(latents.counts[feature])
    assert len(found["histogram_edges"]) == len(found["histogram"]) + 1
    silent = (latents.counts == 0).nonzero().flatten().tolist()
    if silent:
        quiet = server.get(f"{SAES}/{imported['id']}/features/{silent[0]}").json()
        assert quiet["contexts"] == [] and quiet["histogram"] == [] and quiet["label"] is None


def test_its_report_is_served(server: Server, imported: dict[str, Any]):
    reply = server.get(f"{SAES}/{imported['id']}/report")
    assert reply.status == 200 and reply.body == (server.runs_root / "train_abc123" / "report.html").read_bytes()
    assert reply.headers["content-security-policy"].startswith("sandbox allow-scripts;")


def test_without_the_runs_analysis_a_note_says_how_to_get_it(server: Server, imported: dict[str, Any]):
    """The figures appear and go with the run's files; nothing is kept from before."""
    record = server.runs_root / "train_abc123" / "latents.json"
    record.rename(record.with_suffix(".away"))
    found = server.get(f"{SAES}/{imported['id']}/features?limit=1").json()
    record.with_suffix(".away").rename(record)
    assert not found["analysed"] and "mechint report train_abc123" in found["note"]
    assert found["features"][0]["activation_count"] is None
    assert server.get(f"{SAES}/{imported['id']}/features?limit=1").json()["analysed"]


def test_published_as_a_bundle(server: Server, imported: dict[str, Any], hub: LoopbackHub):
    pytest.importorskip("mechint.hub")
    asked = {"repo_id": f"{USER}/bundle", "create_repo": True, "access_token": TOKEN, "license": "mit"}
    assert server.post(f"{SAES}/sae_000000000000/publish", asked).status == 404
    assert server.post(f"{SAES}/{imported['id']}/publish", {"repo_id": "no-slash"}).status == 422
    reply = server.post(f"{SAES}/{imported['id']}/publish", asked)
    assert reply.status == 202, reply.text
    assert reply.json()["url"] == f"{hub.endpoint}/{USER}/bundle"
    result = server.wait_job(reply.json()["job_id"])["result"]
    assert result["commit_hash"] == hub.history(f"{USER}/bundle")[0].sha
    files = hub.files(f"{USER}/bundle")
    assert {"README.md", "bundle_metadata.json", "cfg.json", "sae_weights.safetensors", "manifest.json"} <= files.keys()
    assert b"train_abc123" in files["README.md"] and b"license: mit" in files["README.md"]
    assert not any(TOKEN.encode() in data or str(server.data_dir).encode() in data for data in files.values())
    again = server.post(f"{SAES}/{imported['id']}/publish", asked).json()
    done = server.wait_job(again["job_id"])
    assert done["result"]["commit_hash"] == result["commit_hash"] and "same content" in done["message"]
    refused = server.post(f"{SAES}/{imported['id']}/publish", asked | {"repo_id": "other/bundle"}).json()
    error = server.wait_job(refused["job_id"], state="error")
    assert "other" in error["error"] and TOKEN not in str(error)
