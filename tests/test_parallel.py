"""Several processes train one SAE: the same result as one, to rounding; and none waits for one that is gone."""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import in_float64

from mechint.config import SAETrainConfig
from mechint.data.ranks import Ranks, launcher
from mechint.data.watch import limit_seconds
from mechint.errors import MechintError
from mechint.runs import Run
from mechint.sae import StandardSAE, load_sae
from mechint.train import resume, train
from mechint.train.parallel import DataTeam, check_same
from mechint.train.parallel_latents import LatentPeers, LatentTeam
from mechint.train.state import TrainState
from mechint.train.team import make_team

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [sys.executable, str(ROOT / "scripts" / "train_sae.py")]
D_IN = 24

AUXK = {"revive": "auxk", "dead_after": 2000, "k_aux": 6}
CASES: dict[str, dict[str, Any]] = {
    "standard": {"init_l0": 1.0, **AUXK},
    "topk": {"architecture": "topk", "k": 6.0, **AUXK},
    "batchtopk": {"architecture": "batchtopk", "k": 6.0, **AUXK},
    "jumprelu": {"architecture": "jumprelu", "l1_lambda": 0.1, "init_l0": 1.0, **AUXK},
    "jumprelu-tanh": {"architecture": "jumprelu", "penalty": "tanh", "l1_lambda": 0.1},
    "jumprelu-quadratic": {
        "architecture": "jumprelu",
        "penalty": "quadratic",
        "target_l0": 6.0,
        "pre_act_coefficient": 1e-3,
        "dead_after": 500,
        "init_l0": 1.0,
    },
    "gated": {"architecture": "gated", "init_l0": 1.0, "target_l0": 3.0, **AUXK},
    "matryoshka": {"architecture": "matryoshka_batchtopk", "k": 6.0, **AUXK},
    "matryoshka-drawn": {"architecture": "matryoshka_batchtopk", "k": 6.0, "prefixes": 3},
    "resample": {"architecture": "topk", "k": 2.0, "revive": "resample", "resample_every": 40, "dead_after": 1000},
    "free": {
        "decoder": "free",
        "init": "tied",
        "init_decoder_norm": 0.1,
        "l1_reduction": "sum",
        "l1_lambda": 0.3,
        "normalize_inputs": "mean-norm",
        "b_dec_init": "median",
    },
    "projected": {"project_gradient": True, "max_grad_norm": 0.01},
    "mechint": {"preset": "mechint"},
}
# The fastest kernel that there is takes its rows as the dense one does.
ROWS_ONLY: dict[str, dict[str, Any]] = {
    "auto": {"kernel": "auto"},
    "auto-batchtopk": {"kernel": "auto", "architecture": "batchtopk", "k": 6.0},
}


@pytest.fixture(scope="module")
def activations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(60, D_IN, generator=generator), dim=1)
    strengths = torch.rand(6000, 60, generator=generator) * 3 * (torch.rand(6000, 60, generator=generator) < 0.05)
    rows = strengths @ directions + 0.02 * torch.randn(6000, D_IN, generator=generator) + 0.3
    path = tmp_path_factory.mktemp("activations") / "acts.pt"
    torch.save(rows, path)
    return path


def settings_for(activations: Path, root: Path, name: str, **changes: Any) -> dict[str, Any]:
    settings = {
        "activations_path": str(activations),
        "activation_dim": D_IN,
        "expansion": 4,
        "epochs": 200,
        "batch_size": 256,
        "l1_lambda": 1.0,
        "learning_rate": 1e-3,
        "warmup_steps": 10,
        "lambda_warmup_steps": 20,
        "log_every": 8,
        "save_every": 100,
        "device": "cpu",
        "kernel": "dense",
        "runs_root": str(root),
        "run_name": name,
    }
    return {**settings, **changes}


