"""Text sources: files, the built-in tales, the Hub (a loopback one), and what is wrong with them."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopback_hub import LoopbackHub, client_env, closed_endpoint

from mechint.data.local_text import FileTexts
from mechint.data.text import iter_texts_from_path, open_texts
from mechint.errors import MechintError

TEXTS = ["The first text.", "A second one, which is longer.", "née 北京", "last"]


def write_texts(folder: Path, texts: list[str], kind: str, name: str = "part") -> Path:
    path = folder / f"{name}.{kind}"
    if kind == "txt":
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)), "utf-8")
    else:
        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_local_files(tmp_path: Path, kind: str):
    path = write_texts(tmp_path, [TEXTS[0], "", "   ", *TEXTS[1:]], kind)
    source = open_texts(str(path))
    assert source.read(0, 100) == TEXTS  # blank ones dropped and not counted
    assert source.read(1, 2) == TEXTS[1:3]
    assert source.read(3, 5) == TEXTS[3:]
    assert source.read(4, 5) == []
    assert [open_texts(str(path), max_chars=3).read(i, 1)[0] for i in range(4)] == [text[:3] for text in TEXTS]
    described = source.describe()
    assert described["text_source"] == "files" and described["dataset_name"] == str(path)
    assert described["text_field"] == (None if kind == "txt" else "text")


def test_folders_and_globs_are_read_in_the_order_of_names(tmp_path: Path):
    write_texts(tmp_path, TEXTS[2:], "jsonl", "b")
    write_texts(tmp_path, TEXTS[:2], "txt", "a")
    (tmp_path / "readme.md").write_text("not a text")
    assert open_texts(str(tmp_path)).read(0, 9) == TEXTS
    assert open_texts(f"{tmp_path}/*.jsonl").read(0, 9) == TEXTS[2:]
    assert open_texts(f"{tmp_path}/?.*").read(0, 9) == TEXTS


@given(st.lists(st.integers(1, 4), max_size=8), st.integers(0, 10))
def test_reading_in_pieces_gives_each_text_once(pieces: list[int], start: int):
    class Numbers(FileTexts):
        def _all(self):
            return iter([str(i) for i in range(20)])

    source = Numbers("x", [], "text", 10)
    at = start
    for piece in pieces:
        found = source.read(at, piece)
        assert found == [str(i) for i in range(at, min(at + piece, 20))]
        at += piece


def test_tales_can_be_had_from_any_text_on():
    source = open_texts("builtin/tales", "heldout", seed=3, max_chars=40)
    texts = source.read(0, 30)
    assert len(set(texts)) > 25 and all(0 < len(text) <= 40 for text in texts)
    assert source.read(17, 5) == texts[17:22]
    assert open_texts("builtin/tales", "heldout", seed=4, max_chars=40).read(0, 30) != texts
    assert open_texts("builtin/tales", "train", seed=3, max_chars=40).read(0, 30) != texts
    assert len(source.describe()["dataset_revision"]) == 64


def test_text_file_with_byte_order_mark_and_windows_lines(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone \r\n\r\n two\r\n")
    assert iter_texts_from_path(tmp_path / "a.txt") == ["one", "two"]
    assert open_texts(str(tmp_path / "a.txt")).read(0, 9) == ["one", "two"]


def bad(tmp_path: Path, kind: str) -> dict:
    match kind:
        case "latin-1":
            (tmp_path / "a.txt").write_bytes("fine\nné\n".encode("latin-1"))
            return {"dataset": str(tmp_path / "a.txt")}
        case "not json":
            (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
            return {"dataset": str(tmp_path / "a.jsonl")}
        case "json list":
            (tmp_path / "a.jsonl").write_text("[1]\n")
            return {"dataset": str(tmp_path / "a.jsonl")}
        case "json field":
            (tmp_path / "a.jsonl").write_text('{"body": "a", "id": 1}\n')
            return {"dataset": str(tmp_path / "a.jsonl")}
        case "json number":
            (tmp_path / "a.jsonl").write_text('{"text": 1, "body": "a"}\n')
            return {"dataset": str(tmp_path / "a.jsonl")}
        case "parquet field":
            return {"dataset": str(write_texts(tmp_path, TEXTS, "parquet")), "text_field": "body"}
        case "parquet number":
            return {"dataset": str(write_texts(tmp_path, TEXTS, "parquet")), "text_field": "id"}
        case "not parquet":
            (tmp_path / "a.parquet").write_text("hello")
            return {"dataset": str(tmp_path / "a.parquet")}
        case "suffix":
            (tmp_path / "a.csv").write_text("hello")
            return {"dataset": str(tmp_path / "a.csv")}
        case "folder":
            return {"dataset": str(tmp_path)}
        case "glob":
            return {"dataset": str(tmp_path / "*.txt")}
        case "missing":
            return {"dataset": "texts/nowhere.jsonl"}
        case "missing folder":
            return {"dataset": "./nowhere"}
        case "local split":
            return {"dataset": str(write_texts(tmp_path, TEXTS, "txt")), "split": "validation"}
        case "local revision":
            return {"dataset": str(write_texts(tmp_path, TEXTS, "txt")), "revision": "main"}
        case "tales split":
            return {"dataset": "builtin/tales", "split": "valid"}
        case "tales revision":
            return {"dataset": "builtin/tales", "revision": "main"}
        case _:
            return {"dataset": "builtin/tails"}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("latin-1", "a.txt, line 2: not UTF-8"),
        ("not json", "a.jsonl, line 2: not JSON"),
        ("json list", "line 1: expected an object .* found list"),
        ("json field", "line 1 has no field 'text', only body, id: use --text-field"),
        ("json number", "field 'text' holds int, not text; fields with text: body"),
        ("parquet field", "no field 'body', only id, text: use --text-field"),
        ("parquet number", "field 'id' holds int64, not text"),
        ("not parquet", "not a readable parquet file"),
        ("suffix", "a.csv: texts are read from .txt/.jsonl/.parquet"),
        ("folder", "holds no .txt/.jsonl/.parquet"),
        ("glob", "matches"),
        ("missing", "no such file or folder: texts/nowhere.jsonl"),
        ("missing folder", "no such file or folder"),
        ("local split", "local files have no splits"),
        ("local revision", "only data sets on the Hub have revisions"),
        ("tales split", "no split 'valid'; .*train, heldout"),
        ("tales revision", "only data sets on the Hub have revisions"),
        ("other", "unknown built-in data set 'builtin/tails'; nearest: builtin/tales"),
    ],
)
def test_mistakes(tmp_path: Path, kind: str, message: str):
    with pytest.raises(MechintError, match=message):
        open_texts(**bad(tmp_path, kind)).read(0, 10)


@pytest.mark.parametrize("content", [None, "", "\n  \n"])
def test_a_list_of_texts_must_have_one(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "a.txt").write_text(content)
    with pytest.raises(MechintError, match="one text a line"):
        iter_texts_from_path(tmp_path / "a.txt")


# --- the Hub, as a server on this machine. Each client is a process of its own: it reads its environment only once ---

READ = """
import json, sys
from mechint.data.text import open_texts
from mechint.errors import MechintError
import time
given = json.loads(sys.argv[1])
reads = given.pop("reads")
started = time.perf_counter()
try:
    source = open_texts(**given)
    out = {"texts": [source.read(*read) for read in reads], "state": source.state(), "info": source.describe()}
    source.close()
