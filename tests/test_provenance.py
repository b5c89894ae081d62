"""Atomic writes: what a killed process leaves behind goes with the next write, what a living one is writing stays."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mechint import locks
from mechint.data.store_write import only_writer
from mechint.errors import MechintError
from mechint.provenance import atomic_path, remove_abandoned, scratch_folder, write_json, write_text

# A process in the middle of writing argv[1]: safetensors's own temporary file lies beside the one that is asked for.
WRITER = """
import sys, time
from mechint.provenance import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    (temporary.parent / ".tmpAbCdEf").write_text("of a library")
    print("writing", flush=True)
    time.sleep(600)
"""


def writing(path: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_next_write_removes_what_a_kill_left(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    process = writing(path)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".a.safetensors.") and names(tmp_path / left) == [".tmpAbCdEf", "a.safetensors"]
    write_text(tmp_path / "b.json", "another file's write is none of its business")
    assert names(tmp_path) == [left, "b.json"]
    with atomic_path(path) as temporary:
        save_file({"x": torch.ones(2)}, temporary)
    assert names(tmp_path) == ["a.safetensors", "b.json"]
    assert load_file(path)["x"].tolist() == [1, 1]
    assert path.stat().st_mode & 0o777 == (tmp_path / "b.json").stat().st_mode & 0o777


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path):
    path = tmp_path / "a.json"
    process = writing(path)
    try:
        (theirs,) = names(tmp_path)
        write_json(path, {"ours": 1})
        remove_abandoned(tmp_path)
        assert names(tmp_path) == [theirs, "a.json"] and (tmp_path / theirs / "a.json").read_text() == "half"
        with scratch_folder(path) as ours:  # and neither is what this very process writes
            remove_abandoned(tmp_path)
            assert names(tmp_path) == sorted([theirs, ours.name, "a.json"])
    finally:
        process.kill()
        process.wait()
    remove_abandoned(tmp_path)
    assert names(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path: Path):
    write_text(tmp_path / "a.txt", "before")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(MechintError, match="is not overwritten"):
        write_text(tmp_path / "a.txt", "after", overwrite=False)
    with pytest.raises(FileExistsError), atomic_path(tmp_path / "b.txt", overwrite=False) as temporary:
        temporary.write_text("ours")
        (tmp_path / "b.txt").write_text("made by somebody else meanwhile")
    assert names(tmp_path) == ["a.txt", "b.txt"] and (tmp_path / "a.txt").read_text() == "before"
    assert (tmp_path / "b.txt").read_text() == "made by somebody else meanwhile"


@pytest.mark.parametrize("opens", [True, False], ids=["no locks", "folders cannot be opened"])
def test_files_are_written_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opens: bool):
    """As on Windows, which has no fcntl and opens no folders: nothing then counts as left behind."""
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "_OPENS_FOLDERS", opens)
    left = tmp_path / ".a.json.abc.tmp"
    left.mkdir()
    write_json(tmp_path / "a.json", {"a": 1})
    with only_writer(tmp_path / "store"), only_writer(tmp_path / "store"):
        pass
    assert names(tmp_path) == [".a.json.abc.tmp", "a.json", "store"]


def test_no_module_needs_locks_to_be_imported():
    code = "import sys; sys.modules['fcntl'] = None; import mechint.locks; print(mechint.locks.lock(0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
    package = Path(locks.__file__).parent
    assert [path.name for path in package.rglob("*.py") if "import fcntl" in path.read_text()] == ["locks.py"]
