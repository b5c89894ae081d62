"""Sweeps: what the grid becomes, that members are bit for bit what `train` gives, and what survives what."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from small_run import rows_without_rate

from mechint.cli.sweep import main, table_text
from mechint.config import TRAIN_PRESETS, SAETrainConfig, SweepConfig, preset_values
from mechint.config.presets import learning_rate_for
from mechint.config.train import architecture_names
from mechint.data.store import open_activations
from mechint.errors import MechintError
from mechint.report.frontier import best_of, frontier
from mechint.report.style import save_figure
from mechint.train import sweep_loop, train
from mechint.train.sweep import conclude, resume, start, train_members
from mechint.train.sweep_loop import Crew
from mechint.train.sweep_record import is_pareto, open_sweep
from mechint.train.sweep_share import deal, run_share, submit

D_IN = 24
SHORT = ("batch_size=256", "warmup_steps=10", "lambda_warmup_steps=20", "save_every=20")


@pytest.fixture(scope="module")
def activations_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare .pt: sparse combinations of 60 directions, an offset, a little noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(60, D_IN, generator=generator), dim=1)
    strengths = torch.rand(6000, 60, generator=generator) * 3 * (torch.rand(6000, 60, generator=generator) < 0.05)
    rows = strengths @ directions + 0.02 * torch.randn(6000, D_IN, generator=generator) + 0.3
    path = tmp_path_factory.mktemp("activations") / "acts.pt"
    torch.save(rows, path)
    return path


def config_for(path: Path, root: Path, **changes) -> SweepConfig:
    settings = dict(
        activations_path=str(path),
        expansion=(4,),
        learning_rate=(1e-3,),
        epochs=60,
        settings=SHORT,
        name="s",
        runs_root=str(root / "runs"),
        device="cpu",
    )
    return SweepConfig(**{**settings, **changes})


def flags_for(path: Path, root: Path, *more: str, steps: int = 60, name: str = "s") -> list[str]:
    return [
        *("--activations-path", str(path), "--expansion", "4", "--lr", "1e-3", "--steps", str(steps)),
        *("--set", *SHORT, "--name", name, "--runs-root", str(root / "runs"), "--device", "cpu", *more),
    ]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def without_times(summary: Path) -> dict:
    return {key: value for key, value in json.loads(summary.read_text()).items() if not key.endswith("_seconds")}


def run_all(config: SweepConfig, *, n_threads: int = 2):
    sweep, activations = start(config)
    names = [member.name for member in sweep.members]
    train_members(sweep, names, activations, progress=False, n_threads=n_threads)
    rows = conclude(sweep, activations, progress=False)
    assert rows is not None
    return sweep, rows


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, metrics and summary of two run directories are equal to the bit, times aside."""
    assert sha256(one / "checkpoint.pt") == sha256(other / "checkpoint.pt")
    assert sha256(one / "sae" / "sae_weights.safetensors") == sha256(other / "sae" / "sae_weights.safetensors")
    assert rows_without_rate(one / "metrics.csv") == rows_without_rate(other / "metrics.csv")
    assert without_times(one / "summary.json") == without_times(other / "summary.json")


def train_alone(sweep, root: Path) -> dict[str, Path]:
    """Each member trained by `train` with its config alone."""
    paths = {}
    for member in sweep.members:
        config = SAETrainConfig.from_dict({**member.config.to_dict(), "runs_root": str(root / "alone")})
        paths[member.name] = train(config, progress=False).root
    return paths


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_a_grid_leaves_out_what_does_not_apply_and_has_no_member_twice(activations_path: Path, tmp_path: Path):
    config = config_for(
        activations_path,
        tmp_path,
        architecture=("standard", "topk", "gated"),
        l1_lambda=(1.0, 2.0, 1.0),
        k=(4.0, 8.0),
        seed=(0, 1),
    )
    sweep, _ = start(config)
    names = [member.name for member in sweep.members]
    assert sorted(names) == sorted(
        [f"{a}-lam{lam}-seed{s}" for a in ("standard", "gated") for lam in (1, 2) for s in (0, 1)]
        + [f"topk-k{k}-seed{s}" for k in (4, 8) for s in (0, 1)]
    )
    by_name = {member.name: member.config for member in sweep.members}
    assert by_name["standard-lam2-seed1"].k is None
    assert by_name["standard-lam2-seed1"].l1_lambda == 2.0
    assert by_name["topk-k8-seed0"].k == 8.0
    assert by_name["topk-k8-seed0"].l1_lambda == SAETrainConfig().l1_lambda
    assert by_name["gated-lam1-seed0"].batch_size == 256
    assert [member.config for member in open_sweep(sweep.path).members] == [member.config for member in sweep.members]


