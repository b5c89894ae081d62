"""Collection that is stopped, killed, short of disk, or dealt to several processes ends with the same files."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from collecting import (  # noqa: F401  (fixtures)
    REPO,
    SCRIPT,
    Stop,
    collect_quietly,
    flags,
    one_thread,
    snapshot,
    stop_after,
    texts_fixture,
)
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file

from mechint.cli.collect import main
from mechint.config import CollectConfig
from mechint.data import open_activations
from mechint.data.collect import collect_command
from mechint.errors import MechintError


@pytest.mark.parametrize("name", ["store", "a.pt"])
def test_a_stopped_collection_goes_on_without_redoing_anything(
    tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, name: str, capsys, monkeypatch
):
    whole = tmp_path / "whole" / name
    collect_quietly(*flags(tiny_neox_dir, texts_file, whole))
    output = tmp_path / "stopped" / name
    with monkeypatch.context() as patch:
        stop_after(patch, 3, Stop())
        with pytest.raises(Stop):
            main(flags(tiny_neox_dir, texts_file, output))
    with pytest.raises(MechintError, match="is not finished; go on with: python scripts/collect_activations.py"):
        open_activations(output)
    folder = output if name == "store" else output.with_name("a.pt.shards")
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    assert len(times) == 3
    left = folder / ".shard-00003.safetensors.abc.tmp"
    left.mkdir()
    (left / ".tmpAbCdEf").write_text("half a shard")
    (folder / "shard-00003.safetensors").write_text("a shard that was never recorded")

    # other settings: an error that names them, and nothing touched
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert main(flags(tiny_neox_dir, texts_file, output, "--batch-size", 5)) == 2
    assert "batch_size: 4 -> 5" in capsys.readouterr().err and snapshot(tmp_path) == before

    if name == "store":
        with monkeypatch.context() as patch:
            stop_after(patch, 0, Stop())
            with pytest.raises(Stop):
                main(flags(tiny_neox_dir, texts_file, output))
        assert {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")} == times
    collect_quietly(*flags(tiny_neox_dir, texts_file, output))
    if name == "store":
        assert {path: (output / path).stat().st_mtime_ns for path in times} == times
    ours, theirs = open_activations(output), open_activations(whole)
    assert ours.sha256 == theirs.sha256 and ours.info["texts_sha256"] == theirs.info["texts_sha256"]
    names = [path.name for path in output.parent.rglob("*") if path.is_file()]
    assert sorted(names) == sorted(path.name for path in whole.parent.rglob("*") if path.is_file())


def test_texts_or_weights_that_changed_meanwhile_are_refused(
    tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, capsys, monkeypatch
):
    import shutil

    texts, model = tmp_path / "t.txt", tmp_path / "model"
    shutil.copy(texts_file, texts)
    shutil.copytree(tiny_neox_dir, model)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, Stop())
        with pytest.raises(Stop):
            main(flags(model, texts, tmp_path / "store"))
    state = texts.stat()
    texts.write_text(texts.read_text() + "one more\n")
    assert main(flags(model, texts, tmp_path / "store")) == 2
    assert f"the texts of {texts} have changed since {tmp_path / 'store'} was begun" in capsys.readouterr().err
    shutil.copy(texts_file, texts)
    os.utime(texts, ns=(state.st_atime_ns, state.st_mtime_ns))
    weights = load_file(model / "model.safetensors")
    good = {name: tensor.clone() for name, tensor in weights.items()}
    next(iter(weights.values())).add_(1)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert main(flags(model, texts, tmp_path / "store")) == 2
    assert "model_sha256" in capsys.readouterr().err
    save_file(good, model / "model.safetensors", metadata={"format": "pt"})
    assert main(flags(model, texts, tmp_path / "store")) == 0


def test_a_preset_in_python_and_json_is_its_settings():
    config = CollectConfig.from_dict({"preset": "mech-int"})
    assert (config.processing, config.prepend_bos, config.keep_bos) == ("centred", True, True)
    assert not CollectConfig.from_dict({"preset": "mech-int", "keep_bos": False}).keep_bos
    with pytest.raises(MechintError, match="unknown preset 'mechint'; nearest: mech-int"):
        CollectConfig.from_dict({"preset": "mechint"})


def test_the_command_that_goes_on_is_the_same_command(tmp_path: Path):
    from mechint.cli.flags import parse
    from mechint.config import COLLECT_PRESETS

    config = CollectConfig(
        model="a b", dataset="x.txt", output=tmp_path / "o", keep_bos=True, prepend_bos=False, context_size=7, seed=3
    )
    import shlex

    words = shlex.split(collect_command(config))
    assert parse(CollectConfig, words[2:], prog="x", presets=lambda name, _: COLLECT_PRESETS[name]) == config


def environment(**more: str) -> dict[str, str]:
    # one thread, so that the rounding does not depend on how many processes share the work
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **more}


def start(words: list[str], **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def progress_of(output: Path) -> Path:
    return (output if output.suffix != ".pt" else output.with_name(output.name + ".shards")) / "progress"


def wait_for_shards(output: Path, n: int, process: subprocess.Popen, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end and process.poll() is None:
        if len(list(progress_of(output).glob("0*.json"))) >= n:
            return
        time.sleep(0.005)
    raise AssertionError(f"{n} shards did not appear: {process.communicate()}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["store", "a.pt"])
def test_kill_9_at_any_moment_changes_no_byte(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, name: str):
    words = flags(tiny_neox_dir, texts_file, tmp_path / "whole" / name, "--checkpoint-every", 2)
    assert start(words).wait() == 0
    output = tmp_path / "killed" / name
    words = flags(tiny_neox_dir, texts_file, output, "--checkpoint-every", 2)
    rng = random.Random(len(name))
    kills = 0
    while True:
        process = start(words)
        finished = len(list(progress_of(output).glob("0*.json"))) if progress_of(output).exists() else 0
        if kills < 6:
            try:
                wait_for_shards(output, min(finished + rng.randint(1, 5), 25), process)
                time.sleep(rng.random() * 0.02)
            except AssertionError:
                if process.returncode:
                    raise
        else:
            process.wait(60)
        if process.poll() is not None:
            assert process.returncode == 0
            break
        process.kill()
        process.wait()
        kills += 1
        if not output.exists() or not (output.is_file() or (output / "store.json").exists()):
            with pytest.raises(MechintError):
                open_activations(output)
    assert kills >= 4
    whole = snapshot(tmp_path / "whole")
    killed = snapshot(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    different = [file for file in whole if whole[file] != killed[file]]
    assert [file for file in different if not file.endswith(".json")] == []
    ours, theirs = open_activations(output), open_activations(tmp_path / "whole" / name)
    assert {**ours.info, "git_commit": 0} == {**theirs.info, "git_commit": 0}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_politely(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, number: int):
    output, many = tmp_path / "store", tmp_path / "many.txt"
    many.write_text(texts_file.read_text() * 8)  # enough that the end is not reached before the signal is
    words = flags(tiny_neox_dir, many, output, "--checkpoint-every", 1, "--num-texts", 400)
    # a shell's background job ignores Ctrl-C, and its children with it: not the case that is meant here
    process = start(words, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_for_shards(output, 3, process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error and "go on with: python scripts/collect_activations.py" in error
    kept = len(list(progress_of(output).glob("0*.json")))
    assert kept >= 3
    process = start(words)
    assert process.wait(60) == 0
    assert open_activations(output).info["n_texts"] == 400


@pytest.mark.slow
@pytest.mark.parametrize("name", ["store", "a.pt"])
def test_a_full_disk_keeps_what_was_finished(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, name: str):
    """A limit on the size of files stands for the disk: a shard that does not fit fails in the middle of its write."""
    output = tmp_path / "out" / name
    texts = tmp_path / "texts.txt"
    # small shards, then one too large for the limit
    lines = texts_file.read_text().splitlines()
    texts.write_text("\n".join(["one"] * 16 + [" ".join(lines)[:500]] * 16 + lines[:8]) + "\n")
    words = flags(tiny_neox_dir, texts, output)
    limit = 60_000
    process = start(words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "no room to write" in lines[0] and "run the same command again" in lines[0], error
    assert "Traceback" not in error
    folder = progress_of(output).parent
    assert [path.name for path in sorted(folder.glob("*shard*"))] == [f"shard-0000{i}.safetensors" for i in range(2)]
    with pytest.raises(MechintError, match="not finished"):
        open_activations(output)
    if name == "a.pt":  # now room for each shard, but not for the whole: the assembly is what fails
        limit = 200_000
        process = start(words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        _, error = process.communicate(timeout=120)
        assert process.returncode == 2 and "no room to write" in error and "Traceback" not in error, error
        assert not output.exists()
    process = start(words)
    assert process.wait(120) == 0
    activations = open_activations(output)
    assert activations.info["n_texts"] == 40
    activations.verify()


@pytest.mark.slow
def test_two_processes_make_the_files_of_one(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path):
    for name in ("store", "a.pt"):
        assert start(flags(tiny_neox_dir, texts_file, tmp_path / "one" / name)).wait(120) == 0
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        words = flags(tiny_neox_dir, texts_file, tmp_path / "two" / name)
        done = subprocess.run(
            [*command, str(SCRIPT), *words], env=environment(), capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("activation_path: ") == 1
        one, two = open_activations(tmp_path / "one" / name), open_activations(tmp_path / "two" / name)
        assert {**two.info, "git_commit": 0} == {**one.info, "git_commit": 0} and two.sha256 == one.sha256
        two.verify()
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "two")
    assert {file: digest for file, digest in one.items() if not file.endswith(".json")} == {
        file: digest for file, digest in two.items() if not file.endswith(".json")
    }


@pytest.mark.slow
@pytest.mark.parametrize("how", ["one hook", "six hooks"])
def test_memory_does_not_grow_with_the_number_of_texts(how: str, tiny_neox_dir: Path, tmp_path: Path):
    """One hook: texts of like length, since oneDNN keeps a program for each shape of a product, up to 1,024 of them,
    which is more than what 3,200 tales write. Six hooks: tales, whose rows outweigh those programs."""
    line = "the cat sat on the mat and the dog ran far away from home again " * 7
    (tmp_path / "texts.txt").write_text("".join(f"{line}{number}\n" for number in range(1000, 4200)))
    dataset, more, name = (
        ("builtin/tales", ["--layers", "0-5"], "") if how == "six hooks" else (tmp_path / "texts.txt", [], ".pt")
    )
    peaks, sizes = [], []
    for n_texts in (400, 3200):
        output = tmp_path / f"{n_texts}{name}"
        words = ["--model", tiny_neox_dir, "--dataset", dataset, "--num-texts", n_texts, "--output", output, *more]
        code = f"""
