"""`mechint plan`: predictions against what real runs take, the refusals, and how much memory there is to give."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mechint.cli.plan import main, table
from mechint.config import SAETrainConfig
from mechint.data.store import open_activations
from mechint.errors import MechintError
from mechint.kernels import StepSettings, make_kernel
from mechint.sae import ARCHITECTURES, build_sae
from mechint.train import plan as planning
from mechint.train import train
from mechint.train.plan import check_memory, make_plan, predict_disk
from mechint.train.plan_available import available_memory, read_vm_stat, resident_memory
from mechint.train.plan_memory import (
    CountTensors,
    kernel_name,
    measure_miniature,
    miniature_objective,
    predict_memory,
)
from mechint.train.plan_time import fall_steps, step_seconds
from mechint.train.training import make_optimizer

GB = 10**9


@pytest.fixture(scope="module")
def activations_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 vectors of width 64 around a mean."""
    path = tmp_path_factory.mktemp("plan") / "x.pt"
    torch.save(torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)) + 1, path)
    return path


@pytest.fixture
def config(activations_path: Path, tmp_path: Path) -> SAETrainConfig:
    return SAETrainConfig(
        activations_path=str(activations_path),
        activation_dim=64,
        expansion=8,
        batch_size=512,
        epochs=300,
        warmup_steps=0,
        runs_root=str(tmp_path / "runs"),
        device="cpu",
    )


# --- memory -----------------------------------------------------------------------------------------------------------


def test_tensors_are_counted_while_they_live():
    with CountTensors() as count:
        x = torch.zeros(1000)
        y = x + 1
        assert count.now() == 8000
        view = y[:10]  # no memory of its own, but it keeps y's alive
        del x, y
        assert count.now() == 4000
        del view
        assert count.now() == 0 and count.peak == 8000
        flags = torch.zeros(1000) > 0
        count.restart()
        flags.sum()  # cast to int64 as a whole on the way
        assert count.peak == 1000 + 8 + 8000