def test_settings_come_from_flags_over_preset_over_file(activations_path: Path, tmp_path: Path):
    file = tmp_path / "base.json"
    file.write_text(json.dumps({"steps": 7, "batch_size": 64, "init": "xavier", "k": 3, "architecture": "topk"}))
    config = config_for(
        activations_path,
        tmp_path,
        epochs=None,
        architecture=("topk", "standard"),
        settings=("save_every=5",),
        preset="mechint",
        config=file,
    )
    preset = TRAIN_PRESETS["mechint"]
    assert preset["init"] != "xavier"
    topk, standard = (member.config for member in start(config)[0].members)
    assert (topk.epochs, topk.batch_size, topk.init, topk.save_every) == (7, 64, preset["init"], 5)
    assert (topk.k, standard.k) == (3.0, None)
    assert topk.activation_dim == D_IN


def test_members_have_what_the_preset_says_for_their_architecture(activations_path: Path, tmp_path: Path):
    grid = {"architecture": ("standard", "matryoshka_batchtopk", "jumprelu"), "preset": "mechint"}
    names = ("learning_rate", "decay_share", "bandwidth")

    def members(**more) -> list[list]:
        found = start(config_for(activations_path, tmp_path, **{"learning_rate": None, **grid, **more}))[0].members
        return [[getattr(member.config, name) for name in names] for member in found]

    own = [preset_values("mechint", name) for name in grid["architecture"]]
    found = members(name="a")
    assert [row[1:] for row in found] == [[values.get(name) for name in names[1:]] for values in own]
    d_sae = start(config_for(activations_path, tmp_path, name="e", **grid))[0].members[0].config.num_features
    assert [row[0] for row in found] == [learning_rate_for(name, d_sae) for name in grid["architecture"]]
    assert len({tuple(row) for row in members(name="b")}) == 3
    # what is said for all of them holds for all of them
    assert [row[0] for row in members(name="c", learning_rate=(0.25,))] == [0.25] * 3
    assert [row[1] for row in members(name="d", settings=("decay_share=0.25",))] == [0.25] * 3


