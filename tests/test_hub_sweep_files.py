"""Run ids out of sweep files: commented ones too, several tables, prose left out, and nothing ever executed."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechint.errors import MechintError
from mechint.hub.sweep_files import NO_TABLE, RUN_ID, _from_source, read_run_ids, read_tables

SOURCE = '''
"""A docstring with "docstrng" in it, and [ brackets ( that do not close."""
import os

# a "baseline" run, and "anotherx" too
vanilla_run_ids = ["vanilla1", 'vanilla2']
in1k_run_ids = [
    # layer 13
    "aaaaaaa1",  # the best, was "zzzzzzz9"
    # "aaaaaaa2",
    #"aaaaaaa3", "aaaaaaa4",  # inference done
    # "baseline" of the (first) sweep
    "aaaaaaa5",  # "aaaaaaa6",
    #     "aaaaaaa7"
]
# ade_run_ids = [
#     "ddddddd1",
#     # "ddddddd2",
# ]
by_layer: dict[int, list[str]] = {
    6: ["eeeeeee1"],
    # 7: ["eeeeeee2", "eeeeeee3"],
}
sets = {"imagenet": ["fffffff1"], "ade": ("fffffff2",)}
in1k_run_ids += ["aaaaaaa8"]
in1k_run_ids.extend(["aaaaaaa9", "aaaaaaa1"])


def make_cfgs():
    for run_id in ["ggggggg1"]:
        # Config(run="hhhhhhh1", lr=1e-4, path="runs/x"),
        yield Config(run="hhhhhhh2", note="not an id")
'''


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    path = tmp_path / "inference.py"
    path.write_text(SOURCE)
    return path


def test_tables_of_a_sweep_file(sweep: Path):
    assert read_tables(sweep) == {
        "vanilla_run_ids": ["vanilla1", "vanilla2"],
        "in1k_run_ids": [f"aaaaaaa{i}" for i in range(1, 10)],
        "ade_run_ids": ["ddddddd1", "ddddddd2"],
        "by_layer": ["eeeeeee1", "eeeeeee2", "eeeeeee3"],
        "sets.imagenet": ["fffffff1"],
        "sets.ade": ["fffffff2"],
        NO_TABLE: ["ggggggg1", "hhhhhhh1", "hhhhhhh2"],
    }


ids = st.lists(st.from_regex(r"[a-z0-9]{8}", fullmatch=True), min_size=1, max_size=6, unique=True)
# how an entry is written: in code or commented out in several ways, with either quote, with a remark behind it or not
ways = st.tuples(
    st.sampled_from(["    {},", "    # {},", "#    {},", "    #{}", "    ## {},", "    {}, # {}"]),
    st.sampled_from(['"', "'"]),
    st.sampled_from(["", "  # done", "  # best of layer 6 (k = 16), was lr 3e-4"]),
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.from_regex(r"[a-z_]{3,12}_ids", fullmatch=True), ids, min_size=1, max_size=4),
    st.lists(ways, min_size=30, max_size=30),
    st.booleans(),
)
def test_whatever_is_written_as_a_table_is_read(tables: dict[str, list[str]], ways: list, whole: bool):
    lines, way = ["import os", "# see the 'notebook' for why"], iter(ways)
    for name, entries in tables.items():
        block, left = [f"{name} = ["], list(entries)
        while left:
            form, quote, remark = next(way)
            n = form.count("{}")
            taken, left = left[:n], left[n:]
            if len(taken) < n:
                form = "    {},"
            block.append(form.format(*(quote + entry + quote for entry in taken)) + remark)
        block.append("]")
        lines += [f"# {line}" for line in block] if whole else block
        lines.append("print('between tables')")
    assert _from_source("\n".join(lines), re.compile(RUN_ID)) == tables


def test_one_table_or_several_by_name_or_all(sweep: Path):
    assert read_run_ids(sweep, ["vanilla_run_ids"]) == ["vanilla1", "vanilla2"]
    assert read_run_ids(sweep, ["sets.ade", "sets.imagenet"]) == ["fffffff2", "fffffff1"]
    every = read_run_ids(sweep)
    assert len(every) == len(set(every)) == 21 and "baseline" not in every and "docstrng" not in every
    with pytest.raises(MechintError, match=r"no table 'in1k_ids'.*nearest: in1k_run_ids.*in1k_run_ids \(9\)"):
        read_run_ids(sweep, ["in1k_ids"])


def test_a_hostile_sweep_file_is_not_executed(tmp_path: Path):
    victim = tmp_path / "victim.txt"
    victim.write_text("still here")
    hostile = tmp_path / "hostile.py"
    code = f"""
import os, pathlib
pathlib.Path({str(victim)!r}).unlink()
os.system("rm -f {victim}")
run_ids = [pathlib.Path({str(victim)!r}).unlink() or "abcdefg1", *[__import__("os").remove({str(victim)!r})]]
x = f"{{os.remove({str(victim)!r})}}"
# "abcdefg2"
# pathlib.Path({str(victim)!r}).unlink()
"""
    hostile.write_text(code)
    compile(code, "hostile", "exec")  # it would run if somebody ran it
    assert read_run_ids(hostile) == ["abcdefg1", "abcdefg2"]
    assert victim.read_text() == "still here"


def test_a_file_that_is_no_valid_python_is_read_all_the_same(tmp_path: Path):
    path = tmp_path / "broken.py"
    path.write_text('ids = ["abcdefg1",\n   # "abcdefg2"\n def f(: ]]]] """unclosed\n "abcdefg3" \n')
    assert {"abcdefg1", "abcdefg2"} <= set(read_run_ids(path))


def test_ids_that_look_otherwise(tmp_path: Path):
    path = tmp_path / "sweep.py"
    path.write_text('ids = ["layer3-k16", "layer3-k64", "abcdefg1"]\n')
    assert read_run_ids(path, pattern=r"layer\d+-k\d+") == ["layer3-k16", "layer3-k64"]
    assert read_run_ids(path) == ["abcdefg1"]


@pytest.mark.parametrize(
    "name, text, tables",
    [
        ("ids.json", json.dumps(["b", "a", "b"]), {NO_TABLE: ["b", "a"]}),
        ("ids.json", json.dumps({"in1k": ["a"], "ade": ["b"]}), {"in1k": ["a"], "ade": ["b"]}),
        ("manifest.jsonl", '{"run_id": "a", "layer": 1}\n\n{"run_id": "b"}\n', {NO_TABLE: ["a", "b"]}),
        (
            "ids.txt",
            "# prose here\nabcdefg1\n# abcdefg2\n'abcdefg3',  # best\n",
            {NO_TABLE: ["abcdefg1", "abcdefg2", "abcdefg3"]},
        ),
    ],
)
def test_ids_from_other_files(name: str, text: str, tables: dict[str, list[str]], tmp_path: Path):
    (tmp_path / name).write_text(text)
    assert read_tables(tmp_path / name) == tables


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("ids.json", b"[1, 2]", "no run id"),
        ("ids.json", b'{"a": "b"}', "a should be a list"),
        ("ids.json", b"[", "not JSON"),
        ("ids.json", b"[" * 100_000, "not JSON"),
        ("sweep.py", b"x = 1\n", "holds no run ids"),
        ("sweep.py", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_files_without_ids(name: str, content: bytes, says: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MechintError, match=says):
        read_tables(tmp_path / name)


def test_a_sweep_file_that_is_not_there_names_its_neighbours(sweep: Path):
    with pytest.raises(MechintError, match=r"sweep file not found: .*inferense\.py; nearest: inference\.py"):
        read_tables(sweep.with_name("inferense.py"))


ODD = ("1" * 20_000 + "!", "a " * 10_000, "a:" * 10_000 + "!", "(" * 20_000, '"' + "\\" * 20_001, '"a" # ' * 2_000)


@pytest.mark.parametrize("line", ODD)
def test_odd_lines_do_not_take_long(line: str, tmp_path: Path):
    path = tmp_path / "sweep.py"
    path.write_text(f'# {line}\n{line}\nids = ["abcdefg1"]\n')
    start = time.process_time()
    tables = re.findall("abcdefg1", str(_tables(path)))
    assert time.process_time() - start < 20, "quadratic or worse"
    assert tables in (["abcdefg1"], [])


def _tables(path: Path) -> object:
    try:
        return read_tables(path)
    except MechintError as error:
        return str(error)