def environment(rank: int, world_size: int, port: int, **more: str) -> dict[str, str]:
    """What torchrun sets, without its launcher: rank 0 keeps the store."""
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def processes(command: list[str], world_size: int = 2, **more: str) -> Iterator[list[subprocess.Popen[str]]]:
    """The command in several processes; those that are still there at the end are killed."""
    port, pipe = free_port(), subprocess.PIPE
    running = [
        subprocess.Popen(command, env=environment(rank, world_size, port, **more), text=True, stdout=pipe, stderr=pipe)
        for rank in range(world_size)
    ]
    try:
        yield running
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
                process.wait()


def finish_all(running: list[subprocess.Popen[str]], timeout: float = 240) -> None:
    for process in running:
        _, said = process.communicate(timeout=timeout)
        assert process.returncode == 0, said


@pytest.fixture(scope="module")
def trained(activations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case as one process trains it (`one/`), as two do with half the rows each (`rows/`), and with half the
    latents each (`latents/`)."""
    root = tmp_path_factory.mktemp("trained")
    jobs = [settings_for(activations, root / "rows", name, **changes) for name, changes in (CASES | ROWS_ONLY).items()]
    for name, changes in CASES.items():
        jobs.append(settings_for(activations, root / "latents", name, shard_latents=True, **changes))
    (root / "jobs.json").write_text(json.dumps(jobs))
    worker = Path(__file__).with_name("parallel_worker.py")
    with processes([sys.executable, str(worker), str(root / "jobs.json")]) as two:
        for name, changes in (CASES | ROWS_ONLY).items():
            with contextlib.nullcontext() if name in ROWS_ONLY else in_float64():
                train(
                    SAETrainConfig.from_dict(settings_for(activations, root / "one", name, **changes)), progress=False
                )
        finish_all(two, 500)
    return root


def rows_of(metrics: Path) -> list[dict[str, float]]:
    with open(metrics) as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def assert_end_alike(summaries: list[dict[str, Any]], last: list[dict[str, float]]) -> None:
    """Of two trainings in float32 that ran by themselves: what four seeds of these runs spread by (standard deviations
    of 4 to 8 % of val_mse, 2 to 3 % of L0, no latent dead in any)."""
    assert summaries[1]["val_mse"] == pytest.approx(summaries[0]["val_mse"], rel=0.04)
    assert summaries[1]["l0"] == pytest.approx(summaries[0]["l0"], rel=0.03)
    assert abs(last[1]["dead"] - last[0]["dead"]) <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "how,name", [("rows", name) for name in CASES | ROWS_ONLY] + [("latents", name) for name in CASES]
)
def test_two_processes_train_what_one_does(trained: Path, how: str, name: str):
    one, two = Run(trained / "one" / name), Run(trained / how / name)
    alone, together = rows_of(one.path / "metrics.csv"), rows_of(two.path / "metrics.csv")
    assert len(alone) == len(together) > 20
    assert all(a.keys() == b.keys() for a, b in zip(alone, together, strict=True))
    summaries = [json.loads((run.path / "summary.json").read_text()) for run in (one, two)]
    if name in ROWS_ONLY:  # these kernels know float32 alone
        for key in ("loss", "mse", "l1"):  # from the same weights: sums of 24,576 terms, sqrt(24,576) * 2^-24
            assert together[0][key] == pytest.approx(alone[0][key], rel=1e-5, abs=1e-7), key
        # and one entry that falls on the other side of its bound is one part of those
        assert together[0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=1e-4)
        assert_end_alike(summaries, [alone[-1], together[-1]])
    else:  # in float64 sums in another order stay within 1e-9 over 200 steps: see `in_float64`
        for a, b in zip(alone, together, strict=True):
            for key in a.keys() - {"vectors_per_second"}:
                assert b[key] == pytest.approx(a[key], rel=1e-9, abs=1e-9), (key, a["step"])
        first, second = load_sae(one.path), load_sae(two.path)
        for key, value in first.named_parameters():  # saved in float32
            torch.testing.assert_close(second.get_parameter(key), value, rtol=2**-23, atol=1e-9, msg=key)
        assert summaries[1]["val_mse"] == pytest.approx(summaries[0]["val_mse"], rel=1e-6)
    assert summaries[1]["num_params"] == summaries[0]["num_params"]
    manifest = json.loads((two.path / "manifest.json").read_text())
    assert (manifest["processes"], manifest["processes_share"]) == (2, how)


@pytest.mark.slow
def test_cases_reach_what_they_are_about(trained: Path):
    """AuxK and resampling had dead latents to work on."""
    for name, changes in CASES.items():
        rows = rows_of(trained / "one" / name / "metrics.csv")
        if changes.get("revive") == "auxk":
            assert max(row["auxk"] for row in rows) > 0, name
    assert max(row["dead"] for row in rows_of(trained / "one" / "resample" / "metrics.csv")) > 10
    assert max(row["pre_act"] for row in rows_of(trained / "one" / "jumprelu-quadratic" / "metrics.csv")) > 0


# --- stopping and going on --------------------------------------------------------------------------------------------


def command(activations: Path, root: Path, name: str, **changes: Any) -> list[str]:
    words = list(TRAIN)
    for key, value in settings_for(activations, root, name, **changes).items():
        flag = f"--{key.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return words


def wait_for_step(run: Path, step: int, running: list[subprocess.Popen[str]], timeout: float = 120) -> None:
    """Until metrics.csv has a row of that step or a later one."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        path = run / "metrics.csv"
        if path.is_file() and (rows := rows_of(path)) and rows[-1]["step"] >= step:
            return
        assert all(process.poll() is None for process in running), running[0].communicate()[1]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def weights_hash(run: Path) -> str:
    return hashlib.sha256((run / "checkpoint.pt").read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["rows", "latents"])
def test_a_signal_to_one_process_stops_all_at_one_step_and_resume_goes_on(activations: Path, tmp_path: Path, how: str):
    changes: dict[str, Any] = dict(architecture="batchtopk", k=6.0, epochs=300, save_every=0, log_every=1)
    if how == "latents":
        changes["shard_latents"] = True
    with processes(command(activations, tmp_path, "whole", **changes)) as two:
        finish_all(two)
    with processes(command(activations, tmp_path, "stopped", **changes)) as two:
        wait_for_step(tmp_path / "stopped", 20, two)
        two[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=60)[1] for process in two]
        assert [process.returncode for process in two] == [130, 130], said
    assert "--resume" in said[0] and "stopped" not in said[1]
    stopped_at = torch.load(tmp_path / "stopped" / "state" / "state.pt", weights_only=True)["step"]
    assert 20 < stopped_at < 300
    shutil.copytree(tmp_path / "stopped", tmp_path / "alone")
    # the sums have the same order again: the same bits
    with processes([*TRAIN, "--resume", str(tmp_path / "stopped")]) as two:
        finish_all(two)
    assert weights_hash(tmp_path / "stopped") == weights_hash(tmp_path / "whole")
    assert not (tmp_path / "stopped" / "state").exists()
    # one process goes on with what two began; its sums have another order
    resume(tmp_path / "alone", progress=False)
    ended = [tmp_path / name for name in ("whole", "alone")]
    summaries = [json.loads((run / "summary.json").read_text()) for run in ended]
    assert_end_alike(summaries, [rows_of(run / "metrics.csv")[-1] for run in ended])