def test_a_preset_may_say_more_than_an_architecture_needs(activations_path: Path, tmp_path: Path):
    config = config_for(activations_path, tmp_path, architecture=("topk",), k=(4.0, 8.0), preset="mechint")
    assert [member.config.preset for member in start(config)[0].members] == ["mechint"] * 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lam"], "--lam names no value: that is a grid of no members"),
        (["--architecture", "standard", "topkk"], "unknown --architecture 'topkk'; nearest: topk"),
        (["--architecture", "standard", "--k", "4"], "--k applies to none of the architectures standard"),
        (["--architecture", "topk", "--lam", "1", "2"], "--lam applies to none of the architectures topk"),
        (
            ["--architecture", "topk", "--k", "4", "97"],
            "member topk-k97: --k must be a whole number from 1 to d_sae = 96",
        ),
        (["--lam", "1", "-2"], "member standard-lam-2: --l1-lambda must not be negative"),
        (["--lam", "1", "--expansion", "0"], "--expansion must be at least 1"),
        (["--lam", "1", "--set", "batch_sise=3"], "train has no setting 'batch_sise'; nearest: batch_size"),
        (["--lam", "1", "--set", "seed=3"], "--set seed: a sweep has a flag of its own for that"),
        (["--lam", "1", "--set", "batch_size=6000"], "--batch-size 6000 is more than the 5700 rows"),
        (["--lam", "1", "--set", "track=wandb"], "track 'wandb' follows one run a process"),
        (["--lam", "1", "--set", "kernel=fast"], "unknown kernel 'fast'"),
        (["--architecture", "topk", "--target-l0", "3"], "--target-l0 applies to none of the architectures topk"),
        (["--lam", "1", "--set", "target_l0=3"], "--set target_l0: a sweep has a flag of its own for that"),
        (["--lam", "1", "--name", "a/b"], "must be one folder name"),
        (["--lam", "1", "--eval-texts", "-1"], "--eval-texts must not be negative"),
        (["--lam", "1", "--resume", "runs/x"], "beside --resume: a sweep goes on with the settings it has"),
    ],
)
def test_bad_grids_are_one_line_and_write_nothing(
    flags: list[str], said: str, activations_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    base = flags_for(activations_path, tmp_path)
    for flag in ("--expansion", "--set", "--name"):
        if flag in flags:
            at = base.index(flag)
            end = next((i for i in range(at + 1, len(base)) if base[i].startswith("--")), len(base))
            base = base[:at] + base[end:]
    assert main([*base, *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_sweep_needs_something_that_varies(activations_path: Path, capsys: pytest.CaptureFixture):
    assert main(["--activations-path", str(activations_path)]) == 2
    assert "nothing varies" in capsys.readouterr().err


def test_a_name_that_exists_is_refused_with_the_command_to_go_on(
    activations_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    start(config_for(activations_path, tmp_path, l1_lambda=(1.0,)))
    assert main(flags_for(activations_path, tmp_path, "--lam", "1")) == 2
    path = tmp_path / "runs" / "s"
    assert f"{path} exists: give the sweep another --name, or go on with it: " in (error := capsys.readouterr().err)
    assert f"scripts/sweep.py --resume {path}" in error
    assert main(["--resume", str(tmp_path / "runs")]) == 2
    assert "is not a sweep" in capsys.readouterr().err


# --- the same result as train -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_threads", [1, 3])
def test_members_are_what_train_gives_alone_to_the_bit(n_threads: int, activations_path: Path, tmp_path: Path):
    config = config_for(
        activations_path, tmp_path, architecture=("standard", "topk"), l1_lambda=(1.0, 3.0), k=(4.0,), seed=(0, 1)
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        sweep, rows = run_all(config, n_threads=n_threads)
        assert torch.get_num_threads() == n_threads
        assert [row["status"] for row in rows] == ["done"] * 6
        for name, alone in train_alone(sweep, tmp_path).items():
            assert_same_run(sweep.path / name, alone)
        assert not list(sweep.path.glob("*/state"))
        torch.set_num_threads(1)  # weights do not depend on the threads; sums of the summary do, in their last digits
        for name, alone in train_alone(sweep, tmp_path).items():
            assert_weights_equal(sweep.path / name, alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architecture_names())
def test_every_architecture_is_what_train_gives_alone(architecture: str, activations_path: Path, tmp_path: Path):
    revive = ("revive=auxk", "dead_after=2560", "normalize_inputs=mean-norm", "b_dec_init=mean")
    config = config_for(
        activations_path, tmp_path, architecture=(architecture,), learning_rate=(1e-3, 3e-3), settings=SHORT + revive
    )
    sweep, rows = run_all(config)
    assert [row["status"] for row in rows] == ["done"] * 2
    for name, alone in train_alone(sweep, tmp_path).items():
        assert_same_run(sweep.path / name, alone)


@pytest.mark.parametrize("order", ["shuffle", "counter", "torch"])
def test_each_batch_is_read_once_for_all_members_with_its_seed(order: str, activations_path: Path, tmp_path: Path):
    config = config_for(
        activations_path,
        tmp_path,
        l1_lambda=(1.0, 2.0, 3.0, 4.0),
        seed=(0, 1),
        settings=(*SHORT, f"batch_order={order}"),
    )
    sweep, activations = start(config)
    crew = Crew(sweep.members, activations, stop=threading.Event(), n_threads=2)
    for worker in crew.start():
        worker.join()
    assert [member.status for member in sweep.members] == ["done"] * 8
    assert crew.batches.n_read == 2 * 60


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_member_that_fails_does_not_stop_the_others(
    activations_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    flags = flags_for(activations_path, tmp_path, "--lam", "1", "2", "--lr", "1e-3", "1e30")
    flags = [flag for i, flag in enumerate(flags) if i not in (4, 5)]  # --lr is given once
    assert main(flags) == 2
    out, err = capsys.readouterr()
    path = tmp_path / "runs" / "s"
    assert "failed: standard-lam1-lr1e+30: the loss is" in err and "Traceback" not in err
    assert out.count("failed") >= 2
    entries = {entry["name"]: entry for entry in json.loads((path / "sweep.json").read_text())["members"]}
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "standard-lam1-lr0.001": "done",
        "standard-lam2-lr0.001": "done",
        "standard-lam1-lr1e+30": "failed",
        "standard-lam2-lr1e+30": "failed",
    }
    assert "lower --learning-rate" in entries["standard-lam2-lr1e+30"]["error"]
    rows = list(csv.DictReader((path / "results.csv").open()))
    assert [row["status"] for row in rows] == ["done", "done", "failed", "failed"]
    assert "the loss is" in rows[-1]["error"] and float(rows[0]["fvu"]) > 0
    assert (path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    # tried again by --resume: with the cause still there, the same end
    assert main(["--resume", str(path)]) == 2


def test_running_out_of_memory_fails_one_member_and_resume_finishes_it(
    activations_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    really = sweep_loop.advance

    def advance(training, x):
        if training.config.l1_lambda == 2.0 and training.state.step == 30:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return really(training, x)

    monkeypatch.setattr(sweep_loop, "advance", advance)
    sweep, rows = run_all(config_for(activations_path, tmp_path, l1_lambda=(1.0, 2.0)))
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert "lower --batch-size (now 256) or --expansion (now 4)" in rows[1]["error"]
    monkeypatch.setattr(sweep_loop, "advance", really)
    stamp = (sweep.path / "standard-lam1" / "manifest.json").stat().st_mtime_ns
    assert main(["--resume", str(sweep.path)]) == 0
    assert (sweep.path / "standard-lam1" / "manifest.json").stat().st_mtime_ns == stamp
    assert [member.status for member in open_sweep(sweep.path).members] == ["done", "done"]
    for name, alone in train_alone(sweep, tmp_path).items():
        assert_weights_equal(sweep.path / name, alone)


def assert_weights_equal(one: Path, other: Path) -> None:
    assert sha256(one / "checkpoint.pt") == sha256(other / "checkpoint.pt")
    assert rows_without_rate(one / "metrics.csv") == rows_without_rate(other / "metrics.csv")


def test_a_mistake_of_ours_in_one_member_is_recorded_with_its_traceback(
    activations_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    really = sweep_loop.prepare

    def prepare(config, *args, **kwargs):
        assert config.l1_lambda != 2.0, "a bug"
        return really(config, *args, **kwargs)

    monkeypatch.setattr(sweep_loop, "prepare", prepare)
    _, rows = run_all(config_for(activations_path, tmp_path, l1_lambda=(1.0, 2.0)))
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert rows[1]["error"].startswith("AssertionError: a bug")
    assert "Traceback" in capsys.readouterr().err


def test_activations_that_changed_are_refused(activations_path: Path, tmp_path: Path):
    copy = tmp_path / "acts.pt"
    rows = torch.load(activations_path, weights_only=True)
    torch.save(rows, copy)
    sweep, _ = start(config_for(copy, tmp_path, l1_lambda=(1.0,)))
    torch.save(rows + 1, copy)
    with pytest.raises(MechintError, match="has changed since the sweep began"):
        resume(sweep.path)


def test_two_processes_do_not_train_one_member(activations_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    sweep, activations = start(config_for(activations_path, tmp_path, l1_lambda=(1.0, 2.0)))
    lock = sweep.members[0].claim()
    assert lock is not None and sweep.members[0].claim() is None
    train_members(sweep, [member.name for member in sweep.members], activations, progress=False)
    assert "standard-lam1: another process is training it" in capsys.readouterr().out
    assert [member.status for member in sweep.members] == ["waiting", "done"]
    assert conclude(sweep, activations, progress=False) is None
    lock.close()
    assert main(["--resume", str(sweep.path)]) == 0


# --- stopping and going on --------------------------------------------------------------------------------------------


def start_process(arguments: list[str], **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mechint", "sweep", *arguments]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def rows_of(metrics: Path) -> int:
    return len(metrics.read_text().splitlines()) - 1 if metrics.is_file() else 0


LONG = dict(l1_lambda=(1.0, 2.0, 3.0), epochs=500, settings=(*SHORT[:3], "save_every=35", "log_every=10"))


@pytest.fixture(scope="module")
def whole(activations_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nobody stopped."""
    root = tmp_path_factory.mktemp("whole")
    return run_all(config_for(activations_path, root, name="whole", **LONG))[0].path


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_goes_on_to_the_same_bits_and_leaves_the_finished(
    number: signal.Signals, whole: Path, activations_path: Path, tmp_path: Path
):
    sweep, activations = start(config_for(activations_path, tmp_path, name="cut", **LONG))
    train_members(sweep, ["standard-lam2"], activations, progress=False)
    stamp = (sweep.path / "standard-lam2" / "manifest.json").stat().st_mtime_ns

    process = start_process(["--resume", str(sweep.path)])
    wait_for(lambda: rows_of(sweep.path / "standard-lam3" / "metrics.csv") >= 6, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert f"To go on: python scripts/sweep.py --resume {sweep.path}" in err
    left = {member.name: member.status for member in open_sweep(sweep.path).members}
    assert left == {"standard-lam1": "unfinished", "standard-lam2": "done", "standard-lam3": "unfinished"}

    assert main(["--resume", str(sweep.path)]) == 0
    assert (sweep.path / "standard-lam2" / "manifest.json").stat().st_mtime_ns == stamp
    for member in sweep.members:
        assert_weights_equal(sweep.path / member.name, whole / member.name)
        if member.name != "standard-lam2":
            resumed = json.loads((sweep.path / member.name / "manifest.json").read_text())["resumed_at"]
            assert len(resumed) == 1 and resumed[0] >= 35


# --- several processes ------------------------------------------------------------------------------------------------


def test_members_are_dealt_like_cards():
    assert deal(["a", "b", "c", "d", "e"], 2) == [["a", "c", "e"], ["b", "d"]]


def test_the_last_of_several_shares_writes_the_table(activations_path: Path, tmp_path: Path):
    sweep, _ = start(config_for(activations_path, tmp_path, l1_lambda=(1.0, 2.0, 3.0)))
    first, second = deal([member.name for member in sweep.members], 2)
    assert run_share(sweep.path, first) is None
    assert not (sweep.path / "results.csv").exists()
    rows = run_share(sweep.path, second)
    assert rows is not None and [row["status"] for row in rows] == ["done"] * 3
    assert (sweep.path / "results.csv").is_file()


@pytest.mark.slow
def test_torchrun_deals_members_to_ranks(activations_path: Path, tmp_path: Path):
    script = Path(__file__).parent.parent / "scripts" / "sweep.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    flags = flags_for(activations_path, tmp_path, "--lam", "1", "2", "3")
    done = subprocess.run([sys.executable, *launcher, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "runs" / "s"
    assert done.stdout.count(f"results: {path / 'results.csv'}") >= 1
    assert [member.status for member in open_sweep(path).members] == ["done"] * 3
    assert (path / "frontier.png").is_file()
    bad = subprocess.run([sys.executable, *launcher, *flags], capture_output=True, text=True, timeout=120)
    assert bad.returncode != 0 and "exists: give the sweep another --name" in bad.stderr


@pytest.mark.slow
def test_a_rank_that_dies_leaves_its_members_to_resume_and_nobody_waits(activations_path: Path, tmp_path: Path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = flags_for(activations_path, tmp_path, "--lam", "1", "2", "3", "4", steps=400)
    flags[flags.index("save_every=20")] = "log_every=10"
    at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [start_process(flags, RANK=str(rank), LOCAL_RANK=str(rank), **at) for rank in range(2)]
    path = tmp_path / "runs" / "s"
    wait_for(lambda: rows_of(path / "standard-lam2" / "metrics.csv") >= 2, ranks[1])
    ranks[1].kill()
    ranks[1].wait()
    out, err = ranks[0].communicate(timeout=120)
    assert ranks[0].returncode == 0, err
    assert f"standard-lam2, standard-lam4. If none runs any more: python scripts/sweep.py --resume {path}" in out
    assert [member.status for member in open_sweep(path).members] == ["done", "unfinished", "done", "unfinished"]
    assert main(["--resume", str(path)]) == 0
    assert (path / "results.csv").is_file()


@pytest.mark.slow
def test_jobs_of_a_cluster_share_the_members(activations_path: Path, tmp_path: Path):
    pytest.importorskip("submitit")
    config = config_for(activations_path, tmp_path, l1_lambda=(1.0, 2.0, 3.0), slurm=True, slurm_jobs=2)
    sweep, _ = start(config)
    jobs = submit(sweep, config, cluster="local")
    assert [job.result() for job in jobs] == [0, 0]
    assert [member.status for member in sweep.members] == ["done"] * 3
    assert (sweep.path / "results.csv").is_file() and (sweep.path / "slurm").is_dir()


def test_slurm_says_what_is_missing(
    activations_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    flags = flags_for(activations_path, tmp_path, "--lam", "1", "--slurm")
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(flags) == 2
    assert capsys.readouterr().err == "error: --slurm needs submitit, which is not installed: pip install submitit\n"
    monkeypatch.setitem(sys.modules, "submitit", sys)  # anything that can be imported
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(flags) == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# --- the table and the figure -----------------------------------------------------------------------------------------


def row(architecture: str, l0: float | None, fvu: float | None, **more) -> dict:
    names = ("member", "architecture", "l0", "fvu", "ce_recovered_mean", "dead_features", "training_seconds", "pareto")
    values = dict.fromkeys((*names, "error")) | {"architecture": architecture, "l0": l0, "fvu": fvu, "status": "done"}
    return values | {"member": f"{architecture}-{l0}"} | more


def test_frontier_members_are_those_that_none_beats():
    rows = [row("a", 10, 0.3), row("a", 20, 0.2), row("b", 15, 0.25), row("b", 25, 0.2), row("b", 10, 0.4)]
    assert [is_pareto(one, rows) for one in rows] == [True, True, True, False, False]
    assert best_of([(1.0, 3.0), (2.0, 4.0), (3.0, 1.0), (1.0, 2.0)], -1) == [(1.0, 2.0), (3.0, 1.0)]
    assert best_of([(1.0, 0.5), (2.0, 0.4), (3.0, 0.9)], 1) == [(1.0, 0.5), (3.0, 0.9)]


def test_the_figure_has_a_line_an_architecture_and_says_why_a_panel_is_empty(tmp_path: Path):
    rows = [row("a", 10, 0.3, pareto=True), row("a", 20, 0.2), row("b", 15, 0.25), row("b", None, None)]
    fig = frontier(rows, note_text="no model here")
    left, right = fig.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["a", "b", "on the frontier"]
    assert len(left.lines) == 5
    assert "no model here" in [text.get_text() for text in right.texts]
    save_figure(fig, tmp_path / "f.png")
    full = frontier([one | {"ce_recovered_mean": 0.9} for one in rows])
    assert full.axes[1].get_legend() is not None
    frontier([row("a", None, None)])


def test_the_printed_table_is_aligned_and_marks_the_frontier_and_the_failed():
    rows = [row("a", 10.0, 0.3, pareto=True), row("b", None, None, status="failed")]
    assert table_text(rows).splitlines() == [
        "member    L0     FVU  CE rec.  dead  seconds",
        "a-10.0  10.0  0.3000        -     -        -  *",
        "b-None     -       -        -     -        -  failed",
    ]


@pytest.mark.slow
def test_cross_entropy_is_what_eval_measures(tmp_path: Path):
    from mechint.config import CollectConfig, EvalConfig
    from mechint.data.collect import collect
    from mechint.eval import evaluate_checkpoint

    store = tmp_path / "store"
    collect(
        CollectConfig(model="builtin/pythia-tiny", dataset="builtin/tales", num_texts=120, output=store),
        progress=False,
    )
    sweep, rows = run_all(
        config_for(store, tmp_path, expansion=(2,), architecture=("topk",), k=(8.0, 32.0), eval_texts=4)
    )
    assert sweep.info["notes"] == []
    for found in rows:
        alone = evaluate_checkpoint(EvalConfig(run_dir=sweep.path / found["member"], max_eval_texts=4, device="cpu"))
        for name in ("ce_recovered_mean", "ce_recovered_zero", "kl_clean_sae"):
            assert found[name] == pytest.approx(alone[name], abs=1e-6)
    assert rows[0]["ce_recovered_mean"] < rows[1]["ce_recovered_mean"]
    assert open_activations(store).n_rows > 0