except MechintError as error:
    out = {"error": str(error), "seconds": time.perf_counter() - started}
print(json.dumps(out))
"""


def read_in_process(env: dict[str, str], reads: list, **arguments: object) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps({"reads": reads, **arguments})],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


WEB = [f"Web text number {i}." for i in range(50)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("hub")
    parts = [WEB[:20], WEB[20:30], ["", *WEB[30:]], []]
    files = {}
    for number, part in enumerate(parts[:3]):
        path = write_texts(folder, part, "parquet", f"part-{number}")
        files[f"data/train-0000{number}-of-00003.parquet"] = path.read_bytes()
    with LoopbackHub(folder) as server:
        server.commits = [server.add_repo("Skylion007/openwebtext", files, type="dataset")]
        server.add_repo("some/lines", {"train.jsonl": b'{"body": "a"}\n'}, type="dataset")
        server.add_repo("some/script", {"script.py": b"import datasets\n", "README.md": b"x"}, type="dataset")
        yield server


@pytest.mark.slow
def test_streaming_from_the_hub_resumes_exactly_and_is_dealt_to_processes(hub: LoopbackHub, tmp_path: Path):
    env = hub.env(tmp_path / "hf")
    first = read_in_process(env, [[0, 13], [13, 12]], dataset="openwebtext")
    assert first["texts"] == [WEB[:13], WEB[13:25]]
    assert first["info"]["dataset_revision"] == hub.commits[0] and first["info"]["text_source"] == "hub"
    rest = read_in_process(env, [[25, 100]], dataset="openwebtext", state=first["state"], revision=hub.commits[0])
    assert rest["texts"] == [WEB[25:]]
    parts = [read_in_process(env, [[0, 100]], dataset="openwebtext", rank=r, world_size=3) for r in range(3)]
    assert sorted(text for part in parts for text in part["texts"][0]) == sorted(WEB)
    assert all(part["texts"][0] for part in parts)
    assert hub.requests and not hub.seen("OUTSIDE")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "openwebtext", "split": "valid"}, "valid"),
        ({"dataset": "openwebtext", "text_field": "body"}, "no field 'body', only id, text: use --text-field"),
        ({"dataset": "openwebtext", "revision": "v9"}, "no revision 'v9'"),
        ({"dataset": "no/such"}, "data set 'no/such' is not on the Hub.*builtin/tales"),
        ({"dataset": "some/lines"}, "no field 'text', only body"),
        ({"dataset": "some/script"}, "data set some/script.*--dataset"),
    ],
)
def test_mistakes_about_the_hub(hub: LoopbackHub, tmp_path: Path, arguments: dict, message: str):
    import re

    found = read_in_process(hub.env(tmp_path / "hf"), [[0, 1]], **arguments)
    assert re.search(message, found["error"]), found


@pytest.mark.slow
@pytest.mark.parametrize("offline", [False, True])
def test_an_unreachable_hub_is_said_at_once(tmp_path: Path, offline: bool):
    env = client_env(closed_endpoint(), tmp_path / "hf", offline=offline)
    found = read_in_process(env, [[0, 1]], dataset="openwebtext")
    assert "the Hub cannot be reached" in found["error"] and "--dataset builtin/tales" in found["error"]
    assert found["seconds"] < 25, "mostly imports, on a busy machine; the library's retries alone take longer"
