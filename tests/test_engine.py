"""Whole trainings of every architecture: the files, resume to the bit, revival, presets, states cut short, the log."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import rows_without_rate

from mechint.config import TRAIN_PRESETS, SAETrainConfig
from mechint.config.train import architecture_names
from mechint.errors import MechintError
from mechint.runs import Run
from mechint.sae import ARCHITECTURES, load_sae
from mechint.train import Stopped, resume, train
from mechint.train.schedule import learning_rate, penalty_weight
from mechint.train.state import previous_path

D_IN, N_ROWS = 24, 6000
NAMES = architecture_names()


@pytest.fixture(scope="module")
def activations_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse combinations of 60 directions, an offset, a little noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(60, D_IN, generator=generator), dim=1)
    strengths = torch.rand(N_ROWS, 60, generator=generator) * 3 * (torch.rand(N_ROWS, 60, generator=generator) < 0.05)
    rows = strengths @ directions + 0.02 * torch.randn(N_ROWS, D_IN, generator=generator) + 0.3
    path = tmp_path_factory.mktemp("activations") / "acts.pt"
    torch.save(rows, path)
    return path


def config_for(path: Path, root: Path, architecture: str = "standard", **changes: Any) -> SAETrainConfig:
    settings: dict[str, Any] = dict(
        activations_path=str(path),
        architecture=architecture,
        activation_dim=D_IN,
        expansion=4,
        l1_lambda=0.3,
        epochs=120,
        batch_size=256,
        learning_rate=3e-3,
        warmup_steps=10,
        lambda_warmup_steps=20,
        save_every=40,
        log_every=10,
        runs_root=str(root / "runs"),
        run_name="a",
        device="cpu",
    )
    if "k" in ARCHITECTURES[architecture].options:
        settings["k"] = 4
    return SAETrainConfig.from_dict({**settings, **changes})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def log_rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("architecture", NAMES)
def test_a_whole_run_of_each_architecture(architecture: str, activations_path: Path, tmp_path: Path):
    config = config_for(
        activations_path, tmp_path, architecture, normalize_inputs="mean-norm", b_dec_init="mean", init="tied"
    )
    layout = train(config, progress=False)
    run = Run(layout.root)
    sae, summary = load_sae(run.path), run.summary
    rows = torch.load(activations_path, weights_only=True)
    held_out = rows[torch.randperm(N_ROWS, generator=torch.Generator().manual_seed(42))[: N_ROWS // 20]]
    with torch.no_grad():
        x_hat, acts = sae.run(held_out)
    # the saved SAE takes raw rows, whatever it was trained on, and is the one that the summary describes
    fvu = ((x_hat - held_out) ** 2).sum() / ((held_out - held_out.mean(dim=0)) ** 2).sum()
    assert summary["fvu"] == pytest.approx(fvu.item(), rel=1e-3) and summary["fvu"] < 0.6
    assert summary["l0"] == pytest.approx((acts != 0).sum(dim=1).float().mean().item(), rel=1e-4)
    assert summary["architecture"] == architecture
    cfg = json.loads((run.path / "sae" / "cfg.json").read_text())
    expected = "jumprelu" if "batchtopk" in architecture else architecture
    assert cfg["architecture"] == expected
    if expected != architecture:
        assert cfg["metadata"]["training_architecture"] == architecture
        assert summary["l0"] == pytest.approx(4, rel=0.5), "the learned cut keeps about k"
    log = log_rows(run.metrics_path)
    assert {"loss", "mse", "l0", "fvu", "dead", "dense", "grad_norm", "decoder_norm_drift", "lr"} <= log[0].keys()
    assert float(log[-1]["fvu"]) < 0.7 * float(log[0]["fvu"]) and float(log[-1]["decoder_norm_drift"]) < 1e-5
    assert all(float(row["vectors_per_second"]) > 0 for row in log)
    own = {"gated": {"l1", "gate_mse"}, "jumprelu": {"l0_penalty"}, "matryoshka_batchtopk": {"prefix_mse"}}
    assert own.get(architecture, set()) <= log[0].keys()


@pytest.mark.parametrize("revive", ["auxk", "resample"])
@pytest.mark.parametrize("architecture", NAMES)
def test_stopped_and_resumed_is_the_same_to_the_bit(
    architecture: str, revive: str, activations_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ctrl-C after step 57 of 120, with dead latents being revived; the drawn prefixes too come from (seed, step)."""
    extra: dict[str, Any] = {"revive": revive, "dead_after": 2000, "resample_every": 25}
    if architecture == "matryoshka_batchtopk":
        extra["prefixes"] = 3
    if architecture == "jumprelu":
        extra |= {"pre_act_coefficient": 1e-3}
    if ARCHITECTURES[architecture].has_penalty:
        extra["target_l0"] = 6.0
    torch.set_num_threads(1)
    whole = train(config_for(activations_path, tmp_path, architecture, run_name="whole", **extra), progress=False)
    from mechint.train import loop

    step, calls = loop.advance, 0

    def stopping(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 57:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(loop, "advance", stopping)
    with pytest.raises(Stopped, match="--resume"):
        train(config_for(activations_path, tmp_path, architecture, run_name="stopped", **extra), progress=False)
    layout = resume(tmp_path / "runs" / "stopped", progress=False)
    assert sha256(layout.checkpoint) == sha256(whole.checkpoint)
    assert rows_without_rate(layout.metrics) == rows_without_rate(whole.metrics)
    assert Run(layout.root).manifest["resumed_at"] == [57]


TRAIN_SCRIPT = """
import json, sys
from mechint.config import SAETrainConfig
from mechint.train import train
torch = __import__("torch"); torch.set_num_threads(1)
train(SAETrainConfig.from_dict(json.loads(sys.argv[1])), progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", NAMES)
def test_kill_9_and_resume_is_exact(architecture: str, activations_path: Path, tmp_path: Path):
    settings: dict[str, Any] = {"epochs": 800, "save_every": 30, "log_every": 7, "revive": "auxk", "dead_after": 9000}
    torch.set_num_threads(1)  # as in the subprocess: the number of threads changes the order of sums
    whole = train(config_for(activations_path, tmp_path, architecture, run_name="w", **settings), progress=False)
    config = config_for(activations_path, tmp_path, architecture, run_name="killed", **settings)
    killed = tmp_path / "runs" / "killed"
    arguments = [sys.executable, "-c", TRAIN_SCRIPT, json.dumps(config.to_dict())]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not previous_path(killed / "state" / "state.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (killed / "manifest.json").exists(), "the run ended before it was killed: nothing is tested"
    layout = resume(killed, progress=False)
    assert sha256(layout.checkpoint) == sha256(whole.checkpoint)
    assert rows_without_rate(layout.metrics) == rows_without_rate(whole.metrics)


@pytest.fixture
def stopped_run(activations_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return stopped_at_57(activations_path, tmp_path, monkeypatch)


def stopped_at_57(activations_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Path:
    """A run stopped after 57 of 120 steps: states of steps 57 and 40 are on the disk."""
    from mechint.train import loop

    step, calls = loop.advance, 0

    def stopping(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 57:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    torch.set_num_threads(1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "advance", stopping)
        with pytest.raises(Stopped):
            train(config_for(activations_path, root, **changes), progress=False)
    return root / "runs" / "a"


def test_a_state_cut_short_falls_back_to_the_one_before(stopped_run: Path, activations_path: Path, tmp_path: Path):
    whole = train(config_for(activations_path, tmp_path, run_name="whole"), progress=False)
    path = stopped_run / "state" / "state.pt"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match="cannot be read .*going on from the state before it, step 40"):
        layout = resume(stopped_run, progress=False)
    assert sha256(layout.checkpoint) == sha256(whole.checkpoint)
    assert rows_without_rate(layout.metrics) == rows_without_rate(whole.metrics)


def test_both_states_broken_is_said(stopped_run: Path):
    path = stopped_run / "state" / "state.pt"
    for place in (path, previous_path(path)):
        place.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(MechintError, match="state.pt cannot be read .*state-before.pt cannot be read .*start the run"):
        resume(stopped_run, progress=False)


def test_resume_with_another_config_names_the_field(stopped_run: Path):
    config = json.loads((stopped_run / "config.json").read_text())
    (stopped_run / "config.json").write_text(json.dumps({**config, "learning_rate": 0.5}))
    with pytest.raises(MechintError, match=r"another learning_rate \(learning_rate was 0.003, is 0.5\)"):
        resume(stopped_run, progress=False)


def test_a_state_of_an_earlier_version_is_gone_on_with(
    activations_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It knew fewer settings and wrote shares as floats."""
    settings: dict[str, Any] = {"warmup_steps": "5%", "resample_every": "25%", "batch_order": "counter"}
    whole = train(config_for(activations_path, tmp_path, run_name="whole", **settings), progress=False)
    stopped = stopped_at_57(activations_path, tmp_path, monkeypatch, **settings)

    def as_written_then(config: dict[str, Any]) -> dict[str, Any]:
        newer = ("max_norm_multiple", "saturation", "d_sae", "precision")
        then = {key: value for key, value in config.items() if key not in newer}
        return {**then, "warmup_steps": 0.05, "resample_every": 0.25}

    config = stopped / "config.json"
    config.write_text(json.dumps(as_written_then(json.loads(config.read_text()))))
    state = stopped / "state" / "state.pt"
    values = torch.load(state, weights_only=True)
    torch.save({**values, "config": as_written_then(values["config"])}, state)
    with pytest.warns(UserWarning, match="did not have these settings yet: .*max_norm_multiple 0.0"):
        layout = resume(stopped, progress=False)
    assert sha256(layout.checkpoint) == sha256(whole.checkpoint)
    assert Run(layout.root).manifest["resumed_at"] == [57]


def test_resume_on_changed_activations_is_refused(stopped_run: Path, activations_path: Path, tmp_path: Path):
    rows = torch.load(activations_path, weights_only=True)
    other = tmp_path / "other.pt"
    torch.save(rows + 1, other)
    config = json.loads((stopped_run / "config.json").read_text())
    values = torch.load(stopped_run / "state" / "state.pt", weights_only=True)
    values["config"]["activations_path"] = str(other)
    torch.save(values, stopped_run / "state" / "state.pt")
    (stopped_run / "config.json").write_text(json.dumps({**config, "activations_path": str(other)}))
    with pytest.raises(MechintError, match="was trained on other activations .*restore them, or start a new run"):
        resume(stopped_run, progress=False)


@pytest.mark.parametrize("preset", [name for name in TRAIN_PRESETS if name != "none"])
def test_presets_train(preset: str, activations_path: Path, tmp_path: Path):
    """Each preset runs with sizes, learning rate and warm-up for sixty steps on this data, and learns."""
    sizes = {"epochs": 60, "batch_size": 128, "activation_dim": D_IN, "expansion": 4, "device": "cpu", "log_every": 0}
    sizes |= {"learning_rate": 1e-2, "warmup_steps": 5, "run_name": "a"}
    config = SAETrainConfig.from_dict(
        {"preset": preset, "activations_path": str(activations_path), "runs_root": str(tmp_path), **sizes}
    )
    for name, value in TRAIN_PRESETS[preset].items():
        assert name in sizes or getattr(config, name) == value
    run = Run(train(config, progress=False).root)
    log = log_rows(run.metrics_path)
    assert float(log[-1]["fvu"]) < 0.8 * float(log[0]["fvu"]) and run.summary["l0"] > 0


def test_l1_per_sum_means_the_same_at_every_width(activations_path: Path, tmp_path: Path):
    """lam * sum|f| beside |x_hat - x|^2, over d_in, against lam * mean|f|."""
    per_sum = config_for(activations_path, tmp_path, l1_reduction="sum")
    assert penalty_weight(per_sum, 0.3, has_l1=True) == pytest.approx(0.3 * 4)
    assert penalty_weight(per_sum, 0.3, has_l1=False) == 0.3
    same = config_for(activations_path, tmp_path, l1_lambda=1.2, run_name="b")
    runs = [train(config, progress=False) for config in (per_sum, same)]
    torch.testing.assert_close(load_sae(runs[0].root).W_dec, load_sae(runs[1].root).W_dec, rtol=1e-4, atol=1e-5)


def test_constant_schedule_decays_over_the_last_share():
    lr = [
        learning_rate(step, peak=2.0, warmup_steps=10, steps=100, schedule="constant", decay_share=0.2)
        for step in range(100)
    ]
    assert lr[5] == 1.0 and lr[10] == lr[79] == lr[80] == 2.0 and lr[90] == 1.0 and lr[99] == pytest.approx(0.1)
    flat = [learning_rate(s, peak=2.0, warmup_steps=0, steps=9, schedule="constant", decay_share=0.0) for s in range(9)]
    assert flat == [2.0] * 9


def test_steps_as_shares(activations_path: Path, tmp_path: Path):
    config = config_for(activations_path, tmp_path, warmup_steps="5%", lambda_warmup_steps="100%", dead_after="0.5%")
    assert config.steps_of(config.warmup_steps) == 6 and config.steps_of(config.lambda_warmup_steps) == 120
    assert config.dead_after_vectors == round(0.005 * 120 * config.batch_size)
    again = SAETrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    one = config_for(activations_path, tmp_path, lambda_warmup_steps=1)
    assert one.steps_of(one.lambda_warmup_steps) == 1
    # what earlier versions wrote: a number with a decimal point is a share, 1.0 all of them
    written = {**config.to_dict(), "warmup_steps": 0.05, "lambda_warmup_steps": 1.0, "dead_after": 0.005}
    assert SAETrainConfig.from_dict(json.loads(json.dumps(written))) == config


def test_free_decoder_is_folded_when_saved(activations_path: Path, tmp_path: Path):
    config = config_for(
        activations_path, tmp_path, decoder="free", init="tied", init_decoder_norm=0.1, normalize_inputs="centred-norm"
    )
    layout = train(config, progress=False)
    assert float(log_rows(layout.metrics)[-1]["decoder_norm_drift"]) > 0.01, "rows were free"
    norms = load_sae(layout.root).W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(len(norms)), rtol=0, atol=1e-5)


def test_no_memory_says_what_to_lower(activations_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mechint.train import loop

    def no_room(*args: Any) -> Any:
        torch.empty(2**60)

    monkeypatch.setattr(loop, "advance", no_room)
    with pytest.raises(MechintError, match=r"out of memory .*lower --batch-size \(now 256\) or --expansion \(now 4\)"):
        train(config_for(activations_path, tmp_path), progress=False)
