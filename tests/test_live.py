"""Training straight from a model: the same run directory, held-out texts kept apart, stopped and resumed to the bit."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from test_norms import changed_model

from mechint.cli import main
from mechint.config import SAETrainConfig
from mechint.data import open_activations
from mechint.errors import MechintError
from mechint.runs import Run
from mechint.train import Stopped, loop, resume, train

HOOK = "blocks.2.hook_resid_post"
WORDS = ["the cat sat", "the dog ran away from home", "a bird sang in the tree", "far away", "the 7 mats", "and again"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines = [f"{WORDS[i % 6]} {WORDS[i * 7 % 5]} {i}" for i in range(400)]
    (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n")
    torch.set_num_threads(1)
    return tmp_path


def words(model: Path, name: str, *more: object) -> list[str]:
    asked = f"--model {model} --dataset texts.txt --layer 2 --run-name {name} --device cpu --preset mechint"
    asked += " --architecture topk --k 4 --expansion 4 --steps 60 --batch-size 64 --buffer-rows 900"
    asked += " --checkpoint-every 40 --val-fraction 0.1 --log-every 5 --save-every 20"
    return [*asked.split(), *map(str, more)]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_straight_from_a_model_is_a_run(tiny_neox_dir: Path, here: Path):
    assert main(["train", *words(tiny_neox_dir, "a")]) == 0
    run = Run("runs/a")
    held_out = open_activations(run.activations_path())
    assert held_out.path == run.path / "heldout" and held_out.info["n_texts"] == 40
    assert held_out.info["hook_name"] == HOOK == run.config.hook_name
    assert run.config.live is not None and run.config.live["dataset"] == "texts.txt"
    assert run.config.num_texts == 50_000 and run.config.activation_dim == held_out.d_in
    assert run.summary["n_val"] == held_out.n_rows and run.summary["n_train"] == 60 * 64
    assert run.summary["fvu"] < 0.5
    assert run.manifest["inputs"]["activations"]["live"] == run.config.live
    assert main(["eval", "runs/a", "--max-eval-texts", "10"]) == 0
    found = json.loads(Path("runs/a/eval.json").read_text())
    assert found["fvu"] == pytest.approx(run.summary["fvu"], rel=1e-5) and found["ce_sae"] > 0
    assert main(["rank", "runs/a", "--num-texts", "6", "--exact-texts", "2", "--top", "2", "--control", "2"]) == 0
    assert main(["report", "runs/a"]) == 0
    assert main(["verify", "runs/a"]) == 0
    moved = Path("elsewhere")
    Path("runs/a").rename(moved)  # the held-out rows go with the run
    assert main(["eval", "elsewhere", "--max-eval-texts", "0", "--overwrite"]) == 0


def test_what_is_held_out_is_not_trained_on(tiny_neox_dir: Path, here: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    step = loop.advance

    def watched(training, x):
        seen.append(training.live.position["step"])
        batch_texts.update(last["batch"].text_ids.tolist())
        return step(training, x)

    batch_texts: set[int] = set()
    last: dict = {}
    from mechint.data.source import Live

    next_batch = Live.next_batch

    def noted(self):
        last["batch"] = next_batch(self)
        return last["batch"]

    monkeypatch.setattr(Live, "next_batch", noted)
    monkeypatch.setattr(loop, "advance", watched)
    assert main(["train", *words(tiny_neox_dir, "a")]) == 0
    assert seen == list(range(1, 61))
    assert min(batch_texts) == 40 and len(batch_texts) > 200, "the first tenth is held out"


@pytest.mark.parametrize("stop_at", [7, 33, 59])
def test_stopped_and_resumed_is_the_same_to_the_bit(
    tiny_neox_dir: Path, here: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
):
    """In the first pass over the texts and in later ones, with outliers left out."""
    model = changed_model(tiny_neox_dir, here / "model", "7", 100.0)
    more = ("--max-norm-multiple", 2)
    assert main(["train", *words(model, "whole", *more)]) == 0
    whole = Run("runs/whole")
    assert whole.summary["left_out"]["n_rows"] > 10
    step, calls = loop.advance, 0

    def stopping(*args):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "advance", stopping)
        config = SAETrainConfig.from_dict({**whole.config.to_dict(), "run_name": "stopped"})
        with pytest.raises(Stopped, match="--resume"):
            train(config, progress=False)
    layout = resume("runs/stopped", progress=False)
    assert sha256(layout.checkpoint) == sha256(whole.checkpoint_path)
    summary = json.loads(layout.summary.read_text())
    assert summary["left_out"] == whole.summary["left_out"]
    rows = [path.read_text().splitlines() for path in (layout.metrics, whole.metrics_path)]
    assert [row.rsplit(",", 1)[0] for row in rows[0]] == [row.rsplit(",", 1)[0] for row in rows[1]]


def test_texts_that_change_while_a_run_is_stopped(tiny_neox_dir: Path, here: Path, monkeypatch: pytest.MonkeyPatch):
    def stopping(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    step = loop.advance
    with monkeypatch.context() as patch:
        patch.setattr(loop, "advance", stopping)
        assert main(["train", *words(tiny_neox_dir, "a")]) == 130
    with open("texts.txt", "a") as file:
        file.write("one more\n")
    with pytest.raises(MechintError, match="texts.txt have changed since"):
        resume("runs/a", progress=False)


def test_several_processes_are_refused(
    tiny_neox_dir: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", *words(tiny_neox_dir, "a")]) == 2
    assert "is one process: collect first" in capsys.readouterr().err and not Path("runs").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--hook", "blocks.9.hook_resid_post"], "blocks.9"),
        (["--val-fraction", "0"], "--val-fraction 0 leaves nothing to measure"),
        (["--num-texts", "1"], "the first 1 texts are held out"),
        (["--activations-path", "acts"], "--checkpoint-every says how texts are read, in a training straight"),
        (["--dataset", "none.txt"], "none.txt"),
        (["--architecture", "topk", "--k", "900"], "--k must be"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_run(
    more: list[str], message: str, tiny_neox_dir: Path, here: Path, capsys: pytest.CaptureFixture[str]
):
    asked = words(tiny_neox_dir, "a", *more)
    if "--hook" in more:
        asked = [word for word in asked if word not in ("--layer", "2")]
    assert main(["train", *asked]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and message in said
    assert not Path("runs").exists()
