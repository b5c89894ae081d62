"""Training: the original's arithmetic to rounding, resume to the bit, and what happens when things go wrong."""

import csv
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import in_float64, rows_without_rate

from mechint.cli.train import doubts, main
from mechint.config import SAETrainConfig
from mechint.config.presets import learning_rate_for
from mechint.errors import MechintError
from mechint.provenance import set_global_seed
from mechint.runs import Run, verify
from mechint.sae import StandardSAE, load_sae
from mechint.train import resume, train, training
from mechint.train.schedule import l1_weight, learning_rate

D_IN, N_ROWS = 24, 6000


@pytest.fixture(scope="module")
def activations_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare .pt as the original wrote it: sparse combinations of 60 directions, an offset, a little noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(60, D_IN, generator=generator), dim=1)
    strengths = torch.rand(N_ROWS, 60, generator=generator) * 3 * (torch.rand(N_ROWS, 60, generator=generator) < 0.05)
    rows = strengths @ directions + 0.02 * torch.randn(N_ROWS, D_IN, generator=generator) + 0.3
    path = tmp_path_factory.mktemp("activations") / "acts.pt"
    torch.save(rows, path)
    return path


def config_for(path: Path, root: Path, **changes) -> SAETrainConfig:
    settings = dict(
        activations_path=str(path),
        activation_dim=D_IN,
        expansion=4,
        l1_lambda=1.0,
        epochs=60,
        batch_size=256,
        learning_rate=1e-3,
        warmup_steps=10,
        lambda_warmup_steps=20,
        save_every=20,
        runs_root=str(root / "runs"),
        run_name="a",
        device="cpu",
    )
    return SAETrainConfig(**{**settings, **changes})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reference_training(rows: np.ndarray, config: SAETrainConfig, weights: dict[str, np.ndarray]) -> list[float]:
    """The original's training from its formulas, in float64 and with gradients by hand; changes `weights` in place.

    Returns the loss before each update. Only the drawing of batches goes through torch, because it *is* torch's stream.
    """
    n_val = int(len(rows) * config.val_fraction)
    train_rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).numpy()[n_val:]]
    draws = torch.Generator().manual_seed(config.seed)
    moments = {name: (np.zeros_like(value), np.zeros_like(value)) for name, value in weights.items()}
    losses = []
    for step in range(config.epochs):
        x = train_rows[torch.randint(0, len(train_rows), (config.batch_size,), generator=draws).numpy()]
        lam = config.l1_lambda * min(1.0, step / config.lambda_warmup_steps)
        if step < config.warmup_steps:
            lr = config.learning_rate * step / config.warmup_steps
        else:
            share = (step - config.warmup_steps) / (config.epochs - config.warmup_steps)
            lr = config.learning_rate * 0.5 * (1 + np.cos(np.pi * share))
        centred = x - weights["b_dec"]
        pre = centred @ weights["W_enc"] + weights["b_enc"]
        f = np.maximum(pre, 0)
        error = f @ weights["W_dec"] + weights["b_dec"] - x
        losses.append((error**2).mean() + lam * np.abs(f).mean())
        g_out = 2 * error / error.size
        g_pre = (g_out @ weights["W_dec"].T + lam / f.size) * (pre > 0)
        gradients = {
            "W_dec": f.T @ g_out,
            "W_enc": centred.T @ g_pre,
            "b_enc": g_pre.sum(0),
            "b_dec": g_out.sum(0) - (g_pre @ weights["W_enc"].T).sum(0),
        }
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        scale = min(1.0, config.max_grad_norm / (norm + 1e-6))  # torch's clip_grad_norm_ adds 1e-6
        for name, g in gradients.items():
            g, (m, v) = g * scale, moments[name]
            m *= 0.9
            m += 0.1 * g
            v *= 0.999
            v += 0.001 * g**2
            m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            weights[name] -= lr * m_hat / (np.sqrt(v_hat) + 1e-8)
        weights["W_dec"] /= np.maximum(np.linalg.norm(weights["W_dec"], axis=1, keepdims=True), 1e-12)
    return losses


def test_the_presets_learning_rate_follows_the_width():
    """7e-3 up to 1,024 latents, then by the square root; what is given is kept, and a saved config says it."""
    rates = {latents: learning_rate_for("topk", latents) for latents in (256, 1024, 4096, 4608, 16384)}
    assert rates == {256: 7e-3, 1024: 7e-3, 4096: 3.5e-3, 4608: 3.3e-3, 16384: 1.75e-3}
    assert learning_rate_for("matryoshka_batchtopk", 1024) == 3e-3 == learning_rate_for("matryoshka_batchtopk", 4096)
    asked = SAETrainConfig.from_dict({"preset": "mechint", "activation_dim": 512, "expansion": 8})
    assert asked.learning_rate is None and asked.peak_learning_rate == 3.5e-3
    assert asked.with_learning_rate().learning_rate == 3.5e-3
    assert asked.with_overrides(learning_rate=0.25).with_learning_rate().peak_learning_rate == 0.25
    assert SAETrainConfig.from_dict({"activation_dim": 512}).learning_rate == 3e-4