@pytest.mark.parametrize("revive", ["none", "auxk"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_miniature_grows_to_what_the_full_step_allocates(config: SAETrainConfig, architecture: str, revive: str):
    big = dataclasses.replace(
        config, architecture=architecture, batch_size=1024, expansion=16, revive=revive, dead_after=1
    )
    mini = measure_miniature(big, 20_000, expected_dead=0.25)
    with torch.random.fork_rng(), CountTensors() as count:
        sae = build_sae(architecture, 64, big.num_features)
        kernel = make_kernel(sae, make_optimizer(sae, big), kernel="dense")
        objective = miniature_objective(big, sae, 0.25, 1.0)
        x = torch.randn(big.batch_size, 64)
        for _ in range(2):
            count.restart()
            kernel.step(x, StepSettings(1e-4, 1.0, objective))
        full = count.peak - x.nbytes
    assert mini.weights == pytest.approx(
        4 * (2 * 64 * big.num_features + big.num_features + 64),
        rel=0.001 if architecture in ("standard", "topk", "batchtopk", "matryoshka_batchtopk") else 0.05,
    )
    assert mini.step / 1.1 + 4 * mini.weights == pytest.approx(full, rel=0.1)


def test_memory_grows_with_batch_dictionary_and_rows(config: SAETrainConfig):
    def peak(n_rows: int = 20_000, **changes: object) -> dict[str, int]:
        place = predict_memory(dataclasses.replace(config, **changes), n_rows, library=0, kernel="dense")[0]  # type: ignore[arg-type]
        return {phase.name: phase.n_bytes for phase in place.phases}

    base, batch, wide = peak(), peak(batch_size=5120), peak(expansion=80)
    assert batch["steps"] - base["steps"] > 8 * 4 * 512 * 512 * 4
    assert (
        batch["end"] == pytest.approx(base["end"], rel=0.05) and wide["steps"] - base["steps"] > 8 * 4 * 512 * 512 * 4
    )
    assert peak(n_rows=10**9)["before"] - base["before"] >= 8 * (10**9 - 20_000)
    assert peak(init_l0=20.0)["start"] > base["start"] + 19_000 * 512 * 4


def test_on_a_gpu_weights_and_step_count_there_and_rows_here(config: SAETrainConfig):
    places = predict_memory(
        dataclasses.replace(config, device="cuda:1"), 10**6, library=GB, mapped=7 * GB, kernel="dense"
    )
    gpu, host = places
    assert (gpu.device, host.device) == ("cuda", "cpu")
    on_gpu, here = ({part.name for phase in place.phases for part in phase.parts} for place in places)
    assert {"weights", "Adam", "gradients", "step buffers (dense)", "evaluation block"} <= on_gpu
    assert not {"library", "row numbers"} & on_gpu and not {"Adam", "evaluation block"} & here
    assert host.peak > GB and gpu.peak < GB


CHILD = """
import sys
from mechint.cli.flags import parse
from mechint.config import SAETrainConfig, preset_values
from mechint.data.store import open_activations
from mechint.train import train
from mechint.train.plan import _predictor
from mechint.train.plan_available import resident_memory
from mechint.train.plan_memory import EXPECTED_DEAD, kernel_name
config = parse(SAETrainConfig, sys.argv[1:], prog="train", presets=preset_values)
activations = open_activations(config.activations_path)
kernel = kernel_name(config)
(place,) = _predictor(activations, activations.n_rows, resident_memory(), kernel, EXPECTED_DEAD)(config)
train(config, progress=False)
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("result", kernel, place.fullest.name, place.peak + place.mapped, peak)
"""
RUNS = {
    "dense-standard": ("steps", "--kernel dense --batch-size 4096 --expansion 64"),
    "dense-gated": ("steps", "--kernel dense --architecture gated --batch-size 4096 --expansion 48"),
    "dense-auxk": ("steps", "--kernel dense --preset gao-2024 --dead-after 4096 --batch-size 4096 --expansion 64"),
    "sparse-standard": ("steps", "--batch-size 16384 --expansion 64"),
    "sparse-jumprelu": ("steps", "--architecture jumprelu --batch-size 8192 --expansion 64"),
    "sparse-batchtopk": ("end", "--architecture batchtopk --batch-size 4096 --expansion 64"),
    "wide": ("end", "--batch-size 64 --expansion 1024 --kernel dense --steps 2"),
    "median-start": ("start", "--preset mechint --b-dec-init median --batch-size 256 --init-l0 20 --expansion 8"),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", RUNS)
def test_peak_memory_of_a_real_run_is_within_a_factor_of_one_and_a_half(
    name: str, activations_path: Path, tmp_path: Path
):
    fullest, words = RUNS[name]
    flags = [
        *("--activations-path", str(activations_path), "--activation-dim", "64", "--steps", "3", "--device", "cpu"),
        *("--runs-root", str(tmp_path), "--warmup-steps", "0", *words.split()),
    ]
    # as a user's process: the threads of the machine, though another test may run beside this one
    env = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, "-c", CHILD, *flags], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    kernel, phase, predicted, measured = done.stdout.split("result ")[1].split()
    ratio = int(predicted) / int(measured)
    print(f"{name}: {kernel}, fullest in {phase}, predicted over measured {ratio:.2f}")
    assert phase == fullest, f"this run is meant to be fullest in {fullest}; {kernel} {ratio:.2f}"
    assert 1 / 1.5 < ratio < 1.5, f"predicted {predicted}, measured {measured}: {ratio:.2f}"


# --- disk -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "save_every"), [("standard", 10), ("standard", 25), ("standard", 0), ("gated", 10)]
)
def test_the_disk_of_a_real_run(
    config: SAETrainConfig, monkeypatch: pytest.MonkeyPatch, architecture: str, save_every: int
):
    config = dataclasses.replace(
        config, architecture=architecture, save_every=save_every, batch_size=64, expansion=64, epochs=30
    )
    sizes, replace = [], os.replace

    def used() -> int:
        return sum(path.stat().st_size for path in Path(config.runs_root).rglob("*") if path.is_file())

    def recording_replace(*args: str) -> None:
        sizes.append(used())  # what has been written is there, what it replaces too
        replace(*args)

    monkeypatch.setattr(os, "replace", recording_replace)
    train(config, progress=False)
    disk = predict_disk(config)
    assert disk.peak == pytest.approx(max(sizes), rel=0.05)
    assert disk.at_end == pytest.approx(used(), rel=0.05)


# --- refusals ---------------------------------------------------------------------------------------------------------


def there_is(monkeypatch: pytest.MonkeyPatch, n_bytes: int | None) -> None:
    """This process may have n_bytes more than it has."""
    monkeypatch.setattr(planning, "available_memory", lambda device: n_bytes)


def test_a_batch_that_cannot_fit_is_refused_with_the_largest_that_does(
    config: SAETrainConfig, monkeypatch: pytest.MonkeyPatch
):
    there_is(monkeypatch, GB)
    big = dataclasses.replace(config, batch_size=100_000, expansion=64, kernel="dense")
    with pytest.raises(MechintError) as caught:
        make_plan(big, None, 10**6, seconds=0.0)
    said = str(caught.value)
    words = said.split()
    assert "\n" not in said and "step buffers (dense)" in said
    # what is there: the one more, and what this process holds already
    there = words[words.index("there:") - 3 : words.index("there:") - 1]
    assert there[1] == "GB" and float(there[0]) == pytest.approx(1 + planning.resident_memory() / GB, abs=0.2)
    fitting = int(words[words.index("--batch-size") + 2])
    assert 1000 < fitting < 50_000
    make_plan(dataclasses.replace(big, batch_size=int(0.98 * fitting)), None, 10**6, seconds=0.0)
    with pytest.raises(MechintError):
        make_plan(dataclasses.replace(big, batch_size=int(1.1 * fitting)), None, 10**6, seconds=0.0)
    narrower = int(words[words.index("--expansion") + 2])
    make_plan(dataclasses.replace(big, expansion=int(0.98 * narrower) or 1), None, 10**6, seconds=0.0)


def test_weights_that_cannot_fit_leave_only_the_expansion(config: SAETrainConfig, monkeypatch: pytest.MonkeyPatch):
    there_is(monkeypatch, GB)
    wide = dataclasses.replace(config, expansion=100_000, batch_size=16)
    with pytest.raises(MechintError, match=r"lower --expansion to \d+ \(now 100000\)$"):
        make_plan(wide, None, 10**5, seconds=0.0)


def test_where_nothing_fits_that_is_said(config: SAETrainConfig, monkeypatch: pytest.MonkeyPatch):
    there_is(monkeypatch, -resident_memory())
    with pytest.raises(MechintError, match="neither a smaller --batch-size nor --expansion fits here"):
        make_plan(config, None, 10**6, seconds=0.0)


def test_what_is_not_known_refuses_nothing(config: SAETrainConfig, monkeypatch: pytest.MonkeyPatch):
    there_is(monkeypatch, None)
    plan = make_plan(dataclasses.replace(config, batch_size=10**6), None, 10**6, seconds=0.0)
    assert plan.available == (None,) and plan.memory[0].peak > GB


def test_training_is_only_refused_where_it_is_certain(config: SAETrainConfig, monkeypatch: pytest.MonkeyPatch):
    activations = open_activations(config.activations_path)
    big = dataclasses.replace(config, batch_size=19_000, expansion=64)
    there_is(monkeypatch, None)
    peak = make_plan(big, activations, activations.n_rows, seconds=0.0).memory[0].peak
    there_is(monkeypatch, int(0.9 * peak) - resident_memory())
    check_memory(big, activations)
    with pytest.raises(MechintError):
        make_plan(big, activations, activations.n_rows, seconds=0.0)
    there_is(monkeypatch, int(0.7 * peak) - resident_memory())
    with pytest.raises(MechintError, match=r"lower --batch-size to \d+ \(now 19000\) or --expansion to \d+ \(now 64\)"):
        check_memory(big, activations)


def test_a_full_disk_is_refused(config: SAETrainConfig, monkeypatch: pytest.MonkeyPatch):
    usage = type(planning.shutil.disk_usage("/"))
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: usage(GB, GB, 10**6))
    with pytest.raises(MechintError, match=r"give another --runs-root, or lower --expansion to \d+ \(now 64\)"):
        make_plan(dataclasses.replace(config, expansion=64), None, 10**6, seconds=0.0)


