"""The sharing API: the documented requests, run as printed against a loopback Hub, and what is beyond them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

import torch
from live_server import SAES, Server
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file

from mechint.sae import load_sae

# The documents' example token; the loopback Hub knows it as its user's.
TOKEN, USER = "hf_xxxxx", "username"
REPO = "jbloom/GPT2-Small-SAEs"
SAE_FIELDS = {
    "id", "name", "description", "source", "status", "hf_repo_id", "hf_filepath", "hf_revision", "training_id",
    "model_name", "model_id", "layer", "hook_type", "n_features", "d_model", "architecture", "format", "local_path",
    "file_size_bytes", "progress", "error_message", "sae_metadata", "created_at", "updated_at", "downloaded_at",
}  # fmt: skip


def saelens_folder(folder: Path, *, d_in: int = 768, d_sae: int = 24, layer: int = 6, seed: int = 0) -> Path:
    """A folder in SAELens's layout with random weights, as those of jbloom are described."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.randn(d_sae, d_in, generator=generator)
    decoder /= decoder.norm(dim=1, keepdim=True)
    tensors = {
        "W_enc": decoder.T.contiguous() + 0.01 * torch.randn(d_in, d_sae, generator=generator),
        "b_enc": torch.randn(d_sae, generator=generator) * 0.1,
        "W_dec": decoder,
        "b_dec": torch.randn(d_in, generator=generator) * 0.1,
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.linspace(-4, -1, d_sae)}, folder / "sparsity.safetensors")
    cfg = {
        "architecture": "standard",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.12",
            "model_name": "gpt2-small",
            "hook_name": f"blocks.{layer}.hook_resid_pre",
            "neuronpedia_id": f"gpt2-small/{layer}-res-jb",
        },
    }
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def printed(text: str) -> dict[str, Any]:
    """A request's body as the guide prints it, without its comments."""
    return json.loads(re.sub(r"//.*", "", text))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    folder = tmp_path_factory.mktemp("hub")
    for layer in (0, 6, 10):
        saelens_folder(folder / "repo" / f"layer_{layer}", layer=layer, seed=layer)
    saelens_folder(folder / "repo" / "layer_1", layer=1, d_in=64)
    (folder / "repo" / "README.md").write_text(
        "---\nlicense: mit\n---\n# GPT2-Small SAEs\n\nSAEs trained on GPT-2 Small\n"
    )
    (folder / "repo" / "no_config").mkdir()
    weights = (folder / "repo" / "layer_0" / "sae_weights.safetensors").read_bytes()
    (folder / "repo" / "no_config" / "sae_weights.safetensors").write_bytes(weights)
    with LoopbackHub(folder, user=USER, token=TOKEN) as found:
        found.add_repo(REPO, folder / "repo")
        found.add_repo(f"{USER}/private", folder / "repo", private=True)
        found.add_repo("other/gated", folder / "repo", gated=True)
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the operator allows imports from, with one SAE in it."""
    root = tmp_path_factory.mktemp("files")
    saelens_folder(root / "my_sae", layer=6)
    return root


@pytest.fixture(scope="module")
def server(hub: LoopbackHub, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with Server(
        folder, env=hub.env(folder / "hf"), settings={"IMPORT_ROOTS": str(files)}, workers=1
    ) as found:  # fmt: skip
        yield found


@pytest.fixture(scope="module")
def downloaded(server: Server) -> dict[str, Any]:
    """Layer 6, downloaded as the guide prints it."""
    reply = server.post(
        f"{SAES}/download",
        printed("""{
          "repo_id": "jbloom/GPT2-Small-SAEs",
          "filepath": "layer_6",
          "name": "GPT2 Layer 6 SAE",
          "description": "SAE for layer 6 residual stream",
          "model_name": "gpt2"
        }"""),
    )
    assert reply.status == 202, reply.text
    first = reply.json()
    assert first.keys() == SAE_FIELDS and first["status"] == "pending" and first["progress"] == 0
    assert re.fullmatch("sae_[0-9a-f]{12}", first["id"])
    return server.wait_sae(first["id"])


# --- the guide's blocks -----------------------------------------------------------------------------------------------


def test_preview_as_printed(server: Server, hub: LoopbackHub):
    reply = server.post(
        f"{SAES}/hf/preview",
        printed("""{
          "repo_id": "jbloom/GPT2-Small-SAEs",
          "access_token": "hf_xxxxx"  // Optional, for private repos
        }"""),
    )
    assert reply.status == 200, reply.text
    found = reply.json()
    assert list(found) == [
        "repo_id", "repo_type", "description", "files", "sae_files", "sae_paths", "model_name", "total_size_bytes",
    ]  # fmt: skip
    assert found["repo_id"] == REPO and found["repo_type"] == "model" and found["model_name"] == "gpt2"
    assert found["description"] == "SAEs trained on GPT-2 Small"
    assert found["sae_paths"] == ["layer_0", "layer_1", "layer_6", "layer_10", "no_config"]
    sizes = {path: len(data) for path, data in hub.files(REPO).items()}
    assert {file["filepath"]: file["size_bytes"] for file in found["files"]} == sizes
    assert found["total_size_bytes"] == sum(sizes.values())
    assert {file["filepath"] for file in found["sae_files"]} == sizes.keys() - {"README.md", ".gitattributes"}
    assert all(file["is_sae"] for file in found["sae_files"])


def test_download_as_printed(server: Server, downloaded: dict[str, Any], hub: LoopbackHub):
    found = downloaded
    assert found["name"] == "GPT2 Layer 6 SAE" and found["description"] == "SAE for layer 6 residual stream"
    assert found["source"] == "huggingface" and found["hf_repo_id"] == REPO and found["hf_filepath"] == "layer_6"
    assert (found["layer"], found["d_model"], found["n_features"]) == (6, 768, 24)
    assert found["model_name"] == "gpt2" and found["architecture"] == "standard" and found["hook_type"] == "residual"
    assert found["format"] == "community_standard" and found["progress"] == 100 and found["error_message"] is None
    folder = server.data_dir / found["local_path"]
    kept = {path.name: path.read_bytes() for path in (folder / "original").rglob("*") if path.is_file()}
    theirs = {path.rsplit("/")[-1]: data for path, data in hub.files(REPO).items() if path.startswith("layer_6/")}
    assert kept == theirs, "the originals are kept as they came, and those of layer_6 only"
    certificate = json.loads((folder / "sae" / "certificate.json").read_text())
    assert certificate["holds"]
    theirs = load_file(folder / "original" / "sae_weights.safetensors")
    ours = load_sae(folder / "sae" / "checkpoint.pt")
    assert torch.equal(ours.W_dec, theirs["W_dec"]) and torch.equal(ours.b_enc, theirs["b_enc"])


def test_upload_as_printed(server: Server, downloaded: dict[str, Any], hub: LoopbackHub):
    body = printed("""{
      "sae_id": "sae_abc123",
      "repo_id": "username/my-sae",
      "filepath": "layer_6",
      "access_token": "hf_xxxxx",
      "create_repo": true,
      "private": false,
      "commit_message": "Initial upload"
    }""")
    assert server.post(f"{SAES}/upload", body).status == 404, "as printed, the id is that of nobody"
    reply = server.post(f"{SAES}/upload", body | {"sae_id": downloaded["id"]})
    assert reply.status == 202, reply.text
    found = reply.json()
    assert {"sae_id", "repo_id", "filepath", "url", "commit_hash"} <= found.keys()
    assert found["url"] == f"{hub.endpoint}/username/my-sae/tree/main/layer_6" and found["commit_hash"] is None
    result = server.wait_job(found["job_id"])["result"]
    newest = hub.history("username/my-sae")[0]
    assert result["commit_hash"] == newest.sha and newest.title == "Initial upload"
    files = hub.files("username/my-sae")
    assert {"layer_6/cfg.json", "layer_6/sae_weights.safetensors"} <= files.keys()
    assert json.loads(files["layer_6/cfg.json"])["d_in"] == 768
    assert server.sae(downloaded["id"])["status"] == "ready"


def test_import_file_as_printed(server: Server, files: Path):
    body = printed("""{
      "file_path": "/data/saes/my_sae",
      "name": "Local SAE",
      "format": "saelens",
      "model_name": "gpt2",
      "layer": 6
    }""")
    refused = server.post(f"{SAES}/import/file", body)
    assert refused.status == 400 and "File not found: /data/saes/my_sae" in refused.json()["detail"]
    reply = server.post(f"{SAES}/import/file", body | {"file_path": str(files / "my_sae")})
    assert reply.status == 202, reply.text
    assert reply.json()["format"] == "community_standard", "saelens is another name of it"
    found = server.wait_sae(reply.json()["id"])
    assert (found["name"], found["source"], found["layer"], found["model_name"]) == ("Local SAE", "local", 6, "gpt2")
    assert found["d_model"] == 768


@pytest.mark.parametrize(
    "d_model, model",
    [
        (768, "gpt2"),
        (1024, "gpt2-medium"),
        (1280, "gpt2-large"),
        (1600, "gpt2-xl"),
        (2048, "google/gemma-2b"),
        (4096, "meta-llama/Llama-2-7b"),
    ],
)
def test_the_printed_model_table_is_a_hint(server: Server, d_model: int, model: str):
    found = server.get(f"{SAES}/model-hint?d_model={d_model}").json()
    assert found["model_name"] == model and found["candidates"][0] == model
    if d_model in (768, 1024, 2048, 4096):
        assert found["ambiguous"] and len(found["candidates"]) > 1 and "hint" in found["note"]


def test_the_printed_errors(server: Server, hub: LoopbackHub):
    """Each with its name, its remedy, and the status of what it is."""
    reply = server.post(f"{SAES}/hf/preview", {"repo_id": "no/such"})
    assert reply.status == 404
    assert reply.json() == {
        "detail": "Repository not found: no/such",
        "code": "repository_not_found",
        "remedy": "check repo_id, provide access_token",
    }
    assert server.post(f"{SAES}/hf/preview", {"repo_id": f"{USER}/private"}).status == 404
    assert server.post(f"{SAES}/hf/preview", {"repo_id": f"{USER}/private", "access_token": TOKEN}).status == 200

    hub.fail_next(1, 429, match="GET /api/models", headers={"Retry-After": "17"})
    reply = server.post(f"{SAES}/hf/preview", {"repo_id": REPO})
    assert reply.status == 429 and reply.headers["retry-after"] == "17"
    assert reply.json()["detail"].startswith("Rate limit exceeded") and reply.json()["retry_after"] == 17
    assert "wait 17 seconds and retry, use access_token" in reply.json()["remedy"]
    hub.fail_next(1, 503, match="GET /api/models")
    assert server.post(f"{SAES}/hf/preview", {"repo_id": REPO}).status == 502

    for asked, error, remedy in (
        ({"repo_id": "no/such", "filepath": "."}, "Repository not found", "check repo_id, provide access_token"),
        ({"repo_id": REPO, "filepath": "no_config"}, "Config file not found", "check SAE format compatibility"),
        (
            {"repo_id": REPO, "filepath": "layer_1", "model_name": "gpt2"},
            "Dimension mismatch",
            "verify model_name matches SAE",
        ),
    ):
        reply = server.post(f"{SAES}/download", asked)
        if reply.status == 202:
            found = server.wait_sae(reply.json()["id"], status="error")
            told = found["error_message"]
        else:
            told = f"{reply.json()['detail']}: {reply.json()['remedy']}"
        assert error in told and remedy in told, (asked, told)


# --- the rest of the interface ----------------------------------------------------------------------------------------


def test_list_pages_filters_and_sorts(server: Server, downloaded: dict[str, Any]):
    everything = server.get(f"{SAES}?limit=100").json()
    assert everything["pagination"] == {
        "skip": 0, "limit": 100, "total": len(everything["data"]), "has_more": False,
    }  # fmt: skip
    assert all(sae.keys() == SAE_FIELDS for sae in everything["data"])
    created = [sae["created_at"] for sae in everything["data"]]
    assert created == sorted(created, reverse=True)
    page = server.get(f"{SAES}?limit=1").json()
    assert len(page["data"]) == 1 and page["pagination"]["has_more"] == (len(created) > 1)
    found = server.get(f"{SAES}?search=layer%206%20sae&source=huggingface&status=ready&model_name=gpt2").json()
    assert [sae["id"] for sae in found["data"]] == [downloaded["id"]]
    assert server.get(f"{SAES}?search=%25").json()["data"] == [], "% stands for itself"
    by_name = [sae["name"] for sae in server.get(f"{SAES}?sort_by=name&order=asc").json()["data"]]
    assert by_name == sorted(by_name)
    for wrong in ("status=done", "source=web", "sort_by=token_cipher", "sort_by=__class__", "order=up"):
        reply = server.get(f"{SAES}?{wrong}")
        assert reply.status == 400 and reply.json()["code"] == "bad_request", wrong
    for wrong in ("skip=-1", "limit=0", "limit=101", f"skip={2**70}", "search=%00"):
        assert server.get(f"{SAES}?{wrong}").status == 422, wrong


def test_pages_are_kept_until_the_database_changes_and_no_longer(tmp_path: Path):
    """Whoever changes it: another connection here stands for another process."""
    from mechint.server.db import Database
    from mechint.server.models import Base, SharedSAE
    from mechint.server.unchanged import Unchanged

    here, elsewhere = (Database(f"sqlite:///{tmp_path / 'x.db'}") for _ in range(2))
    Base.metadata.create_all(here.engine)
    pages = Unchanged(here)

    def change(database: Database, name: str) -> None:
        with database.write() as session:
            session.add(SharedSAE(name=name, source="local"))

    mark = pages.mark()
    assert mark is not None and pages.get("page", mark) is None
    pages.keep("page", mark, b"old")
    assert pages.get("page", pages.mark()) == b"old" and pages.get("other", pages.mark()) is None
    for number, database in enumerate((here, elsewhere, here)):
        change(database, f"{number}")
        assert pages.get("page", pages.mark()) is None, "it has changed"
        pages.keep("page", pages.mark(), b"new")
        assert pages.get("page", pages.mark()) == b"new"
    before = pages.mark()
    change(elsewhere, "while an answer was made")
    pages.keep("page", before, b"late")
    assert pages.get("page", pages.mark()) is None
    pages.close()
    assert pages.mark() is None


def test_unknown_ids(server: Server):
    for path in ("sae_000000000000", "nonsense", "sae_%00", "..%2f..%2fetc"):
        for reply in (server.get(f"{SAES}/{path}"), server.delete(f"{SAES}/{path}")):
            assert reply.status == 404, (path, reply.text)
    assert server.get(f"{SAES}/sae_000000000000").json()["detail"] == "SAE not found: sae_000000000000"
    assert server.get(f"{SAES}/jobs/job_000000000000").status == 404
    assert server.get(f"{SAES}/training/no-such-run/available").status == 404


def test_fields_are_checked(server: Server):
    for path, body in (
        ("hf/preview", {"repo_id": "no-slash"}),
        ("hf/preview", {"repo_id": "a/b" * 200}),
        ("download", {"repo_id": REPO}),
        ("download", {"repo_id": REPO, "filepath": "../x"}),
        ("download", {"repo_id": REPO, "filepath": "/etc/passwd"}),
        ("download", {"repo_id": REPO, "filepath": "x" * 1001}),
        ("download", {"repo_id": REPO, "filepath": "layer_6", "name": "n" * 256}),
        ("download", {"repo_id": REPO, "filepath": "layer_6", "description": "d" * 2001}),
        ("upload", {"sae_id": "x", "repo_id": REPO, "filepath": "layer_6", "commit_message": "m" * 501}),
        ("import/file", {"file_path": "/x", "name": "x", "format": "pickle"}),
        ("import/file", {"file_path": "/x", "name": "x", "layer": -1}),
    ):
        reply = server.post(f"{SAES}/{path}", body)
        assert reply.status == 422, (path, body, reply.text)
        assert all(problem.keys() == {"loc", "msg", "type"} for problem in reply.json()["detail"])


def test_features_of_a_community_sae(server: Server, downloaded: dict[str, Any]):
    """No run of ours: density from its sparsity file, decoder directions from its weights, and the note says why."""
    found = server.get(f"{SAES}/{downloaded['id']}/features?limit=5").json()
    assert found["n_features"] == 24 and [f["feature_idx"] for f in found["features"]] == [0, 1, 2, 3, 4]
    assert found["pagination"] == {"skip": 0, "limit": 5, "total": 24, "has_more": True}
    assert found["features"][0]["density"] == pytest.approx(1e-4, rel=1e-4) and found["analysed"]
    assert found["features"][0]["neuronpedia_url"] == "https://www.neuronpedia.org/gpt2-small/6-res-jb/0"
    assert found["features"][0]["activation_count"] is None and "run" in found["note"]
    dense = server.get(f"{SAES}/{downloaded['id']}/features?sort_by=density&limit=2").json()["features"]
    assert [f["feature_idx"] for f in dense] == [23, 22]
    one = server.get(f"{SAES}/{downloaded['id']}/features?search=17").json()
    assert [f["feature_idx"] for f in one["features"]] == [17]
    detail = server.get(f"{SAES}/{downloaded['id']}/features/3").json()
    assert detail["decoder_norm"] == pytest.approx(1.0, abs=1e-5)
    assert len(detail["nearest"]) == 8 and all(near["feature_idx"] != 3 for near in detail["nearest"])
    cosines = [near["cosine"] for near in detail["nearest"]]
    assert cosines == sorted(cosines, reverse=True)
    assert server.get(f"{SAES}/{downloaded['id']}/features/24").status == 404
    assert server.get(f"{SAES}/{downloaded['id']}/features?limit=1001").status == 422


def test_compare(server: Server, downloaded: dict[str, Any]):
    other = server.post(f"{SAES}/download", {"repo_id": REPO, "filepath": "layer_10"}).json()["id"]
    waiting = server.post(f"{SAES}/compare", {"left": downloaded["id"], "right": "sae_000000000000"})
    assert waiting.status == 404
    server.wait_sae(other)
    same = server.post(f"{SAES}/compare", {"left": downloaded["id"], "right": downloaded["id"], "limit": 3}).json()
    assert same["share_mutual"] == 1 and same["share_found"] == 1 and same["median_cosine"] == pytest.approx(1)
    assert all(pair["left_feature"] == pair["right_feature"] for pair in same["highest"])
    found = server.post(f"{SAES}/compare", {"left": downloaded["id"], "right": other, "threshold": 0.9}).json()
    assert found["share_found"] == 0 and found["median_cosine"] < 0.3 and sum(found["histogram"]) == 24
    assert found["highest"][0]["cosine"] >= found["lowest"][0]["cosine"]
    narrow = server.wait_sae(server.post(f"{SAES}/download", {"repo_id": REPO, "filepath": "layer_1"}).json()["id"])
    reply = server.post(f"{SAES}/compare", {"left": downloaded["id"], "right": narrow["id"]})
    assert reply.status == 422 and reply.json()["detail"].startswith("Dimension mismatch")


def test_delete(server: Server):
    ids = [
        server.post(f"{SAES}/download", {"repo_id": REPO, "filepath": f"layer_{layer}"}).json()["id"]
        for layer in (0, 10)
    ]
    folders = [server.data_dir / server.wait_sae(sae_id)["local_path"] for sae_id in ids]
    assert all(folder.is_dir() for folder in folders)
    reply = server.post(f"{SAES}/delete", {"sae_ids": [*ids[:1], "sae_000000000000"]})
    found = reply.json()
    assert (found["deleted_count"], found["failed_count"]) == (1, 1) and found["deleted_ids"] == ids[:1]
    assert found["failed_ids"] == ["sae_000000000000"] and "SAE not found" in found["errors"]["sae_000000000000"]
    assert server.delete(f"{SAES}/{ids[1]}").json() == {"message": f"SAE {ids[1]} deleted"}
    assert not any(folder.exists() for folder in folders)
    assert server.get(f"{SAES}/{ids[0]}").status == 404 and server.delete(f"{SAES}/{ids[0]}").status == 404


def test_the_document(server: Server):
    document = server.get("/api/v1/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    for path, method in (("hf/preview", "post"), ("download", "post"), ("upload", "post"), ("{sae_id}", "get")):
        operation = document["paths"][f"{SAES}/{path}"][method]
        assert operation["summary"] and "422" in operation["responses"]
    schemas = document["components"]["schemas"]
    asked = [name for name in schemas if name.endswith("Request") and name not in ("RetryRequest", "SessionRequest")]
    assert len(asked) >= 7 and all(schemas[name].get("examples") for name in asked)
    assert schemas["DownloadRequest"]["properties"]["access_token"]["anyOf"][0]["format"] == "password"