def test_mech_int_preset_is_the_original_for_a_hundred_steps(activations_path: Path, tmp_path: Path):
    config = config_for(activations_path, tmp_path, epochs=100, log_every=1, preset="mech-int", split_by="row")
    config = dataclasses.replace(config, batch_order="torch")
    with in_float64():
        layout = train(config, progress=False)
        set_global_seed(config.seed)
        start = StandardSAE(D_IN, 4 * D_IN)
    weights = {name: value.detach().double().numpy().copy() for name, value in start.named_parameters()}
    rows = torch.load(activations_path, weights_only=True).double().numpy()
    expected = reference_training(rows, config, weights)
    with open(layout.metrics) as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    ours = load_sae(layout.root)
    for name, value in weights.items():  # saved in float32
        np.testing.assert_allclose(getattr(ours, name).detach().numpy(), value, rtol=2**-23, atol=1e-9, err_msg=name)
    moved = np.abs(ours.W_enc.detach().numpy() - start.W_enc.detach().numpy()).max()
    assert moved > 0.02, "training must have moved the weights far beyond the tolerance"


def test_legacy_config_file_gets_the_original_split_and_batches():
    old = {key: value for key, value in SAETrainConfig().to_dict().items()}
    for key in ("split_by", "batch_order", "preset", "save_every", "log_every"):
        del old[key]
    config = SAETrainConfig.from_dict(old)
    assert (config.split_by, config.batch_order, config.preset) == ("row", "torch", "mech-int")
    assert SAETrainConfig.from_dict({"epochs": 5}).batch_order == "shuffle"
    assert SAETrainConfig.from_dict({"steps": 5}).epochs == 5


def test_schedules():
    lr = [learning_rate(step, peak=2.0, warmup_steps=4, steps=12) for step in range(12)]
    assert lr[:5] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert lr[8] == pytest.approx(1.0)  # half-way down the cosine
    assert learning_rate(12, peak=2.0, warmup_steps=4, steps=12) == pytest.approx(0.0)
    assert learning_rate(0, peak=2.0, warmup_steps=0, steps=12) == 2.0
    assert [l1_weight(step, l1_lambda=3.0, lambda_warmup_steps=3) for step in range(5)] == [0, 1, 2, 3, 3]
    assert l1_weight(0, l1_lambda=3.0, lambda_warmup_steps=0) == 3.0


@pytest.fixture(scope="module")
def finished(activations_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("finished")
    return Run(train(config_for(activations_path, root), progress=False).root)


def test_run_directory_holds_what_the_contract_says(finished: Run, activations_path: Path):
    names = {str(path.relative_to(finished.path)) for path in finished.path.rglob("*") if path.is_file()}
    assert names == {
        *("config.json", "metrics.csv", "checkpoint.pt", "summary.json", "manifest.json"),
        *("sae/cfg.json", "sae/sae_weights.safetensors"),
    }
    summary, manifest = finished.summary, finished.manifest
    original = {
        *("checkpoint_path", "config_path", "run_dir", "git_commit", "num_features", "num_params"),
        *("dead_features", "dead_fraction", "val_l0", "val_mse", "total_seconds", "training_seconds"),
    }
    assert original <= summary.keys()
    assert summary["num_params"] == D_IN + 96 + 2 * D_IN * 96 and summary["num_features"] == 96
    assert (summary["run_dir"], summary["checkpoint_path"]) == (".", "checkpoint.pt")
    assert manifest["config"] == finished.config.to_dict() and manifest["summary"] == summary
    with open(finished.metrics_path) as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:8] == ["step", "loss", "mse", "l1", "l0", "dead_features", "lr", "lam"]
    assert [int(row["step"]) for row in rows] == [*range(0, 60, 6), 59]
    assert float(rows[0]["lr"]) == 0.0
    assert float(rows[-1]["l0_count"]) == pytest.approx(96 * float(rows[-1]["l0"]))
    assert "/" not in manifest["inputs"]["activations"]["sha256"]
    assert finished.activations_path().samefile(activations_path)