# --- what there is ----------------------------------------------------------------------------------------------------


def machine(root: Path, **files: str) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8000000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8_192_000_000),
        ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.max": "max\n"}, 8_192_000_000),
        (
            {  # version 2, the limit on a group further out; cached files are given back
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/memory.max": "3000\n",
                "sys/fs/cgroup/job/memory.current": "2500\n",
                "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 300\nactive_file 100\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/step/memory.current": "2000\n",
                "sys/fs/cgroup/job/step/memory.stat": "anon 1\n",
            },
            900,
        ),
        (
            {  # in a container's own namespace the group is the root
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "5000\n",
                "sys/fs/cgroup/memory.current": "1000\n",
                "sys/fs/cgroup/memory.stat": "inactive_file 0\n",
            },
            4000,
        ),
        (
            {  # version 1
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "7000\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "9000\n",
                "sys/fs/cgroup/memory/job/memory.stat": "cache 5\ntotal_inactive_file 2000\ntotal_active_file 1000\n",
            },
            1000,
        ),
    ],
)
def test_available_is_the_least_of_machine_and_control_groups(tmp_path: Path, files: dict[str, str], expected: int):
    assert available_memory(root=machine(tmp_path, **files)) == expected


def test_this_machine_says_something():
    available = available_memory()
    assert available is None or available > 10**7
    assert sys.platform != "linux" or (available is not None and resident_memory() > 10**7)