def ends_with_one_line(process: subprocess.Popen[str], within: float) -> str:
    started = time.monotonic()
    _, said = process.communicate(timeout=within + 30)
    assert time.monotonic() - started < within, said
    assert process.returncode not in (0, None), said
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 0])
def test_a_killed_process_ends_the_other_with_one_line(activations: Path, tmp_path: Path, killed: int):
    changes = dict(epochs=1_000_000, save_every=50, log_every=1)
    with processes(command(activations, tmp_path, "a", **changes)) as two:
        wait_for_step(tmp_path / "a", 60, two)
        two[killed].kill()
        line = ends_with_one_line(two[1 - killed], within=60)
    assert "gone" in line and f"--resume {tmp_path / 'a'}" in line and "torchrun --nproc-per-node 2" in line
    step = torch.load(tmp_path / "a" / "state" / "state.pt", weights_only=True)["step"]
    if killed == 1:  # the one that writes is left, and saves the step that it is at
        assert f"process {killed} of 2" in line and f"the state of step {step} is saved" in line
        assert step >= 60
    else:
        assert "last saved state" in line and step % 50 == 0


@pytest.mark.slow
def test_a_process_that_stops_answering_counts_as_gone(activations: Path, tmp_path: Path):
    changes = dict(epochs=1_000_000, save_every=50, log_every=1)
    with processes(command(activations, tmp_path, "a", **changes), MECHINT_RANK_TIMEOUT="4") as two:
        wait_for_step(tmp_path / "a", 60, two)
        two[1].send_signal(signal.SIGSTOP)
        line = ends_with_one_line(two[0], within=40)
        two[1].send_signal(signal.SIGCONT)
    assert "process 1 of 2 is gone: no sign of life for 4 s" in line and "--resume" in line


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_other(activations: Path, tmp_path: Path):
    """What only one process finds wrong, it says itself; the other does not wait."""
    words = command(activations, tmp_path, "a", epochs=1_000_000)
    with processes(words) as two:
        two[1].kill()
        two[1].wait()
        rank_1 = environment(1, 2, int(_port_of(two[0])))
        lame = [word if word != str(activations) else str(tmp_path / "other.pt") for word in words]
        torch.save(torch.load(activations, weights_only=True)[:, :23], tmp_path / "other.pt")
        other = subprocess.Popen(lame, env=rank_1, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            line = ends_with_one_line(other, within=60)
            assert "width 23" in line
            _, said = two[0].communicate(timeout=60)
            assert two[0].returncode == 2 and "error:" not in said, said
        finally:
            other.kill()


def _port_of(process: subprocess.Popen[str]) -> str:
    words = Path(f"/proc/{process.pid}/environ").read_bytes().decode().split("\0")
    return next(word.split("=", 1)[1] for word in words if word.startswith("MASTER_PORT="))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 0])
