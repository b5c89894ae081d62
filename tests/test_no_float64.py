"""The commands on a device that has no float64, as Apple's GPUs: the first thing a person on a laptop does."""

import json
from pathlib import Path

import pytest
import torch
from no_float64 import NoFloat64

from mechint.cli import main
from mechint.config import CollectConfig
from mechint.config.train import architecture_names
from mechint.data.collect import collect
from mechint.eval import evaluate_sae
from mechint.sae import StandardSAE

HOOK = "blocks.3.hook_resid_post"
TEXTS = ["the cat sat on the mat", "the dog ran away from home", "a bird sang in the tree again", "far away the cat"]


@pytest.fixture(scope="module")
def root(tiny_neox_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("apple")
    (root / "texts.txt").write_text("\n".join(TEXTS * 30) + "\n")
    collect(
        CollectConfig(
            model=str(tiny_neox_dir), dataset=str(root / "texts.txt"), output=root / "acts", hook=HOOK, device="cpu"
        ),
        progress=False,
    )
    return root


def run(words: str, *more: object) -> None:
    with NoFloat64():
        assert main([*words.split(), *map(str, more)]) == 0


@pytest.mark.parametrize("architecture", architecture_names())
def test_train_evaluate_rank_and_report(architecture: str, root: Path):
    words = "train --preset mechint --expansion 2 --steps 30 --batch-size 64 --val-fraction 0.2 --b-dec-init median"
    where = ("--activations-path", root / "acts", "--runs-root", root / "runs", "--run-name", architecture)
    run(words, "--architecture", architecture, *where, *(("--k", 4) if "topk" in architecture else ()))
    made = root / "runs" / architecture
    assert json.loads((made / "config.json").read_text())["device"] == "mps"
    run("eval --max-eval-texts 5", made)
    found = json.loads((made / "eval.json").read_text())
    assert found["ce_sae"] > 0 and found["fvu"] < 1
    run("rank --num-texts 5 --exact-texts 2 --top 2 --control 2", made)
    run("report", made)
    assert (made / "report.html").is_file()


def test_the_other_commands(root: Path, tiny_neox_dir: Path, tmp_path: Path):
    where = ("--activations-path", root / "acts", "--runs-root", tmp_path)
    words = "train --preset mechint --architecture topk --k 4 --expansion 2 --steps 20 --batch-size 64 --run-name"
    for name in ("a", "b"):
        run(words, name, *where, "--seed", len(name) + ord(name))
    a, b = tmp_path / "a", tmp_path / "b"
    run("compare --checkpoints", a, b, "--output", tmp_path / "compared.csv")
    texts = tmp_path / "texts.txt"
    texts.write_text("the cat sat on the mat\n")
    run("ablate", a, "--eval-texts-path", texts, "--output", tmp_path / "ablated.csv")
    run("plan --architecture topk --k 4 --steps 20 --batch-size 64", "--activations-path", root / "acts")
    run("convert", a, tmp_path / "converted", "--to", "saelens")
    run("steer", a, "--max-new-tokens", 3, "--latent", 0, "--coefficient", 2, "--prompt", "the cat sat")
    for path, lines in ((tmp_path / "yes.txt", TEXTS[:2]), (tmp_path / "no.txt", TEXTS[2:])):
        path.write_text("\n".join(lines) + "\n")
    prompts = ("--positive", tmp_path / "yes.txt", "--negative", tmp_path / "no.txt")
    place = ("--model", tiny_neox_dir, "--hook", HOOK, "--output", tmp_path / "direction")
    run("extract-steering --processing raw", *prompts, *place)


def test_resampling(root: Path):
    words = (
        "train --expansion 4 --steps 40 --batch-size 64 --revive resample --resample-every 10 --dead-after 200 --lam 30"
    )
    run(words, "--activations-path", root / "acts", "--runs-root", root / "runs", "--run-name", "resampled")
    assert (root / "runs" / "resampled" / "checkpoint.pt").is_file()


def test_collecting(root: Path, tiny_neox_dir: Path):
    run(
        "collect", "--model", tiny_neox_dir, "--dataset", root / "texts.txt", "--hook", HOOK, "--output", root / "there"
    )


def test_evaluating_elsewhere_leaves_the_callers_sae_where_it_is(root: Path):
    with NoFloat64():
        sae, rows = StandardSAE(8, 16), torch.randn(50, 8)
        found = evaluate_sae(sae, rows, torch.ones(16, dtype=torch.bool), 16, "mps")
        assert sae.W_enc.device.type == "cpu"
    here = evaluate_sae(sae, rows, torch.ones(16, dtype=torch.bool), 16, None)
    assert found["fvu"] == pytest.approx(here["fvu"], rel=1e-5)


def test_the_emulation_refuses_what_the_device_would():
    with NoFloat64():
        here, there = torch.ones(3, 4), torch.ones(3, 4, device="mps")
        assert (
            there.device.type == "mps" and (there @ there.T).device.type == "mps" and there.cpu().device.type == "cpu"
        )
        with pytest.raises(TypeError, match="float64"):
            there.double()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, dtype=torch.float64, device="mps")
        with pytest.raises(RuntimeError, match="same device"):
            here + there
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