def test_vm_stat_of_macos():
    text = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10.
Pages active:                            500.
Pages inactive:                           20.
Pages speculative:                         3.
Pages wired down:                         99.
Pages purgeable:                           1.
"""
    assert read_vm_stat(text) == 34 * 16384
    assert read_vm_stat("something else") is None


# --- time -------------------------------------------------------------------------------------------------------------


def test_steps_cost_what_they_cost_at_their_density(config: SAETrainConfig):
    # a fall of 100 steps: a quarter at each end's mean with the middle
    assert step_seconds(1000, 100, 3.0, 2.0, 1.0) == pytest.approx(100 * 2.0 + 900 * 1.0)
    assert step_seconds(100, 100, 1.0, 1.0, 1.0) == pytest.approx(100)
    # a run that ends while L0 still falls: half of the way, and three quarters of it
    assert step_seconds(100, 200, 3.0, 2.0, 1.5) == pytest.approx(100 * 2.5)
    assert step_seconds(150, 200, 3.0, 2.0, 1.5) == pytest.approx(100 * 2.5 + 50 * (2.0 + 1.75) / 2)
    assert step_seconds(50, 200, 3.0, 2.0, 1.5) == pytest.approx(50 * (3.0 + 2.5) / 2)
    assert fall_steps(dataclasses.replace(config, epochs=10_000, lambda_warmup_steps="10%")) == 1500
    assert fall_steps(dataclasses.replace(config, epochs=10_000, lambda_warmup_steps=0)) == 100
    assert fall_steps(dataclasses.replace(config, epochs=40)) == 7500


def test_a_relu_sae_is_timed_at_the_density_that_is_expected(config: SAETrainConfig):
    before = torch.random.get_rng_state()
    activations = open_activations(config.activations_path)
    speed = make_plan(config, activations, activations.n_rows, seconds=0.5, expected_l0=10.0).speed
    assert speed is not None and torch.equal(before, torch.random.get_rng_state())
    assert speed.l0_at_start == pytest.approx(256, rel=0.2) and speed.l0_at_end == pytest.approx(10, rel=0.3)
    assert 0 < speed.steps(config) < speed.total(config) and math.isfinite(speed.total(config))
    assert not Path(config.runs_root).exists(), "planning makes nothing"


def test_dead_latents_count_for_memory_and_for_time_only_where_given(
    config: SAETrainConfig, monkeypatch: pytest.MonkeyPatch
):
    config = dataclasses.replace(config, revive="auxk", dead_after=1)
    timed = []

    def speed_of(*args: object, expected_dead: float, **kwargs: object) -> None:
        timed.append(expected_dead)

    monkeypatch.setattr("mechint.train.plan.measure_speed", speed_of)
    plans = [make_plan(config, None, 5000, seconds=0.5, expected_dead=share) for share in (None, 0.02, 0.3)]
    assert timed == [plan.expected_dead for plan in plans] == [0.0, 0.02, 0.3]
    # without what this very process has loaded by then
    phases = [next(phase for phase in plan.memory[0].phases if phase.name == "steps") for plan in plans]
    steps = [sum(part.n_bytes for part in phase.parts if part.name != "library") for phase in phases]
    assert steps[0] == steps[1] < steps[2]


def test_topk_costs_the_same_throughout(config: SAETrainConfig):
    for revive, share in (("none", None), ("auxk", None), ("auxk", 0.1)):
        topk = dataclasses.replace(config, architecture="topk", k=8.0, revive=revive, dead_after=1)
        plan = make_plan(topk, None, 5000, seconds=0.5, expected_dead=share)
        speed = plan.speed
        assert speed is not None and speed.step_at_start == speed.step_midway == speed.step_at_end
        assert speed.l0_at_end == pytest.approx(8, rel=0.05)
        assert "assumed: steps cost the same throughout" in "\n".join(table(plan, exists=True))


def test_the_kernel_is_the_one_that_training_takes(config: SAETrainConfig):
    sae = build_sae("standard", 64, 512)
    assert kernel_name(config) == make_kernel(sae, make_optimizer(sae, config)).name
    assert kernel_name(dataclasses.replace(config, kernel="dense")) == "dense"
    with pytest.raises(MechintError, match="--kernel"):
        kernel_name(dataclasses.replace(config, kernel="spars"))


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_on_activations_that_exist(
    activations_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    flags = ["--activations-path", str(activations_path), "--seconds", "0.3", "--device", "cpu", "--batch-size", "256"]
    assert main([*flags, "--preset", "mechint", "--steps", "2000"]) == 0
    said = capsys.readouterr().out
    for words in ("standard, 64 -> 512", "2,000 steps of 256", "20,000 rows", "RAM", "weights", "Adam", "library"):
        assert words in said
    for words in ("fits", "the fullest moment", "saved states", "steps a second", "assumed: L0 falls from"):
        assert words in said
    assert main([*flags, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["memory"]["cpu"]["peak_bytes"] == max(
        phase["total"] for phase in values["memory"]["cpu"]["phases"].values()
    )
    assert values["config"]["activation_dim"] == 64 and values["time"]["total_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_command_without_activations(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--activations-path", "none.pt", "--seconds", "0"]) == 2
    assert "none.pt; to plan without them, give --activation-dim and --n-rows" in capsys.readouterr().err
    flags = ["--activations-path", "none.pt", "--activation-dim", "32", "--n-rows", "5000", "--device", "cpu"]
    assert main([*flags, "--seconds", "0"]) == 0
    said = capsys.readouterr().out
    assert "5,000 rows" in said and "steps a second" not in said and "do not exist yet" in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--batch-size", "30000"], "--batch-size 30000 is more than the 19000 rows"),
        (["--k", "3"], "--k does not apply to architecture 'standard'"),
        (["--expected-dead", "2"], "--expected-dead is a share"),
        (["--expected-l0", "0"], "--expected-l0 must be above 0"),
        (["--seconds", "-1"], "--seconds must not be negative"),
        (["--batchsize", "3"], "unknown flag --batchsize; nearest: --batch-size"),
        (["--activation-dim", "32"], "holds vectors of width 64"),
    ],
)
def test_bad_flags_are_one_line(activations_path: Path, capsys: pytest.CaptureFixture, flags: list[str], says: str):
    assert main(["--activations-path", str(activations_path), "--device", "cpu", "--seconds", "0", *flags]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_the_command_refuses_what_cannot_fit(
    activations_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    there_is(monkeypatch, GB // 3)
    flags = ["--activations-path", str(activations_path), "--expansion", "64", "--batch-size", "16000"]
    assert main([*flags, "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "lower --batch-size to" in said and "or --expansion to" in said and said.count("\n") == 1


def test_a_table_for_a_gpu_names_both_memories(config: SAETrainConfig, monkeypatch: pytest.MonkeyPatch):
    there_is(monkeypatch, 10 * GB)
    plan = make_plan(config, None, 10**6, seconds=0.0)
    both = predict_memory(dataclasses.replace(config, device="cuda"), 10**6, library=GB, kernel="dense")
    lines = table(dataclasses.replace(plan, memory=tuple(both), available=(GB, None)), exists=True)
    assert any(line.startswith("cuda memory") and "of 1.0 GB: fits" in line for line in lines)
    assert any(line.startswith("RAM") for line in lines)


def test_the_precision_decides_the_kernel_that_is_planned():
    config = SAETrainConfig(activation_dim=64, expansion=4, epochs=10, architecture="topk", k=4.0, device="cpu")
    assert kernel_name(config) != kernel_name(dataclasses.replace(config, precision="bf16")) == "manual"
