"""Text sources: files, the built-in tales, the Hub (a loopback one), and what is wrong with them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from given_files import write_texts
from hypothesis import given
from hypothesis import strategies as st
from loopback_hub import LoopbackHub, client_env, closed_endpoint

from mechint.data.documents import Document
from mechint.data.local_text import FileTexts
from mechint.data.text import iter_texts_from_path, open_texts
from mechint.errors import MechintError

TEXTS = ["The first text.", "A second one, which is longer.", 'n\u00e9e \u5317\u4eac, "quoted"', "last"]
KINDS = [".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet"]
PACKED = [kind + packing for kind in KINDS[:-1] for packing in (".gz", ".zst")]


def read(dataset: object, start: int = 0, count: int = 100, **how: Any) -> list[Any]:
    return [document.content for document in open_texts(str(dataset), **how).read(start, count)]


@pytest.mark.parametrize("kind", KINDS + PACKED)
def test_local_files(tmp_path: Path, kind: str):
    path = write_texts(tmp_path, [TEXTS[0], "", "   ", *TEXTS[1:]], kind)
    source = open_texts(str(path))
    assert source.about() is None
    found = source.read(0, 100)
    assert [document.content for document in found] == TEXTS
    # blank records are left out, and counted; an empty line of a .txt only divides texts
    assert [document.n_blank for document in found] == [0, 0 if kind.startswith(".txt") else 2, 0, 0]
    assert source.about() == 4
    assert [document.content for document in source.read(1, 2)] == TEXTS[1:3]
    assert [document.content for document in source.read(3, 5)] == TEXTS[3:]
    assert source.read(4, 5) == []
    assert str(path) in found[0].where and len({document.where for document in found}) == 4
    described = source.describe()
    assert described["text_source"] == "files" and described["dataset_name"] == str(path)
    assert described["text_field"] == (None if kind.startswith(".txt") else "text")
    assert described["text_unit"] == ("line" if kind.startswith(".txt") else "record")
    assert iter_texts_from_path(path) == TEXTS


def test_a_text_is_blank_in_what_is_kept_of_it(tmp_path: Path):
    path = write_texts(tmp_path, ["a", "      b", "c"], ".jsonl")
    assert read(path, max_chars=4) == ["a", "c"] and read(path) == ["a", "      b", "c"]


def test_a_folder_of_txt_is_a_document_a_file(tmp_path: Path):
    for name, text in (("b", "three\n"), ("a", "\ufeffone\r\n\r\ntwo\r\n"), ("c", " \n")):
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
    assert read(tmp_path) == read(tmp_path / "*.txt") == read(tmp_path, unit="file") == ["one\n\ntwo", "three"]
    assert read(tmp_path, unit="line") == ["one", "two", "three"]
    assert read(tmp_path / "a.txt") == ["one", "two"] and read(tmp_path / "a.txt", unit="file") == ["one\n\ntwo"]
    said = {unit: open_texts(str(tmp_path), unit=unit).said for unit in (None, "line")}
    assert said == {
        None: f"3 files of {tmp_path}, one text a file",
        "line": f"3 files of {tmp_path}, one text a line",
    }


def test_folders_and_globs_are_read_in_the_order_of_names(tmp_path: Path):
    write_texts(tmp_path, TEXTS[2:], ".jsonl", "b")
    write_texts(tmp_path, TEXTS[1:2], ".txt", "a")
    (tmp_path / "readme.md").write_text("not a text")
    (tmp_path / "labels.csv").write_text("describes,the,others")
    (tmp_path / ".cache").mkdir()
    write_texts(tmp_path / ".cache", TEXTS, ".txt")
    assert read(tmp_path) == read(f"{tmp_path}/?.*") == TEXTS[1:]
    assert read(f"{tmp_path}/*.jsonl") == TEXTS[2:]
    assert open_texts(str(tmp_path)).said == (
        f"2 files of {tmp_path}, one text a file of .txt, one a record of the others; field text; not read there: 1"
        " .csv, 1 .md"
    )
    (tmp_path / "sub").mkdir()
    write_texts(tmp_path / "sub", TEXTS, ".csv")
    assert read(tmp_path / "sub") == TEXTS


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_texts(tmp_path, TEXTS, ".txt")
    assert read("~/part.txt") == read("~/part.txt") == TEXTS
    assert iter_texts_from_path("~/part.txt") == TEXTS


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int8(), "str")]
)
def test_every_kind_of_string_column(tmp_path: Path, kind: pyarrow.DataType):
    texts = ["a", "b", None, "a"]
    table = pyarrow.table({"text": pyarrow.array(texts).cast(kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a", "b", "a"]


RECORDS = [
    {
        "meta": {"body": "deep"},
        "a.b": "dotted",
        "messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}],
        "input_ids": [5, 6, 0, 0],
        "attention_mask": [1, 1, 0, 0],
        "parts": ["x", None, "y"],
    }
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved"])
def test_fields_of_every_shape(tmp_path: Path, kind: str):
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    elif kind == "saved":
        save(RECORDS, path)
    else:
        path.write_text(json.dumps(RECORDS if kind == "json" else RECORDS[0]))
    expected = {
        "meta.body": "deep",
        "a.b": "dotted",
        "messages": RECORDS[0]["messages"],
        "messages.content": "Hello?\nHello.",
        "input_ids": [5, 6],
        "parts": "x\n\ny",
    }
    assert {field: read(path, text_field=field) for field in expected} == {f: [v] for f, v in expected.items()}


def test_json_is_a_list_of_strings_one_record_or_lines(tmp_path: Path):
    path = tmp_path / "a.json"
    for text, expected in (
        ('["a", "b"]', ["a", "b"]),
        ('{"text": "a"}', ["a"]),
        ('{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ("[]", []),
    ):
        path.write_text(text)
        assert read(path) == expected


def test_csv_fields_hold_commas_lines_and_nothing(tmp_path: Path):
    (tmp_path / "a.csv").write_text('id,text\n1,"a, b\nc"\n2\n3,""\n4,d\n')
    source = open_texts(str(tmp_path / "a.csv"))
    found = source.read(0, 9)
    assert [(d.content, d.n_blank, d.where.split(", ")[1]) for d in found] == [
        ("a, b\nc", 0, "line 3"),
        ("d", 2, "line 6"),
    ]


def save(records: list[dict[str, Any]], folder: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(records).save_to_disk(str(folder))


def test_saved_data_sets_and_their_splits(tmp_path: Path):
    import datasets

    table = datasets.Dataset.from_dict({"text": ["", *TEXTS], "id": list(range(5))})
    datasets.disable_progress_bars()
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=table, test=table.select([4])).save_to_disk(str(tmp_path / "two"))
    assert read(tmp_path / "one") == read(tmp_path / "two") == TEXTS
    assert read(tmp_path / "one", 2, 1) == TEXTS[2:3]
    assert read(tmp_path / "two", split="test") == TEXTS[3:]
    assert open_texts(str(tmp_path / "one")).describe()["text_unit"] == "record"
    for folder, how, message in (
        ("one", {"split": "test"}, "holds one data set without splits"),
        ("two", {"split": "tst"}, "no split 'tst': use --split; nearest: test"),
        ("one", {"text_field": "body"}, "no field 'body', only text, id: use --text-field"),
        ("one", {"unit": "line"}, "--unit line: .* holds records"),
    ):
        with pytest.raises(MechintError, match=message):
            open_texts(str(tmp_path / folder), **how)
    before = open_texts(str(tmp_path / "one")).fingerprint()
    shutil.rmtree(tmp_path / "one")
    table.select([1]).save_to_disk(str(tmp_path / "one"))
    assert open_texts(str(tmp_path / "one")).fingerprint() != before


@pytest.mark.parametrize("kind", [*KINDS, ".csv.gz", "folder", "glob"])
def test_a_changed_source_has_another_fingerprint(tmp_path: Path, kind: str):
    file = write_texts(tmp_path, TEXTS, ".txt" if kind in ("folder", "glob") else kind)
    dataset = {"folder": str(tmp_path), "glob": f"{tmp_path}/*"}.get(kind, str(file))
    before = open_texts(dataset).fingerprint()
    assert open_texts(dataset).fingerprint() == before
    if kind in ("folder", "glob"):
        write_texts(tmp_path, TEXTS, ".txt", "second")
    else:
        write_texts(tmp_path, TEXTS[:3], kind)
    assert open_texts(dataset).fingerprint() != before


@given(st.lists(st.integers(1, 4), max_size=8), st.integers(0, 10))
def test_reading_in_pieces_gives_each_text_once(pieces: list[int], start: int):
    class Numbers(FileTexts):
        def _all(self):
            return iter([Document(str(i), "") for i in range(20)])

    source = Numbers("x", [], "text", 10)
    at = start
    for piece in pieces:
        found = [document.content for document in source.read(at, piece)]
        assert found == [str(i) for i in range(at, min(at + piece, 20))]
        at += piece


def test_tales_can_be_had_from_any_text_on():
    texts = read("builtin/tales", 0, 30, split="heldout", seed=3)
    assert len(set(texts)) > 25 and all(texts)
    assert read("builtin/tales", 17, 5, split="heldout", seed=3) == texts[17:22]
    assert read("builtin/tales", 0, 30, split="heldout", seed=4) != texts
    assert read("builtin/tales", 0, 30, seed=3) != texts
    assert len(open_texts("builtin/tales").describe()["dataset_revision"]) == 64


def test_text_file_with_byte_order_mark_and_windows_lines(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone \r\n\r\n two\r\n")
    assert iter_texts_from_path(tmp_path / "a.txt") == read(tmp_path / "a.txt") == ["one", "two"]
    (tmp_path / "a.list").write_text("one\ntwo")
    assert iter_texts_from_path(tmp_path / "a.list") == ["one", "two"], "a name that tells no format"


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
            return {"dataset": str(write_texts(tmp_path, TEXTS, ".parquet")), "text_field": "body"}
        case "parquet number":
            return {"dataset": str(write_texts(tmp_path, TEXTS, ".parquet")), "text_field": "id"}
        case "not parquet":
            (tmp_path / "a.parquet").write_text("hello")
            return {"dataset": str(tmp_path / "a.parquet")}
        case "nested field":
            (tmp_path / "a.jsonl").write_text('{"meta": {"body": "a"}, "turns": [{"value": "b"}]}\n')
            return {"dataset": str(tmp_path / "a.jsonl"), "text_field": "meta.text"}
        case "list":
            (tmp_path / "a.jsonl").write_text('{"text": [{"value": "b"}], "body": "a"}\n')
            return {"dataset": str(tmp_path / "a.jsonl")}
        case "json":
            (tmp_path / "a.json").write_text('[{"text": "a"},\n {"text": }]')
            return {"dataset": str(tmp_path / "a.json")}
        case "csv field":
            (tmp_path / "a.csv").write_text("id,body\n1,a\n")
            return {"dataset": str(tmp_path / "a.csv")}
        case "csv row":
            (tmp_path / "a.csv").write_text("id,text\n1,a\n2,b, c\n")
            return {"dataset": str(tmp_path / "a.csv")}
        case "csv quote":
            (tmp_path / "a.csv").write_text('id,text\n1,"a\n2,b\n')
            return {"dataset": str(tmp_path / "a.csv")}
        case "not gzip":
            (tmp_path / "a.txt.gz").write_text("hello")
            return {"dataset": str(tmp_path / "a.txt.gz")}
        case "cut zstd":
            path = write_texts(tmp_path, TEXTS, ".jsonl.zst")
            path.write_bytes(path.read_bytes()[:-5])
            return {"dataset": str(path)}
        case "parquet utf-8":
            column = pyarrow.array(["a", "\u00e9"]).cast(pyarrow.binary()).to_pylist()
            broken = pyarrow.Array.from_buffers(
                pyarrow.string(), 2, pyarrow.array([column[0], column[1][:1]]).buffers()
            )
            pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
            return {"dataset": str(tmp_path / "a.parquet")}
        case "unit of records":
            return {"dataset": str(write_texts(tmp_path, TEXTS, ".csv")), "unit": "line"}
        case "unit of lines":
            return {"dataset": str(write_texts(tmp_path, TEXTS, ".txt")), "unit": "record"}
        case "suffix":
            (tmp_path / "a.npy").write_text("hello")
            return {"dataset": str(tmp_path / "a.npy")}
        case "folder":
            return {"dataset": str(tmp_path)}
        case "glob":
            return {"dataset": str(tmp_path / "*.txt")}
        case "missing":
            return {"dataset": "texts/nowhere.jsonl"}
        case "missing folder":
            return {"dataset": "./nowhere"}
        case "local split":
            return {"dataset": str(write_texts(tmp_path, TEXTS, ".txt")), "split": "validation"}
        case "local revision":
            return {"dataset": str(write_texts(tmp_path, TEXTS, ".txt")), "revision": "main"}
        case "tales split":
            return {"dataset": "builtin/tales", "split": "valid"}
        case "tales unit":
            return {"dataset": "builtin/tales", "unit": "line"}
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
        ("parquet number", "part.parquet, row 1: field 'id' holds int, not text"),
        ("nested field", "no field 'meta.text', only meta, meta.body, turns, turns.value: use --text-field"),
        ("list", "field 'text' holds a list of dict, not text; fields with text: text.value, body"),
        ("json", "a.json, line 2: not JSON"),
        ("csv field", "a.csv, line 2 has no field 'text', only id, body: use --text-field"),
        ("csv row", "a.csv, line 3: more fields than the header's 2; quote fields that hold commas"),
        ("csv quote", "a.csv, line 3: not CSV"),
        ("not gzip", "a.txt.gz is not a whole gzip file"),
        ("cut zstd", "part.jsonl.zst is not a whole zstd file"),
        ("parquet utf-8", "a.parquet, row 2: not UTF-8"),
        ("unit of records", "--unit line divides .txt files, and .*part.csv holds records"),
        ("unit of lines", "--unit record: .*part.txt holds .txt files"),
        ("not parquet", "not a readable parquet file"),
        ("suffix", "a.npy: texts are read from .txt, .jsonl"),
        ("folder", "holds no file of a known format"),
        ("glob", "matches"),
        ("missing", "no such file or folder: texts/nowhere.jsonl"),
        ("missing folder", "no such file or folder"),
        ("local split", "local files have no splits"),
        ("local revision", "only data sets on the Hub have revisions"),
        ("tales split", "no split 'valid'; .*train, heldout"),
        ("tales unit", "--unit line divides .txt files, and builtin/tales holds records"),
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
    texts = [[document.content for document in source.read(*read)] for read in reads]
    out = {"texts": texts, "state": source.state(), "info": source.describe()}
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
        path = write_texts(folder, part, ".parquet", f"part-{number}")
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
