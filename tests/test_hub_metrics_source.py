"""Where metrics come from: runs' records as JSON or from Weights & Biases, and which runs they make candidates."""

import base64
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from dinov3_world import ROOT, SCRIPT, World, chosen_ids, make_world, push, run
from loopback_hub import client_env, closed_endpoint

from mechint.errors import MechintError
from mechint.hub.frontier import Candidate
from mechint.hub.metrics_source import Record, candidates, from_wandb, read_records, write_records


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("dinov3"))


def record(
    name: str = "abcdefg1", *, l0: Any = 8.0, nmse: Any = 0.2, layer: Any = 7, prefixes: Any = 10, **activation: Any
):
    config = {
        "objective": {"n_prefixes": prefixes} if prefixes else {},
        "sae": {"activation": activation or {"key": "relu"}},
        "val_data": {"layer": layer},
    }
    return Record(name, config, {"eval/l0": l0, "eval/normalized_mse": nmse}, "2025-11-01")


@pytest.mark.parametrize(
    "given, says",
    [
        (record(nmse=None), "eval/normalized_mse is missing"),
        (record(l0=None), "eval/l0 is missing"),
        (record(nmse=float("nan")), "not a finite number"),
        (record(nmse="NaN"), "not a finite number"),
        (record(l0=True), "not a finite number"),
        (record(l0=0.0), "nothing is ever active"),
        (record(nmse=-0.1), "below 0"),
        (record(layer="7"), "does not say the layer"),
    ],
)
def test_a_run_without_usable_metrics_is_skipped_by_name(given: Record, says: str):
    found = candidates([given.run_id, "missing1"], {given.run_id: given}, objective="matryoshka", activation="relu")
    assert found.candidates == [] and says in found.skipped[given.run_id]
    assert found.skipped["missing1"] == "no such run in the source of metrics"


def test_runs_of_another_objective_activation_or_layer_are_left_out():
    topk = record("topk", cls="TopK", params={"kind": "top-k", "top_k": 16})
    by_class = record("classy", cls="BatchTopK", params={"top_k": 16})
    given = {
        r.run_id: r for r in (record("relu"), record("vanilla", prefixes=None), topk, by_class, record("l8", layer=8))
    }

    def names(**wanted: Any) -> list[str]:
        return [c.run_id for c in candidates(list(given), given, **wanted).candidates]

    assert names() == list(given)
    assert names(objective="matryoshka", activation="relu") == ["relu", "l8"]
    assert names(objective="vanilla") == ["vanilla"]
    assert names(activation="top-k") == ["topk"] and names(activation="batch-top-k") == ["classy"]
    assert names(layers=[8]) == ["l8"]
    found = candidates(list(given), given, objective="vanilla", layers=[7])
    assert found.filtered["relu"] == "Matryoshka objective" and found.skipped == {}
    with pytest.raises(MechintError, match="activation 'topk' is unknown; nearest: top-k"):
        candidates([], {}, activation="topk")


def test_records_from_json_in_each_shape(tmp_path: Path):
    path = tmp_path / "metrics.json"
    write_records(path, {"a": record("a")})
    assert read_records(path) == {"a": record("a")}
    flat = {
        "run_id": "b",
        "layer": 3,
        "l0": 5,
        "nmse": 0.1,
        "date": "2025-01-02",
        "n_prefixes": 4,
        "activation": "relu",
    }
    for name, text in (("m.json", json.dumps([flat])), ("m.jsonl", json.dumps(flat) + "\n")):
        (tmp_path / name).write_text(text)
        found = candidates(["b"], read_records(tmp_path / name), objective="matryoshka", activation="relu")
        assert found.candidates == [Candidate("b", 3, 5.0, 0.1, "2025-01-02", {"key": "relu"})]
    section = (ROOT / "docs" / "publish.md").read_text().split("## Multi-checkpoint repos")[1]
    (tmp_path / "m.json").write_text(section.split("```json\n")[1].split("```")[0])
    found = candidates(["abc12345"], read_records(tmp_path / "m.json"), objective="matryoshka", activation="relu")
    assert found.candidates == [Candidate("abc12345", 23, 31.7, 0.042, "2025-11-20", {"key": "relu"})]
    for text, says in (("[1]", "should hold"), ("{", "cannot be read"), ('{"a": 1}', "should hold")):
        (tmp_path / "m.json").write_text(text)
        with pytest.raises(MechintError, match=says):
            read_records(tmp_path / "m.json")