from mechint.cli.collect import main
assert main({[str(word) for word in [*words, "--checkpoint-every", 100]]!r}) == 0
# not ru_maxrss, which keeps the parent's peak from the fork and would hide this process's
print([int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmHWM")][0])
"""
        done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) * 1024)
        files = [output] if output.is_file() else output.rglob("*.safetensors")
        sizes.append(sum(path.stat().st_size for path in files))
    data = sizes[1] - sizes[0]
    assert data > 30e6
    assert peaks[1] - peaks[0] < 0.4 * data, (peaks, data)


@pytest.mark.slow
def test_the_default_names_with_a_hub(tiny_neox_dir: Path, tmp_path: Path):
    """The seed's own command, against a Hub on this machine that has the tiny model under the real name."""
    import pyarrow
    import pyarrow.parquet

    files = {}
    for part in range(2):
        table = pyarrow.table({"text": [f"the dog ran far away {part} {i}" for i in range(30)]})
        path = tmp_path / f"{part}.parquet"
        pyarrow.parquet.write_table(table, path)
        files[f"data/train-0000{part}-of-00002.parquet"] = path.read_bytes()
    with LoopbackHub(tmp_path) as hub:
        model_commit = hub.add_repo("EleutherAI/pythia-70m", tiny_neox_dir)
        data_commit = hub.add_repo("Skylion007/openwebtext", files, type="dataset")
        env = {**hub.env(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
        words = "--model pythia-70m --layer 3 --hook blocks.3.hook_resid_post --dataset openwebtext --num-texts 50"
        script = [sys.executable, str(SCRIPT), *words.split(), "--checkpoint-every", "8", "--output"]

        def run(command: list[str]) -> subprocess.CompletedProcess:
            return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)

        done = run([*script, str(tmp_path / "a.pt")])
        assert done.returncode == 0, done.stderr
        whole = open_activations(tmp_path / "a.pt")
        assert whole.info["n_texts"] == 50 and whole.info["dataset_revision"] == data_commit
        assert whole.info["model_revision"] == model_commit and whole.info["model_source"] == "EleutherAI/pythia-70m"

        # stopped and continued: the position in the stream was kept, even though the data set has moved on since
        process = subprocess.Popen([*script, str(tmp_path / "b.pt")], env=env, stderr=subprocess.PIPE, text=True)
        wait_for_shards(tmp_path / "b.pt", 2, process)
        process.kill()
        process.wait()
        hub.commit("Skylion007/openwebtext", {"data/train-00000-of-00002.parquet": files.popitem()[1]}, type="dataset")
        done = run([*script, str(tmp_path / "b.pt")])
        assert done.returncode == 0, done.stderr
        again = open_activations(tmp_path / "b.pt")
        assert again.sha256 == whole.sha256 and again.info["dataset_revision"] == data_commit

        # dealt out to two processes: each text once
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = run([*torchrun, *script[1:], str(tmp_path / "c"), "--revision", data_commit])
        assert done.returncode == 0, done.stderr
        both = open_activations(tmp_path / "c")
        assert both.info["n_texts"] == 50 and len(both.text_ids.unique()) == 50
        assert not hub.seen("OUTSIDE")