def test_a_killed_process_ends_a_collection(tmp_path: Path, killed: int):
    """Waiting for the others may take hours; waiting for one that is gone ends."""
    words = "--model builtin/pythia-tiny --dataset builtin/tales --num-texts 4000 --checkpoint-every 50 --device cpu"
    script = [sys.executable, str(ROOT / "scripts" / "collect_activations.py"), *words.split()]
    with processes([*script, "--output", str(tmp_path / "a")], MECHINT_RANK_TIMEOUT="4") as two:
        until = time.monotonic() + 120
        while len(list((tmp_path / "a").rglob("*.safetensors"))) < 4:
            assert time.monotonic() < until and all(process.poll() is None for process in two)
            time.sleep(0.05)
        two[killed].kill()
        line = ends_with_one_line(two[1 - killed], within=60)
    assert "gone" in line and "finished shards are kept; go on with: torchrun --nproc-per-node 2" in line
    assert not (tmp_path / "a" / "store.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--shard-latents"]])
def test_a_loss_that_is_not_finite_is_said_once(activations: Path, tmp_path: Path, how: list[str]):
    words = command(activations, tmp_path, "a", epochs=50, learning_rate=1e30, warmup_steps=0, max_grad_norm=1e30)
    with processes([*words, *how]) as two:
        line = ends_with_one_line(two[0], within=60)
        _, said = two[1].communicate(timeout=30)
    assert "the loss is" in line and "lower --learning-rate" in line
    assert two[1].returncode == 2 and "error:" not in said


