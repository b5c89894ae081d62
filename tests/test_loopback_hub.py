"""The loopback Hub against the real clients, each in a subprocess whose environment points at it."""

import http.client
import io
import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback_card import card_errors
from loopback_hub import Account, LoopbackHub, client_env, closed_endpoint

PYTHIA, OPENWEBTEXT = "EleutherAI/pythia-70m", "Skylion007/openwebtext"
WEIGHTS = bytes(range(256)) * 2000  # 512 kB that any lost, doubled or shifted byte changes

PRELUDE = """
import json, time, warnings
from pathlib import Path

warnings.filterwarnings("ignore")
out = {}

def outcome(call):
    \"\"\"What a call raises (or "ok"), and whether it took less than ten seconds (retries: longer).\"\"\"
    start = time.monotonic()
    try:
        call()
        name = "ok"
    except Exception as error:
        name = type(error).__name__
    return [name, time.monotonic() - start < 10]
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path, orgs=("lab",)) as hub:
        yield hub


def run(script: str, env: dict[str, str]) -> dict[str, Any]:
    """Run a script that fills the dict `out`, and return it."""
    code = PRELUDE + textwrap.dedent(script) + "\nprint(json.dumps(out))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def parquet(texts: list[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=10)
    return sink.getvalue()


def raw(hub: LoopbackHub, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def test_download_caches_and_pins_revisions(hub: LoopbackHub, tmp_path: Path) -> None:
    first = hub.add_repo(PYTHIA, {"config.json": "1", "sub/model.safetensors": WEIGHTS})
    hub.tag(PYTHIA, "v1")
    second = hub.commit(PYTHIA, {"config.json": "2"})
    script = f"""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    read = lambda **kw: Path(hf_hub_download("{PYTHIA}", "config.json", **kw)).read_text()
    out["main"], out["tag"], out["sha"] = read(), read(revision="v1"), read(revision="{first}")
    for _ in range(2):
        folder = Path(snapshot_download("{PYTHIA}"))
    out["snapshot"] = [folder.name, sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())]
    out["intact"] = (folder / "sub/model.safetensors").read_bytes() == bytes(range(256)) * 2000
    api = HfApi()
    out["shas"] = [api.model_info("{PYTHIA}").sha, api.model_info("{PYTHIA}", revision="v1").sha]
    out["refs"] = [ref.name for ref in api.list_repo_refs("{PYTHIA}").tags]
    out["history"] = [commit.commit_id for commit in api.list_repo_commits("{PYTHIA}")]
    """
    out = run(script, hub.env(tmp_path / "hf", token=hub.token))
    assert [out["main"], out["tag"], out["sha"]] == ["2", "1", "1"]
    assert out["snapshot"] == [second, ["config.json", "sub/model.safetensors"]] and out["intact"]
    assert out["shas"] == [second, first] and out["refs"] == ["v1"] and out["history"] == [second, first]
    assert len(hub.seen("GET", "/storage/")) == 1, "the second snapshot must come from the cache"
    assert all(r.headers.get("authorization") == f"Bearer {hub.token}" for r in hub.seen("GET", "/api/"))
    assert not hub.seen("OUTSIDE")


def test_shas_depend_on_content_alone(tmp_path: Path) -> None:
    shas = []
    for name, content in ("a", "x"), ("b", "x"), ("c", "y"):
        with LoopbackHub(tmp_path / name) as hub:
            shas.append([hub.add_repo(PYTHIA, {"config.json": content}), hub.commit(PYTHIA, {"more": "z"})])
    assert shas[0] == shas[1] and not set(shas[0]) & set(shas[2])


def test_listings_follow_pages(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add_repo("me/many", {f"d{i}/f{j}.txt": "x" for i in range(3) for j in range(3)}, type="dataset")
    hub.page_size = 4
    script = """
    from huggingface_hub import HfApi
    api = HfApi()
    out["all"] = [e.path for e in api.list_repo_tree("me/many", repo_type="dataset", recursive=True)]
    out["sub"] = [e.path for e in api.list_repo_tree("me/many", "d1", repo_type="dataset")]
    out["some"] = [e.path for e in api.get_paths_info("me/many", ["d1/f1.txt", "d2", "no"], repo_type="dataset")]
    """
    out = run(script, hub.env(tmp_path / "hf"))
    assert out["all"] == sorted([f"d{i}" for i in range(3)] + [f"d{i}/f{j}.txt" for i in range(3) for j in range(3)])
    assert out["sub"] == ["d1/f0.txt", "d1/f1.txt", "d1/f2.txt"] and out["some"] == ["d1/f1.txt", "d2"]
    assert len(hub.seen("GET", "/tree/main$")) == 3  # 12 entries in pages of 4


def test_errors_have_the_clients_types(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add_repo(PYTHIA, {"config.json": "{}"})
    hub.add_repo("tester/secret", {"config.json": "{}"}, private=True)
    hub.add_repo("meta/gated", {"config.json": "{}"}, gated=True)
    script = f"""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download, whoami
    for name, repo, file, revision in (
        ("repo", "no/body", "config.json", None), ("file", "{PYTHIA}", "no.json", None),
        ("revision", "{PYTHIA}", "config.json", "nope"), ("private", "tester/secret", "config.json", None),
        ("gated", "meta/gated", "config.json", None),
    ):
        out[name] = outcome(lambda: hf_hub_download(repo, file, revision=revision))[0]
    out["snapshot"] = outcome(lambda: snapshot_download("{PYTHIA}", revision="nope"))[0]
    out["info"] = outcome(lambda: HfApi().model_info("no/body"))[0]
    out["whoami"] = outcome(whoami)[0]
    """
    anonymous = run(script, hub.env(tmp_path / "anonymous"))
    signed_in = run(script, hub.env(tmp_path / "signed_in", token=hub.token))
    wrong = run(script, hub.env(tmp_path / "wrong", token="hf_wrong"))
    common = {
        "repo": "RepositoryNotFoundError",
        "file": "RemoteEntryNotFoundError",
        "revision": "RevisionNotFoundError",
        "gated": "GatedRepoError",
        "snapshot": "RevisionNotFoundError",
        "info": "RepositoryNotFoundError",
    }
    assert anonymous == common | {"private": "RepositoryNotFoundError", "whoami": "LocalTokenNotFoundError"}
    assert signed_in == common | {"private": "ok", "whoami": "ok"}
    assert set(wrong.values()) == {"HfHubHTTPError"}


def test_unreachable_hub(tmp_path: Path) -> None:
    """With HF_HUB_OFFLINE=1 nothing waits. Without it, single requests (model_info, snapshot_download) fail at once;
    hf_hub_download, list_repo_tree and load_dataset would retry for 23 s, so they are not called here."""
    script = f"""
    from huggingface_hub import HfApi, hf_hub_download, is_offline_mode, snapshot_download
    out["info"] = outcome(lambda: HfApi().model_info("{PYTHIA}"))
    out["snapshot"] = outcome(lambda: snapshot_download("{PYTHIA}"))
    if is_offline_mode():
        from datasets import load_dataset
        out["download"] = outcome(lambda: hf_hub_download("{PYTHIA}", "config.json"))
        out["dataset"] = outcome(lambda: load_dataset("{OPENWEBTEXT}", split="train", streaming=True))
    """
    assert run(script, client_env(closed_endpoint(), tmp_path / "a", offline=True)) == {
        "info": ["OfflineModeIsEnabled", True],
        "snapshot": ["LocalEntryNotFoundError", True],
        "download": ["LocalEntryNotFoundError", True],
        "dataset": ["ConnectionError", True],
    }
    assert run(script, client_env(closed_endpoint(), tmp_path / "b")) == {
        "info": ["ConnectError", True],
        "snapshot": ["LocalEntryNotFoundError", True],
    }


def test_cut_and_refused_requests_are_retried(hub: LoopbackHub, tmp_path: Path) -> None:
    large = WEIGHTS * 30  # 15 MB: the client keeps what it has in pieces of 10 MiB
    hub.add_repo(PYTHIA, {"model.safetensors": large})
    hub.fail_next(1, None, match="GET /storage/", after_bytes=12_000_000)
    script = f"""
    from huggingface_hub import hf_hub_download
    read = lambda: Path(hf_hub_download("{PYTHIA}", "model.safetensors")).read_bytes()
    out["intact"] = read() == bytes(range(256)) * 60000
    """
    assert run(script, hub.env(tmp_path / "cut"))["intact"]
    cut, resumed = hub.seen("GET", "/storage/")
    assert "range" not in cut.headers and resumed.headers["range"] == "bytes=10485760-" and resumed.status == 206

    hub.fail_next(1, 503, match="HEAD ")
    assert run(script, hub.env(tmp_path / "refused"))["intact"]
    assert [r.status for r in hub.seen("HEAD")][-2:] == [503, 302]


@pytest.mark.parametrize(
    ("asked", "status", "first", "last"),
    [
        ("bytes=0-9", 206, 0, 9),
        ("bytes=250-", 206, 250, 255),
        ("bytes=-6", 206, 250, 255),
        ("bytes=9-999", 206, 9, 255),
    ],
)
def test_ranges(hub: LoopbackHub, asked: str, status: int, first: int, last: int) -> None:
    hub.add_repo(PYTHIA, {"vocab.txt": bytes(range(256))})
    got, headers, body = raw(hub, "GET", f"/{PYTHIA}/resolve/main/vocab.txt", Range=asked)
    assert (got, body) == (status, bytes(range(first, last + 1)))
    assert headers["Content-Range"] == f"bytes {first}-{last}/256"


def test_range_past_the_end_is_refused(hub: LoopbackHub) -> None:
    hub.add_repo(PYTHIA, {"vocab.txt": "abc"})
    status, headers, _ = raw(hub, "GET", f"/{PYTHIA}/resolve/main/vocab.txt", Range="bytes=3-")
    assert status == 416 and headers["Content-Range"] == "bytes */3"


def test_stop_closes_open_connections(hub: LoopbackHub) -> None:
    hub.add_repo(PYTHIA, {"config.json": "{}"})
    connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=10)
    connection.request("GET", f"/api/models/{PYTHIA}")
    assert connection.getresponse().read()
    hub.stop()
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        connection.request("GET", f"/api/models/{PYTHIA}")
        connection.getresponse()
    with pytest.raises(ConnectionRefusedError):
        raw(hub, "GET", f"/api/models/{PYTHIA}")


def test_dataset_streams_resumes_and_splits(hub: LoopbackHub, tmp_path: Path) -> None:
    old = hub.add_repo(
        OPENWEBTEXT,
        {f"data/train-{i:05d}-of-00004.parquet": parquet([f"doc {i * 25 + j}" for j in range(25)]) for i in range(4)},
        type="dataset",
    )
    hub.commit(OPENWEBTEXT, {"data/train-00000-of-00004.parquet": parquet(["new"] * 25)}, type="dataset")
    hub.add_repo("me/jsonl", {"a.jsonl": '{"text": "one"}\n{"text": "two"}\n'}, type="dataset")
    hub.add_repo("me/txt", {"a.txt": "one\n\ntwo\n"}, type="dataset")
    hub.fail_next(1, 503, match="GET .*train-00002")
    script = f"""
    from itertools import islice
    from datasets import load_dataset
    from datasets.distributed import split_dataset_by_node
    stream = lambda name, **kw: load_dataset(name, split="train", streaming=True, **kw)
    texts = lambda ds: [row["text"] for row in ds]
    ds = stream("{OPENWEBTEXT}", revision="{old}")
    out["shards"], out["all"] = ds.num_shards, texts(ds)
    out["head"] = texts(islice(ds, 37))
    state = json.loads(json.dumps(ds.state_dict()))
    ds.load_state_dict(state)
    again = stream("{OPENWEBTEXT}", revision="{old}")
    again.load_state_dict(state)
    out["tails"] = [texts(ds), texts(again)]
    out["nodes"] = [texts(split_dataset_by_node(stream("{OPENWEBTEXT}", revision="{old}"), r, 2)) for r in (0, 1)]
    out["main"] = texts(islice(stream("{OPENWEBTEXT}"), 2))
    out["jsonl"], out["txt"] = texts(stream("me/jsonl")), texts(stream("me/txt"))
    for name, call in (
        ("missing", lambda: stream("no/body")), ("revision", lambda: stream("{OPENWEBTEXT}", revision="nope")),
        ("no files", lambda: stream("me/txt", data_files="*.parquet")),
    ):
        out[name] = outcome(call)[0]
    """
    out = run(script, hub.env(tmp_path / "hf"))
    docs = [f"doc {i}" for i in range(100)]
    assert out["shards"] == 4 and out["all"] == docs
    assert out["head"] == docs[:37] and out["tails"] == [docs[37:], docs[37:]]
    assert out["nodes"] == [docs[:25] + docs[50:75], docs[25:50] + docs[75:]]
    assert out["main"] == ["new", "new"] and out["jsonl"] == ["one", "two"] and out["txt"] == ["one", "", "two"]
    assert [out[name] for name in ("missing", "revision", "no files")] == [
        "DatasetNotFoundError",
        "DatasetNotFoundError",
        "DataFilesNotFoundError",
    ]
    assert 503 in [r.status for r in hub.seen("GET", "train-00002")]
    # Nothing but the data-set viewer of the Hub itself, asked only for an unpinned revision.
    assert {r.path.split("?")[0].rsplit("/", 1)[1] for r in hub.seen("OUTSIDE")} == {"info"}
    assert not hub.seen("OUTSIDE", f"{OPENWEBTEXT}.*{old}")


def test_publish_round_trip(hub: LoopbackHub, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    (run_folder / "sae").mkdir(parents=True)
    (run_folder / "README.md").write_text("---\nlicense: mit\n---\n# A run\n")
    (run_folder / "empty.txt").write_text("")
    (run_folder / "sae" / "sae.safetensors").write_bytes(WEIGHTS)
    hub.multipart_chunk = 200_000
    script = f"""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    api = HfApi()
    upload = lambda: api.upload_folder(repo_id="lab/run", folder_path={str(run_folder)!r}).oid
    out["me"] = api.whoami()["name"]
    create = lambda ok: outcome(lambda: api.create_repo("lab/run", private=True, exist_ok=ok))[0]
    out["create"] = [create(False), create(True), create(False)]
    first = upload()
    out["no-op"] = upload() == first
    add, delete = lambda: CommitOperationAdd("notes.md", b"hello"), CommitOperationDelete("empty.txt")
    commit = lambda **kw: api.create_commit("lab/run", [add(), delete], commit_message="notes", **kw)
    out["commit"] = [outcome(lambda: commit(parent_commit=first))[0], outcome(lambda: commit(parent_commit=first))[0]]
    api.create_tag("lab/run", tag="v1")
    api.create_branch("lab/run", branch="try")
    pr = api.create_commit("lab/run", [CommitOperationAdd("more.md", b"more")], commit_message="again", create_pr=True)
    out["pr"] = [pr.pr_revision, api.model_info("lab/run", revision="refs/pr/1").sha == pr.oid]
    out["foreign"] = outcome(lambda: api.create_repo("somebody/run"))[0]
    out["foreign upload"] = outcome(lambda: api.create_commit("{PYTHIA}", [add()], commit_message="x"))[0]
    (Path({str(run_folder)!r}) / "README.md").write_text("---\\nlicense: [mit\\n---\\n")
    out["bad card"] = outcome(upload)[0]
    out["delete"] = outcome(lambda: api.delete_repo("lab/gone", missing_ok=True))[0]
    """
    hub.add_repo(PYTHIA, {"config.json": "{}"})
    out = run(script, hub.env(tmp_path / "hf", token=hub.token))
    assert out == {
        "me": "tester",
        "create": ["ok", "ok", "HfHubHTTPError"],
        "no-op": True,
        "commit": ["ok", "HfHubHTTPError"],
        "pr": ["refs/pr/1", True],
        "foreign": "HfHubHTTPError",
        "foreign upload": "HfHubHTTPError",
        "bad card": "ValueError",
        "delete": "ok",
    }
    assert set(hub.files("lab/run")) == {".gitattributes", "README.md", "notes.md", "sae/sae.safetensors"}
    assert hub.files("lab/run", "v1")["sae/sae.safetensors"] == WEIGHTS
    assert [commit.title for commit in hub.history("lab/run")][:1] == ["notes"] and len(hub.history("lab/run")) == 3
    assert len(hub.seen("PUT", "/part/")) == 3 and 412 in [r.status for r in hub.seen("POST", "/commit/main")]
    assert hub.repos["model", "lab/run"].private and list(hub.files(PYTHIA)) == ["config.json"]


@pytest.mark.slow
def test_models_load_from_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    build = f"""
    import torch, transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, bos_token_id=0, eos_token_id=0)
    transformers.GPTNeoXForCausalLM(config).save_pretrained({str(tmp_path / "model")!r})
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(["hello world"], trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
        ).save_pretrained({str(tmp_path / "model")!r})
    """
    run(build, client_env(closed_endpoint(), tmp_path / "none", offline=True))
    sha = hub.add_repo(PYTHIA, tmp_path / "model")
    hub.commit(PYTHIA, {}, deleted=("model.safetensors",))  # `main` is broken: only the pinned revision loads
    load = f"""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    out["main"] = outcome(lambda: AutoModelForCausalLM.from_pretrained("{PYTHIA}"))[0]
    out["missing"] = outcome(lambda: AutoModelForCausalLM.from_pretrained("no/body"))[0]
    tokenizer = AutoTokenizer.from_pretrained("{PYTHIA}", revision="{sha}")
    model = AutoModelForCausalLM.from_pretrained("{PYTHIA}", revision="{sha}", attn_implementation="eager")
    local = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, attn_implementation="eager")
    tokens = torch.tensor([tokenizer("hello world").input_ids])
    with torch.no_grad():
        want = local(tokens).logits
        out["transformers"] = (model(tokens).logits - want).abs().max().item()
    """
    assert run(load, hub.env(tmp_path / "hf")) == {"main": "OSError", "missing": "OSError", "transformers": 0.0}

    hub.commit(PYTHIA, tmp_path / "model")
    bridge = f"""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformer_lens.model_bridge import TransformerBridge
    bridge = TransformerBridge.boot_transformers("{PYTHIA}", device="cpu", dtype=torch.float32)
    local = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, attn_implementation="eager")
    with torch.no_grad():
        tokens = bridge.to_tokens("hello world")
        out["bridge"] = (bridge(tokens) - local(tokens).logits).abs().max().item()
    """
    assert run(bridge, hub.env(tmp_path / "bridge")) == {"bridge": 0.0}
    assert not hub.seen("OUTSIDE")


def test_collections(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add_repo("lab/a", {"x": "1"})
    hub.add_repo("tester/b", {"x": "1"})
    script = """
    from huggingface_hub import HfApi
    api = HfApi()
    made = api.create_collection("SAEs of DINOv3", namespace="lab", description="four repos", private=True)
    out["slug"], out["url"] = made.slug, made.url.endswith(made.slug)
    out["again"] = [outcome(lambda: api.create_collection("SAEs of DINOv3", namespace="lab"))[0],
                    api.create_collection("SAEs of DINOv3", namespace="lab", exists_ok=True).slug == made.slug]
    api.add_collection_item(made.slug, "lab/a", "model", note="the first")
    api.add_collection_item(made.slug, "tester/b", "model")
    out["twice"] = [outcome(lambda: api.add_collection_item(made.slug, "lab/a", "model"))[0],
                    len(api.add_collection_item(made.slug, "lab/a", "model", exists_ok=True).items)]
    found = api.get_collection(made.slug)
    out["items"] = [[item.item_id, item.item_type, item.note] for item in found.items]
    out["listed"] = [one.title for one in api.list_collections(owner="lab")]
    out["missing"] = outcome(lambda: api.add_collection_item(made.slug, "lab/none", "model"))[0]
    out["long"] = outcome(lambda: api.create_collection("x" * 61))[0]
    out["foreign"] = outcome(lambda: api.create_collection("x", namespace="somebody"))[0]
    api.delete_collection_item(made.slug, found.items[0].item_object_id)
    out["left"] = [item.item_id for item in api.get_collection(made.slug).items]
    out["stranger"] = outcome(lambda: HfApi(token=False).get_collection(made.slug))[0]
    api.delete_collection(made.slug)
    out["gone"] = outcome(lambda: api.get_collection(made.slug))[0]
    """
    out = run(script, hub.env(tmp_path / "hf", token=hub.token))
    assert out.pop("slug").startswith("lab/saes-of-dinov3-") and out.pop("url")
    assert out == {
        "again": ["HfHubHTTPError", True],
        "twice": ["HfHubHTTPError", 2],
        "items": [["lab/a", "model", "the first"], ["tester/b", "model", None]],
        "listed": ["SAEs of DINOv3"],
        "missing": "RepositoryNotFoundError",
        "long": "BadRequestError",
        "foreign": "HfHubHTTPError",
        "left": ["tester/b"],
        "stranger": "HfHubHTTPError",
        "gone": "HfHubHTTPError",
    }


def test_tokens_have_owners_and_rights(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add_repo("alice/secret", {"x": "1"}, private=True)
    hub.accounts |= {
        "hf_alice": Account("alice", {"lab": "read"}),
        "hf_reader": Account("alice", role="read"),
        "hf_fine": Account("alice", {"lab": "write"}, role="fineGrained", scopes={"lab": ("repo.write",)}),
        "hf_old": Account("alice", expired=True),
    }
    script = """
    from huggingface_hub import HfApi
    for token in ("hf_alice", "hf_reader", "hf_fine", "hf_old", "hf_nobody", None):
        api = HfApi(token=token or False)
        out[str(token)] = [
            outcome(api.whoami)[0],
            outcome(lambda: api.model_info("alice/secret"))[0],
            outcome(lambda: api.create_repo(f"alice/{token}"))[0],
            outcome(lambda: api.create_repo(f"lab/{token}"))[0],
        ]
    out["whoami"] = HfApi(token="hf_fine").whoami()["auth"]["accessToken"]["fineGrained"]["scoped"][0]["permissions"]
    """
    no, ok = "HfHubHTTPError", "ok"
    assert run(script, hub.env(tmp_path / "hf")) == {
        "hf_alice": [ok, ok, ok, no],
        "hf_reader": [ok, ok, no, no],
        "hf_fine": [ok, ok, no, ok],
        "hf_old": [no, no, no, no],
        "hf_nobody": [no, no, no, no],
        "None": ["ValueError", "RepositoryNotFoundError", no, no],
        "whoami": ["repo.write"],
    }


def test_large_files_belong_to_one_repository(hub: LoopbackHub, tmp_path: Path) -> None:
    """As on the Hub, where what one repository holds must be sent again for another one."""
    script = """
    from huggingface_hub import CommitOperationAdd, HfApi
    api = HfApi()
    for name in ("a", "a", "b"):
        api.create_repo(f"tester/{name}", exist_ok=True)
        api.create_commit(f"tester/{name}", [CommitOperationAdd(f"x{len(out)}.bin", bytes(1000))], commit_message="x")
        out[str(len(out))] = "ok"
    """
    run(script, hub.env(tmp_path / "hf", token=hub.token))
    assert len(hub.seen("PUT", "/storage/")) == 2


RESULT = "model-index: [{name: x, results: [{task: {type: t}, dataset: {type: d, name: n}, metrics: [%s]}]}]"
CARDS = {
    "license: mit": True,
    "license: other\nlicense_name: research-only": True,
    "license: research-only": False,
    "license: other\nlicense_name: Research Only": False,
    "tags: [a, b]\ndatasets: [user/data]\nbase_model: EleutherAI/pythia-70m": True,
    "tags: one": False,
    "base_model: /home/x/model": False,
    "license: [mit": False,
    "- a": False,
    RESULT % "{type: l0, value: 1.5}": True,
    "model-index: [{name: x, results: [{task: {type: t}, metrics: [{type: l0, value: 1.5}]}]}]": False,
    RESULT % "{type: l0, value: .nan}": False,
    RESULT % "": False,
}


@pytest.mark.parametrize("front", CARDS)
def test_the_check_of_cards(front: str) -> None:
    errors, warnings = card_errors(f"---\n{front}\n---\n# A card\n", "model")
    assert (not errors) == CARDS[front], errors
    assert not warnings
    assert card_errors("# No front matter\n", "model") == ([], ["empty or missing yaml metadata in repo card"])


def test_faults_on_demand(hub: LoopbackHub, tmp_path: Path) -> None:
    """A cut in the middle of a body, a gate, a slow body, an answer that repeats the token."""
    hub.add_repo("tester/a", {"x.bin": WEIGHTS})
    hub.fail_next(1, None, match="PUT ", reads=100_000)
    hub.fail_next(1, 500, match="whoami", message="{token}!")
    hub.bytes_per_second = [("GET /storage/", 2_000_000)]
    script = """
    from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
    api = HfApi()
    try:
        api.whoami()
    except Exception as error:
        out["said"] = error.server_message
    api.create_commit("tester/a", [CommitOperationAdd("y.bin", bytes(500_000))], commit_message="y")
    start = time.monotonic()
    out["slow"] = [len(Path(hf_hub_download("tester/a", "x.bin")).read_bytes()), time.monotonic() - start > 0.2]
    """
    out = run(script, hub.env(tmp_path / "hf", token=hub.token))
    assert out == {"said": f"{hub.token}!", "slow": [len(WEIGHTS), True]}
    assert [r.status for r in hub.seen("PUT")] == [0, 200] and hub.files("tester/a")["y.bin"] == bytes(500_000)

    gate = hub.hold("GET /api/models/tester/a$")
    answers: list[int] = []
    asking = threading.Thread(target=lambda: answers.append(raw(hub, "GET", "/api/models/tester/a")[0]))
    asking.start()
    gate.wait_for()
    assert answers == []
    gate.open()
    asking.join(10)
    assert answers == [200]
