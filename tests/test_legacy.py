"""What the first version of the pipeline left behind, and its habits: train.py, old files, old import paths."""

import csv
import hashlib
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HOOK
from small_run import rows_without_rate

from mechint.cli import ablate, compare, evaluate
from mechint.cli import train as train_command
from mechint.config import SAETrainConfig
from mechint.data import open_activations
from mechint.eval import read_metrics_csv
from mechint.sae import SAEloss, SparseAutoEncoder, load_sae, load_sae_checkpoint
from mechint.train import loop

ROOT = Path(__file__).resolve().parent.parent
D_IN, N_ROWS = 32, 1500
ORIGINAL_COLUMNS = ["step", "loss", "mse", "l1", "l0", "dead_features", "lr", "lam"]
ORIGINAL_SUMMARY = {
    *("checkpoint_path", "config_path", "dead_features", "dead_fraction", "git_commit", "num_features", "num_params"),
    *("run_dir", "total_seconds", "training_seconds", "val_l0", "val_mse"),
}
# A config.json as the first version wrote it, with every one of its keys.
OLD_CONFIG: dict[str, Any] = {
    "activation_dim": D_IN,
    "activations_path": "activations/activations_50000.pt",
    "batch_size": 64,
    "dataset_name": "openwebtext",
    "dataset_split": "train",
    "device": "cpu",
    "epochs": 20,
    "eval_batch_size": 128,
    "expansion": 8,
    "hook_name": HOOK,
    "l1_lambda": 0.5,
    "lambda_warmup_steps": 5,
    "layer": 3,
    "learning_rate": 0.003,
    "legacy_layout": False,
    "max_chars": 512,
    "max_grad_norm": 1.0,
    "model_name": "pythia-70m",
    "model_source": "EleutherAI/pythia-70m",
    "num_texts": 50000,
    "run_name": None,
    "runs_root": "runs",
    "seed": 42,
    "val_fraction": 0.1,
    "warmup_steps": 2,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, elsewhere than the repository, with old activations and their old sidecar."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(50, D_IN, generator=generator), dim=1)
    strengths = torch.rand(N_ROWS, 50, generator=generator) * (torch.rand(N_ROWS, 50, generator=generator) < 0.1)
    rows = strengths @ directions
    (tmp_path / "activations").mkdir()
    torch.save(rows - rows.mean(dim=1, keepdim=True), tmp_path / "activations" / "activations_50000.pt")
    sidecar = {
        "activation_dim": 512,  # always its default, whatever the tensor was
        "activation_path": "activations/activations_50000.pt",
        "config": OLD_CONFIG,
        "git_commit": "d141e85",
        "num_vectors": N_ROWS,
    }
    (tmp_path / "activations" / "activations_50000.json").write_text(
        json.dumps(sidecar, indent=2, sort_keys=True) + "\n"
    )
    return tmp_path


def train_py(*more: object) -> int:
    """`python train.py FLAGS` in this process, in the current folder."""
    flags = ["--activation-dim", D_IN, "--lam", 0.5, "--epochs", 60, "--batch-size", 128, "--warmup-steps", 5]
    flags += ["--lambda-warmup-steps", 5, "--learning-rate", 3e-3, "--device", "cpu", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def snapshot(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- train.py -------------------------------------------------------------------------------------------------------


def test_train_py_writes_the_legacy_layout(folder: Path, capsys: pytest.CaptureFixture[str]):
    before = set(snapshot(folder))
    assert train_py("--expansion", 4) == 0
    assert set(snapshot(folder)) - before == {
        "config.json",
        "saved_models/sae_model_4x.pt",
        "saved_models/sae_model_4x.json",
        "training_metrics/training_metrics_4x.csv",
        "training_metrics/summary_4x.json",
    }
    weights = torch.load(folder / "saved_models" / "sae_model_4x.pt", weights_only=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert shapes == {"b_pre": (32,), "b_enc": (128,), "W_enc": (32, 128), "W_dec": (128, 32)}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.ones(128))
    assert load_sae("saved_models/sae_model_4x.pt").metadata["processing"] == "centred"  # as the sidecar says

    with open(folder / "training_metrics" / "training_metrics_4x.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:8] == ORIGINAL_COLUMNS
    assert [int(row["step"]) for row in rows] == [*range(0, 60, 6), 59]
    summary = json.loads((folder / "training_metrics" / "summary_4x.json").read_text())
    assert summary.keys() >= ORIGINAL_SUMMARY
    assert (summary["run_dir"], summary["checkpoint_path"], summary["config_path"]) == (
        "legacy",
        "saved_models/sae_model_4x.pt",
        "config.json",
    )
    config = json.loads((folder / "config.json").read_text())
    assert config.keys() >= OLD_CONFIG.keys() and config["legacy_layout"] is True and config["expansion"] == 4
    out = capsys.readouterr().out
    assert "\n---\nval_mse: " in out and "run_dir: legacy\ncheckpoint_path: saved_models/sae_model_4x.pt\n" in out

    # another expansion lies beside it, and the config is that of the last one
    assert train_py("--expansion", 2) == 0
    assert {path.name for path in (folder / "saved_models").glob("*.pt")} == {"sae_model_2x.pt", "sae_model_4x.pt"}
    assert json.loads((folder / "config.json").read_text())["expansion"] == 2


def test_train_py_never_overwrites(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert train_py("--expansion", 2) == 0
    before = snapshot(folder)
    capsys.readouterr()
    assert train_py("--expansion", 2, "--seed", 7) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: saved_models/sae_model_2x.pt exists and is not overwritten: move it away")
    assert err.count("\n") == 1 and snapshot(folder) == before
    (folder / "config.json").write_text('{"compilerOptions": {}}')
    before = snapshot(folder)
    assert train_py("--expansion", 3) == 2
    assert "config.json exists and is not one of ours: run train.py in another folder" in capsys.readouterr().err
    assert snapshot(folder) == before


def test_train_py_goes_on_after_ctrl_c(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Stopped twice, broken off once, repeated each time: the bytes of one go, and older rows of the metrics stay."""
    flags = ["--expansion", 2, "--save-every", 20]
    old_rows = "step,loss,mse,l1,l0,dead_features\n" + "".join(f"{i},0.5,0.25,0.125,0.5,7\n" for i in range(0, 90, 30))
    (folder / "training_metrics").mkdir()
    metrics = folder / "training_metrics" / "training_metrics_2x.csv"
    model = folder / "saved_models" / "sae_model_2x.pt"
    metrics.write_text(old_rows)
    assert train_py(*flags) == 0
    whole = model.read_bytes(), rows_without_rate(metrics)
    assert metrics.read_text().startswith(old_rows) and len(metrics.read_text().splitlines()) == 4 + 11
    model.unlink()
    metrics.write_text(old_rows)

    step, calls = loop.advance, 0

    class PowerCut(Exception):
        pass

    def interrupted_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (1, 34):
            os.kill(os.getpid(), signal.SIGINT)
        if calls == 57:
            raise PowerCut
        return step(*args, **kwargs)

    monkeypatch.setattr(loop, "advance", interrupted_step)
    for expected in (1, 34):
        capsys.readouterr()
        assert train_py(*flags) == 130
        assert calls == expected
        assert capsys.readouterr().err.endswith("To go on: python train.py with the same flags\n")
        assert not model.exists()
    # not with other settings
    assert train_py(*flags, "--seed", 7) == 2
    assert "a stopped training with another seed" in capsys.readouterr().err
    # steps 34 to 55 are done, the state of 40 is on the disk, and so are the rows of 42, 48 and 54
    with pytest.raises(PowerCut):
        train_py(*flags)
    assert metrics.read_text().splitlines()[-1].startswith("54,")
    assert train_py(*flags) == 0 and calls == 57 + 20
    assert (model.read_bytes(), rows_without_rate(metrics)) == whole
    assert not (folder / "training_metrics" / "state_2x").exists()


def test_old_import_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "sae", raising=False)
    sae = importlib.import_module("sae")
    assert Path(str(sae.__file__)) == ROOT / "sae.py"
    assert sae.SparseAutoEncoder is SparseAutoEncoder and sae.SAEloss is SAEloss
    namespace: dict[str, Any] = {}
    exec("from sae import *", namespace)
    assert {"SparseAutoEncoder", "SAEloss"} <= namespace.keys()
    monkeypatch.delitem(sys.modules, "sae")


# --- old files --------------------------------------------------------------------------------------------------------


def test_old_activations_and_sidecar(folder: Path):
    path = folder / "activations" / "activations_50000.pt"
    (folder / "activations" / "activations_50000_checkpoint_5000.pt").write_bytes(path.read_bytes()[:1000])
    activations = open_activations(path)
    assert (activations.n_rows, activations.d_in, activations.text_ids, activations.tokens) == (
        N_ROWS,
        D_IN,
        None,
        None,
    )
    assert torch.equal(activations.tensor(), torch.load(path, weights_only=True))
    known = {"legacy": True, "hook_name": HOOK, "layer": 3, "model_name": "pythia-70m", "n_texts": 50000}
    known |= {"processing": "centred", "prepend_bos": True, "keep_bos": True, "dataset_name": "openwebtext"}
    assert {key: activations.info[key] for key in known} == known
    path.with_suffix(".json").unlink()
    bare = open_activations(path)
    assert bare.info == {} and bare.n_rows == N_ROWS


def test_old_config_trains_as_it_did_and_evaluates(folder: Path, capsys: pytest.CaptureFixture[str]):
    """The split by row and the batches of the first version; what is written says so."""
    (folder / "old.json").write_text(json.dumps(OLD_CONFIG))
    flags = ["--config", "old.json", "--run-name", "a", "--expansion", "2"]
    assert train_command.main(flags) == 0
    config = json.loads((folder / "runs" / "a" / "config.json").read_text())
    assert (config["split_by"], config["batch_order"], config["expansion"]) == ("row", "torch", 2)
    assert {key: config[key] for key in OLD_CONFIG if key not in ("run_name", "expansion")} == {
        key: value for key, value in OLD_CONFIG.items() if key not in ("run_name", "expansion")
    }
    metadata = json.loads((folder / "runs" / "a" / "sae" / "cfg.json").read_text())["metadata"]
    assert (metadata["processing"], metadata["prepend_bos"], metadata["keep_bos"]) == ("centred", True, True)

    rows = torch.load(folder / "activations" / "activations_50000.pt", weights_only=True)
    held_out = rows[torch.randperm(N_ROWS, generator=torch.Generator().manual_seed(42))[: N_ROWS // 10]]
    with torch.no_grad():
        x_hat, _ = load_sae(folder / "runs" / "a").run(held_out)
    summary = json.loads((folder / "runs" / "a" / "summary.json").read_text())
    assert summary["val_mse"] == pytest.approx((x_hat - held_out).square().mean().item(), rel=1e-5)

    old = {**OLD_CONFIG, "expansion": 2}
    (folder / "old.json").write_text(json.dumps(old))
    (folder / "saved_models").mkdir()
    (folder / "runs" / "a" / "checkpoint.pt").rename(folder / "saved_models" / "sae_model_2x.pt")
    flags = ["--checkpoint", "saved_models/sae_model_2x.pt", "--config", "old.json", "--output", "eval.json"]
    assert evaluate.main(flags) == 0
    evaluated = json.loads((folder / "eval.json").read_text())
    assert evaluated["val_mse"] == pytest.approx(summary["val_mse"], rel=1e-9)
    assert evaluated["val_l0"] == pytest.approx(summary["val_l0"], rel=1e-9)
    assert "val_l0: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("header", "line", "expected"),
    [
        ("mse,l1,l0,loss", "{i}.5,0.25,0.05,2.0", {}),
        ("step,loss,mse,l1,l0,dead_features", "{i},2.0,{i}.5,0.25,0.05,3", {"dead_features": 3}),
        (
            ",".join(ORIGINAL_COLUMNS),
            "{i},2.0,{i}.5,0.25,0.05,3,3e-4,1.5",
            {"dead_features": 3, "lr": 3e-4, "lam": 1.5},
        ),
    ],
)
def test_old_metrics_files(tmp_path: Path, header: str, line: str, expected: dict[str, Any]):
    path = tmp_path / "training_metrics.csv"
    path.write_text(header + "\n" + "".join(line.format(i=i) + "\n" for i in range(100)))
    rows = read_metrics_csv(path)
    assert len(rows) == 100 and all(set(row) == set(ORIGINAL_COLUMNS) for row in rows)
    for i, row in enumerate(rows):
        step = None if "step" not in header else i
        values = {"step": step, "loss": 2.0, "mse": i + 0.5, "l1": 0.25, "l0": 0.05, **expected}
        assert row == {**dict.fromkeys(ORIGINAL_COLUMNS), **values}


# --- old checkpoints --------------------------------------------------------------------------------------------------


def save_old_model(path: Path, W_enc: torch.Tensor, W_dec: torch.Tensor) -> None:
    path.parent.mkdir(exist_ok=True)
    weights = {"b_pre": torch.zeros(D_IN), "b_enc": torch.zeros(len(W_dec)), "W_enc": W_enc, "W_dec": W_dec}
    torch.save(weights, path)


@pytest.fixture
def old_models(folder: Path) -> Path:
    """saved_models/ with 4 and with 2.5 latents per dimension, and one that reconstructs exactly."""
    generator = torch.Generator().manual_seed(1)
    for name, d_sae in (("sae_model_4x.pt", 128), ("sae_model_2.5x.pt", 80)):
        W_dec = torch.nn.functional.normalize(torch.randn(d_sae, D_IN, generator=generator), dim=1)
        save_old_model(folder / "saved_models" / name, 0.2 * torch.randn(D_IN, d_sae, generator=generator), W_dec)
    one = torch.eye(D_IN)
    save_old_model(folder / "saved_models" / "exact.pt", torch.cat([one, -one], 1), torch.cat([one, -one]))
    return folder


@pytest.mark.parametrize(("name", "d_sae"), [("sae_model_4x.pt", 128), ("sae_model_2.5x.pt", 80)])
def test_old_checkpoint_without_a_config(old_models: Path, capsys: pytest.CaptureFixture[str], name: str, d_sae: int):
    """`eval_sae.py --checkpoint saved_models/X.pt` alone: the first version's defaults, the width from the weights."""
    assert evaluate.main(["--checkpoint", f"saved_models/{name}", "--output", "eval.json"]) == 0
    found = json.loads((old_models / "eval.json").read_text())
    weights = torch.load(old_models / "saved_models" / name, weights_only=True)
    rows = torch.load(old_models / "activations" / "activations_50000.pt", weights_only=True)
    order = torch.randperm(N_ROWS, generator=torch.Generator().manual_seed(42))
    held_out, rest = rows[order[: N_ROWS // 20]], rows[order[N_ROWS // 20 :]]
    f = torch.relu(held_out @ weights["W_enc"])
    assert (found["num_features"], found["num_params"]) == (d_sae, D_IN + d_sae + 2 * D_IN * d_sae)
    assert found["val_mse"] == pytest.approx((f @ weights["W_dec"] - held_out).square().mean().item(), rel=1e-5)
    assert found["val_l0"] == pytest.approx((f > 0).float().mean().item(), rel=1e-6)
    assert found["l0"] == pytest.approx(d_sae * found["val_l0"])
    assert found["dead_features"] == int((torch.relu(rest @ weights["W_enc"]) == 0).all(dim=0).sum())
    notes = " ".join(found["notes"])
    assert f"no config.json beside saved_models/{name}" in notes and "cross-entropy left out" in notes
    err = capsys.readouterr().err
    assert "Traceback" not in err and all(line.startswith("note: ") for line in err.splitlines())


def test_old_checkpoint_in_the_language_model(old_models: Path, tiny_neox_dir: Path):
    """Old checkpoints work on the centred residual; one that gives it back exactly costs the model nothing."""
    (old_models / "texts.txt").write_text("the cat sat on the mat\nthe dog ran far away from home\n")
    flags = ["--model", str(tiny_neox_dir), "--eval-texts-path", "texts.txt", "--device", "cpu"]
    found = {}
    for name in ("exact.pt", "sae_model_2.5x.pt"):
        assert evaluate.main(["--checkpoint", f"saved_models/{name}", *flags, "--output", f"{name}.json"]) == 0
        found[name] = json.loads((old_models / f"{name}.json").read_text())
    exact, other = found.values()
    assert exact["ce_sae"] == pytest.approx(exact["ce_clean"], abs=1e-5)
    assert exact["kl_clean_sae"] == pytest.approx(0, abs=1e-5) and exact["val_mse"] < 1e-12
    assert exact["ce_clean"] == other["ce_clean"] and other["kl_clean_sae"] > 1e-3
    assert abs(exact["ce_zero"] - exact["ce_clean"]) > 1e-2


def test_old_checkpoints_are_ablated_and_compared(
    old_models: Path, tiny_neox_dir: Path, capsys: pytest.CaptureFixture[str]
):
    (old_models / "texts.txt").write_text("the cat sat on the mat\n")
    flags = ["--checkpoint", "saved_models/sae_model_2.5x.pt", "--eval-texts-path", "texts.txt", "--device", "cpu"]
    assert ablate.main([*flags, "--model", str(tiny_neox_dir), "--output", "ablation.csv"]) == 0
    with open(old_models / "ablation.csv") as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["feature_idx"]) for row in rows) == list(range(80)) and float(rows[0]["mean_kl"]) > 0
    assert "centred residual, BOS prepended" in capsys.readouterr().err
    checkpoints = [f"saved_models/sae_model_{expansion}x.pt" for expansion in ("2.5", "4")]
    assert compare.main(["--checkpoints", *checkpoints, "--activation-dim", str(D_IN), "--output", "c.csv"]) == 0
    with open(old_models / "c.csv") as file:
        assert [int(row["left_feature"]) for row in csv.DictReader(file)] == list(range(80))
    assert capsys.readouterr().err == ""
    with pytest.warns(UserWarning, match="taken as the original pipeline's setting"):
        sae = load_sae_checkpoint("saved_models/sae_model_4x.pt", D_IN, 4)
    assert (sae.d_sae, sae.metadata["processing"], sae.metadata["prepend_bos"]) == (128, "centred", True)


def test_the_25_keys_are_still_the_config():
    assert OLD_CONFIG.keys() <= set(SAETrainConfig.field_names()) and len(OLD_CONFIG) == 25
    defaults = SAETrainConfig()
    kept = {"epochs": 50000, "batch_size": 4096, "l1_lambda": 3.0, "learning_rate": 3e-4, "warmup_steps": 2000}
    kept |= {"lambda_warmup_steps": 5000, "val_fraction": 0.05, "expansion": 8, "eval_batch_size": 8192, "seed": 42}
    kept |= {"activation_dim": 512, "layer": 3, "hook_name": HOOK, "max_grad_norm": 1.0, "num_features": 4096}
    kept |= {"model_name": "pythia-70m", "model_source": "EleutherAI/pythia-70m", "dataset_name": "openwebtext"}
    kept |= {"activations_path": "activations/activations_50000.pt", "runs_root": "runs", "run_name": None}
    assert {name: getattr(defaults, name) for name in kept} == kept