def test_validation_metrics_are_of_the_held_out_rows(finished: Run, activations_path: Path):
    rows = torch.load(activations_path, weights_only=True)
    # a bare .pt does not know its texts, so the split is by row; config.json says so
    assert finished.config.split_by == "row"
    held_out = rows[torch.randperm(N_ROWS, generator=torch.Generator().manual_seed(42))[: N_ROWS // 20]]
    with torch.no_grad():
        x_hat, f = load_sae(finished.path).run(held_out)
    assert finished.summary["n_val"] == 300
    assert finished.summary["val_mse"] == pytest.approx((x_hat - held_out).pow(2).mean().item(), rel=1e-5)
    assert finished.summary["val_l0"] == pytest.approx((f > 0).float().mean().item(), rel=1e-6)


def test_the_error_falls(activations_path: Path, tmp_path: Path):
    """On the batches that the bound was found with: one of 60 steps is of few vectors."""
    layout = train(config_for(activations_path, tmp_path, batch_order="counter"), progress=False)
    with open(layout.metrics) as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["mse"]) < 0.5 * float(rows[0]["mse"])


def test_two_runs_with_one_seed_are_equal_to_the_bit(finished: Run, activations_path: Path, tmp_path: Path):
    again = train(config_for(activations_path, tmp_path), progress=False)
    other = train(config_for(activations_path, tmp_path, seed=7, run_name="b"), progress=False)
    assert sha256(again.checkpoint) == sha256(finished.checkpoint_path) != sha256(other.checkpoint)
    assert rows_without_rate(again.metrics) == rows_without_rate(finished.metrics_path)


TRAIN_SCRIPT = """
import json, sys
from mechint.config import SAETrainConfig
from mechint.train import train
torch = __import__("torch"); torch.set_num_threads(1)
train(SAETrainConfig.from_dict(json.loads(sys.argv[1])), progress=False)
"""


def start_run(config: SAETrainConfig) -> subprocess.Popen:
    arguments = [sys.executable, "-c", TRAIN_SCRIPT, json.dumps(config.to_dict())]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("batch_order", ["shuffle", "counter", "torch"])
def test_kill_and_resume_is_exact(activations_path: Path, tmp_path: Path, delay: float, batch_order: str):
    settings = {"epochs": 1500, "save_every": 50, "log_every": 7, "batch_order": batch_order, "batch_size": 512}
    torch.set_num_threads(1)  # as in the subprocess: the number of threads changes the order of sums
    whole = train(config_for(activations_path, tmp_path, run_name="whole", **settings), progress=False)
    process = start_run(config_for(activations_path, tmp_path, run_name="killed", **settings))
    killed = tmp_path / "runs" / "killed"
    wait_for(killed / "state" / "state.pt", process)
    time.sleep(delay)
    process.kill()
    process.wait()
    assert not (killed / "manifest.json").exists(), "the run ended before it was killed: nothing is tested"
    layout = resume(killed, progress=False)
    assert sha256(layout.checkpoint) == sha256(whole.checkpoint)
    assert rows_without_rate(layout.metrics) == rows_without_rate(whole.metrics)
    assert not (killed / "state").exists() and Run(killed).manifest["resumed_at"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_resumable_run(activations_path: Path, tmp_path: Path, number: int):
    script = Path(__file__).parent.parent / "scripts" / "train_sae.py"
    flags = f"--activations-path {activations_path} --epochs 100000 --batch-size 64 --save-every 0 --run-name a".split()
    process = subprocess.Popen(
        [sys.executable, str(script), *flags], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "runs" / "a" / "metrics.csv", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "--resume runs/a" in err
    state = torch.load(tmp_path / "runs" / "a" / "state" / "state.pt", weights_only=True)
    assert state["step"] > 0


@pytest.mark.parametrize("read_every", [1, 50])
def test_loss_that_is_not_finite_keeps_the_last_good_state(
    activations_path: Path, tmp_path: Path, read_every: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(training.READ_EVERY, "cpu", read_every)
    config = config_for(activations_path, tmp_path, learning_rate=1e30, max_grad_norm=1e30, warmup_steps=40)
    with pytest.raises(MechintError, match=r"the loss is (nan|inf) at step \d+: lower --learning-rate"):
        train(config, progress=False)
    run = tmp_path / "runs" / "a"
    state = torch.load(run / "state" / "state.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["sae"].values())
    assert not (run / "checkpoint.pt").exists() and not (run / "manifest.json").exists()
    with pytest.raises(MechintError, match="not finished; go on with"):
        _ = Run(run).checkpoint_path


def test_verify_sees_each_broken_link(finished: Run, activations_path: Path, tmp_path: Path):
    import shutil

    assert {verdict for _, verdict in verify(finished)} <= {"ok", "not recorded"}
    # a run may be moved together with its activations
    elsewhere = tmp_path / "elsewhere" / "runs" / "a"
    shutil.copytree(finished.path, elsewhere)
    relative = finished.manifest["inputs"]["activations"]["path"]
    target = Path(os.path.normpath(elsewhere / relative))
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(activations_path, target)
    moved = Run(elsewhere)
    assert dict(verify(moved))["checkpoint.pt"] == "ok"
    data = bytearray((moved.path / "checkpoint.pt").read_bytes())
    data[-200] ^= 1
    (moved.path / "checkpoint.pt").write_bytes(data)
    (moved.path / "metrics.csv").unlink()
    rows = torch.load(target, weights_only=True)
    rows[5, 5] += 1
    torch.save(rows, target)
    verdicts = dict(verify(moved))
    assert verdicts["checkpoint.pt"] == "changed" and verdicts["metrics.csv"] == "missing"
    assert [v for k, v in verdicts.items() if k.startswith("activations")] == ["changed"]
    done = subprocess.run([sys.executable, "-m", "mechint", "verify", str(moved.path)], capture_output=True, text=True)
    assert done.returncode == 2 and "checkpoint.pt" in done.stderr and "Traceback" not in done.stderr


def test_mistakes_write_nothing(activations_path: Path, tmp_path: Path):
    bad = torch.load(activations_path, weights_only=True)
    bad[17, 3] = float("nan")
    torch.save(bad, tmp_path / "nan.pt")
    data = activations_path.read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    for changes, message in [
        ({"activations_path": str(tmp_path / "none.pt")}, "not found"),
        ({"activations_path": str(tmp_path / "nan.pt")}, "row 17"),
        ({"activations_path": str(tmp_path / "cut.pt")}, "truncated|cannot be read"),
        ({"activation_dim": 512}, "width 24, but --activation-dim is 512: pass --activation-dim 24"),
        ({"device": "cuda:7"}, "--device cpu"),
    ]:
        with pytest.raises(MechintError, match=message) as caught:
            train(config_for(activations_path, tmp_path, **changes), progress=False)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_fraction": 1.0}, "share held out"),
        ({"val_fraction": -0.1}, "share held out"),
        ({"run_name": "a/b"}, "one folder name"),
        ({"run_name": ".."}, "one folder name"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate must be above 0"),
    ],
)
def test_settings_out_of_range(changes: dict, message: str):
    with pytest.raises(MechintError, match=message):
        SAETrainConfig(**changes)


def test_unknown_config_key_names_the_nearest():
    with pytest.raises(MechintError, match="unknown key 'learnig_rate'; nearest: learning_rate"):
        SAETrainConfig.from_dict({"learnig_rate": 1.0})
    with pytest.raises(MechintError, match="epochs should be of type int"):
        SAETrainConfig.from_dict({"epochs": "many"})
    with pytest.raises(MechintError, match="both set 'epochs'"):
        SAETrainConfig.from_dict({"epochs": 1, "steps": 2})


def test_an_existing_name_gets_a_number(activations_path: Path, tmp_path: Path):
    config = config_for(activations_path, tmp_path, epochs=2)
    labels = [train(config, progress=False).root.name for _ in range(3)]
    assert labels == ["a", "a-1", "a-2"]


def test_no_validation_rows_is_said_not_zero(activations_path: Path, tmp_path: Path):
    layout = train(config_for(activations_path, tmp_path, epochs=2, val_fraction=0.0), progress=False)
    summary = json.loads(layout.summary.read_text())
    assert summary["val_mse"] is None and summary["n_val"] == 0


def doubts_of(summary: dict, **settings: object) -> str:
    config = SAETrainConfig.from_dict({"activation_dim": 64, "expansion": 4, **settings})
    return " / ".join(doubts(config, {"num_features": 256, "n_train": 10_000_000, "l0": 30.0, **summary}))


def test_a_training_that_cannot_mean_what_it_seems_to_says_so():
    assert doubts_of({}, preset="mechint", epochs=100) == ""
    short = doubts_of({}, epochs=500)  # the original recipe, whose warm-ups are numbers of steps
    assert "all 500 steps lie within the warm-up of the learning rate (2,000), which ended at 25% of its peak" in short
    assert "the penalty rose over 5,000 steps and ended at 10% of --lam 3" in short
    assert "200 of 256 latents are active" in doubts_of({"l0": 200.0}, epochs=9000)
    assert doubts_of({"l0": 200.0}, epochs=9000, architecture="topk", k=200) == "", "that is what was asked for"
    assert "--target-l0 was 20" in doubts_of({"l0": 25.0}, preset="mechint", target_l0=20)
    assert "the penalty rose" not in doubts_of({}, epochs=3000, target_l0=30)
    seen = doubts_of({"n_train": 1000}, preset="mechint", epochs=100, batch_size=500)
    assert seen == "each of the 1,000 training rows was seen 50 times: collect more texts"


def test_the_command_says_them(activations_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = f"--activations-path {activations_path} --runs-root {tmp_path} --steps 5 --batch-size 64 --device cpu"
    assert main(words.split()) == 0
    said = capsys.readouterr().err
    assert "note: all 5 steps lie within the warm-up" in said and "which is not sparse: --target-l0 32" in said