@pytest.mark.slow
def test_torchrun(activations: Path, tmp_path: Path):
    """The command of the README: one writes and prints; what is wrong with a setting is said once."""
    words = command(activations, tmp_path, "a", epochs=30)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *words[1:]], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("val_mse:") == 1 and done.stdout.count("step 0:") + done.stderr.count("step 0:") == 1
    assert Run(tmp_path / "a").is_done
    done = subprocess.run(
        [*torchrun, *words[1:], "--batch-size", "255"], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert said == ["error: --batch-size 255 cannot be split over 2 processes in equal shares: use 254 or 256"], (
        done.stderr
    )
    assert not (tmp_path / "a-1").exists()


# --- without processes ------------------------------------------------------------------------------------------------


def test_what_cannot_be_dealt_out():
    def config(**changes: Any) -> SAETrainConfig:
        return SAETrainConfig(**{"activation_dim": 24, "expansion": 4, "batch_size": 256, "device": "cpu", **changes})

    three = Ranks(0, 3)
    with pytest.raises(MechintError, match="--batch-size 256 cannot be split over 3 processes.*use 255 or 258"):
        DataTeam(three, config())
    with pytest.raises(MechintError, match="--batch-size 2 cannot be split over 3 processes in equal shares: use 3"):
        DataTeam(three, config(batch_size=2))
    with pytest.raises(MechintError, match="100 latents cannot be split over 3 processes"):
        LatentTeam(three, config(activation_dim=25))
    with pytest.raises(MechintError, match="--kernel dense, not sparse"):
        LatentTeam(three, config(kernel="sparse"))
    with pytest.raises(MechintError, match="there is one: start with torchrun"):
        make_team(Ranks(), config(shard_latents=True))
    with pytest.raises(MechintError, match="--device cuda .* or cpu, not cuda:1"):
        make_team(three, config(batch_size=255, device="cuda:1"))


def test_weights_that_differ_between_processes_are_noticed(monkeypatch: pytest.MonkeyPatch):
    sae = StandardSAE(3, 8)
    state = TrainState(sae, torch.optim.Adam(sae.parameters()), torch.full((8,), -1))
    sent: list[torch.Tensor] = []
    # the other process sends what this one sent first
    monkeypatch.setattr(Ranks, "all_gather", lambda ranks, tensor: [sent.append(tensor) or tensor, sent[0]])
    check_same(Ranks(0, 2), state, dict(sae.state_dict()))
    with torch.no_grad():
        sae.W_enc[1, 2] = torch.nextafter(sae.W_enc[1, 2], torch.tensor(9.0))
    with pytest.raises(MechintError, match="no longer have the same weights"):
        check_same(Ranks(0, 2), state, dict(sae.state_dict()))


def test_shares_are_contiguous_and_whole():
    deals = [DataTeam(Ranks(rank, 4), SAETrainConfig(batch_size=8)).deal(torch.arange(8)) for rank in range(4)]
    assert [deal.tolist() for deal in deals] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    peers = [LatentPeers(Ranks(rank, 3), 4) for rank in range(3)]
    for start, stop in [(0, 12), (0, 3), (3, 9), (5, 6), (8, 12), (0, 0)]:
        found = [i + 4 * r for r, peer in enumerate(peers) for i in range(4)[peer.here(start, stop)]]
        assert found == list(range(start, stop))


def test_limit_and_launcher(monkeypatch: pytest.MonkeyPatch):
    assert limit_seconds() == 30.0
    monkeypatch.setenv("MECHINT_RANK_TIMEOUT", "soon")
    with pytest.raises(MechintError, match="MECHINT_RANK_TIMEOUT is the number of seconds.*'soon'"):
        limit_seconds()
    assert launcher("scripts/train_sae.py") == "python scripts/train_sae.py"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launcher("scripts/train_sae.py") == "torchrun --nnodes 2 --nproc-per-node 4 scripts/train_sae.py"