class _WandB(BaseHTTPRequestHandler):
    """W&B's GraphQL, as far as its public API asks for runs by name."""

    records: dict[str, Any] = {}  # noqa: RUF012
    asked: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        asked = json.loads(body or b"{}")
        variables = asked.get("variables") or {}
        self.asked.append((self.headers.get("Authorization", ""), variables))
        data: dict[str, Any] = {"viewer": {"id": "1", "entity": "someone", "username": "someone"}}
        if "filters" in variables:
            names = [n for n in json.loads(variables["filters"])["name"]["$in"] if n in self.records]
            size = min(variables["perPage"], 2)  # pages of two, so that there are several
            start = int(variables["cursor"] or 0)
            edges = [
                {"node": self.node(n), "cursor": str(start + i + 1)} for i, n in enumerate(names[start : start + size])
            ]
            more = start + size < len(names)
            page = {"edges": edges, "pageInfo": {"endCursor": str(start + size), "hasNextPage": more}}
            data["project"] = {"internalId": "1", "runCount": len(names), "readOnly": True, "runs": page}
        text = json.dumps(
            {"data": data} if self.status == 200 else {"errors": [{"message": "no " + self.headers["Authorization"]}]}
        )
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def node(self, name: str) -> dict[str, Any]:
        entry = self.records[name]
        config = {key: {"value": value} for key, value in entry["config"].items()}
        blank = dict.fromkeys(("sweepName", "group", "jobType", "commit", "heartbeatAt", "notes", "historyKeys"))
        return blank | {
            **{
                "id": f"id-{name}",
                "name": name,
                "displayName": name,
                "state": "finished",
                "tags": [],
                "readOnly": True,
            },
            **{"description": "", "historyLineCount": 1, "projectId": "1", "user": {"name": "x", "username": "x"}},
            **{"createdAt": entry["created_at"], "config": json.dumps(config), "systemMetrics": "{}"},
            "summaryMetrics": json.dumps(entry["summary"] | {"eval/freqs": {"_type": "table-file"}}),
        }

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def wandb_server(world: World) -> Iterator[tuple[str, type[_WandB]]]:
    handler = type("Server", (_WandB,), {"records": world.records, "asked": [], "status": 200})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_metrics_from_weights_and_biases(world: World, wandb_server: tuple[str, Any], tmp_path: Path):
    pytest.importorskip("wandb")
    url, handler = wandb_server
    key = "0123456789abcdef" * 3
    env = client_env(closed_endpoint(), tmp_path / "hf") | {"WANDB_BASE_URL": url, "WANDB_API_KEY": key}
    name = "SAE_DINOv3_ViT-L-16_IN1K"
    flags = ("--dry-run", "--only", name, "--wandb-entity", "osunlp", "--save-metrics", "saved.json")
    done = push(world, env, tmp_path, *flags, metrics=False)
    assert done.returncode == 0, done.stderr
    header, variables = next((h, v) for h, v in handler.asked if "filters" in v)
    assert base64.b64decode(header.split()[1]).decode() == f"api:{key}"
    assert (variables["entity"], variables["project"]) == ("osunlp", "saev")
    assert key not in done.stdout + done.stderr
    rows = [
        json.loads(line)
        for line in (tmp_path / "published" / f"osunlp--{name}" / "manifest.jsonl").read_text().splitlines()
    ]
    assert [r["run_id"] for r in rows] == [i for layer in (13, 15, 17, 19, 21, 23) for i in chosen_ids(2, layer)]
    saved = read_records(tmp_path / "saved.json")
    assert len(saved) == 50 and saved["l23run0v"].config["objective"] == {}
    assert not [p for p in tmp_path.iterdir() if p.name not in ("published", "saved.json", "hf")], "no folders of W&B"
    # the same choice again, from the file alone
    again = run(
        [str(SCRIPT), *world.flags, "--metrics", "saved.json", "--dry-run", "--only", name, "-o", "again"],
        client_env(closed_endpoint(), tmp_path / "hf"),
        tmp_path,
    )
    assert again.returncode == 0, again.stderr
    first, second = ((tmp_path / f / f"osunlp--{name}" / "README.md").read_text() for f in ("published", "again"))
    assert first == second

    handler.status = 400
    failed = push(world, env, tmp_path, "--dry-run", metrics=False)
    assert failed.returncode == 2 and "Weights & Biases did not give the runs" in failed.stderr
    assert key not in failed.stderr and base64.b64encode(f"api:{key}".encode()).decode() not in failed.stderr


def test_wandb_without_a_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(MechintError, match="WANDB_API_KEY is not set.*--metrics"):
        from_wandb(["a"], "e/p", progress=False)


def test_runs_are_asked_for_in_batches():
    asked = []

    def fetch(project: str, ids: Any) -> list[Record]:
        asked.append(len(ids))
        return [Record(name) for name in ids if name != "7"]

    found = from_wandb([str(i % 230) for i in range(460)], "e/p", fetch=fetch, progress=False)
    assert asked == [100, 100, 30] and len(found) == 229 and "7" not in found
