"""The commands that read an SAE, with it as their first argument: a run on single heads, folders of other tools, a
transcoder; and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import HOOK

from mechint.cli import ablate, concepts, evaluate, rank, steer
from mechint.config import CollectConfig, EvalConfig, SAETrainConfig
from mechint.data import collect_activations
from mechint.errors import MechintError
from mechint.formats.saelens import save_folder
from mechint.inside import named_sae
from mechint.models import load_model
from mechint.sae import SAE, SAEConfig
from mechint.sae.config import SAEMetadata
from mechint.train import train

HEADS = "blocks.2.attn.hook_z"
COMMANDS = {
    "eval": evaluate.main,
    "rank": rank.main,
    "ablate": ablate.main,
    "concepts": concepts.main,
    "steer": steer.main,
}


@pytest.fixture(scope="module")
def place(tiny_neox_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations of single heads, a run of 20 steps on them, texts and labels."""
    folder = tmp_path_factory.mktemp("commands")
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "the",
        "mat",
        "and",
        "the",
        "dog",
        "ran",
        "far",
        "away",
        "from",
        "home",
        "again",
    ]
    lines = [" ".join(words[(i + 3 * j) % 15] for j in range(4 + i % 9)) for i in range(40)]
    (folder / "texts.txt").write_text("\n".join(lines) + "\n")
    labels = [f"{line},{line.index('the')},{line.index('the') + 3},article" for line in lines if "the" in line]
    (folder / "labels.csv").write_text("\n".join(["text,start,end,concept", *dict.fromkeys(labels)]) + "\n")
    collect_activations(
        CollectConfig(model=str(tiny_neox_dir), dataset=str(folder / "texts.txt"), output=folder / "store", hook=HEADS,
                      device="cpu"),
        progress=False,
    )  # fmt: skip
    train(
        SAETrainConfig(activations_path=str(folder / "store"), activation_dim=32, expansion=2, epochs=20, batch_size=64,
                       l1_lambda=0.01, val_fraction=0.25, runs_root=str(folder), run_name="run", device="cpu"),
        progress=False,
    )  # fmt: skip
    return folder


def argv_of(place: Path, out: Path) -> dict[str, list[str]]:
    """Flags of each command beside the SAE and where its output goes."""
    texts = ["--eval-texts-path", str(place / "texts.txt")]
    return {
        "eval": ["--max-eval-texts", "5", "--resamples", "10", "--output", str(out / "eval.json")],
        "rank": ["--num-texts", "4", "--top", "3", "--control", "2", "--exact-texts", "2", "--draws", "1",
                 "--output", str(out / "ranking.csv")],
        "ablate": [*texts, "--feature-subset", "0-3", "--output", str(out / "ablation.csv")],
        "concepts": ["--labels", str(place / "labels.csv"), "--min-tokens", "2", "--no-probes", "--no-baselines",
                     "--output-dir", str(out)],
        "steer": ["--prompts", "the cat", "--latent", "3", "--max-new-tokens", "2", "--unit", "raw",
                  "--coefficients", "2", "--output", str(out / "steer.json")],
    }  # fmt: skip


FILES = {
    "eval": "eval.json",
    "rank": "ranking.csv",
    "ablate": "ablation.csv",
    "concepts": "concepts.csv",
    "steer": "steer.json",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_on_single_heads_is_read_by_every_command(place: Path, tmp_path: Path, name: str, capsys):
    """As the first argument or under the old flag: the same."""
    found = []
    old = "--checkpoint" if name == "ablate" else "--run-dir"
    for flags in ([str(place / "run")], [old, str(place / "run")]):
        out = tmp_path / str(len(found))
        out.mkdir()
        assert COMMANDS[name]([*flags, *argv_of(place, out)[name]]) == 0, capsys.readouterr().err
        found.append((out / FILES[name]).read_text())
    assert found[0] == found[1]
    if name == "eval":
        summary = json.loads(found[0])
        assert summary["notes"] == [] and summary["ce_sae"] != summary["ce_clean"]


def folder_of(place: Path, tmp_path: Path, *, ours: bool) -> Path:
    """The run's SAE as a folder that lies by itself: ours, or as if SAELens had written it."""
    copy = tmp_path / ("ours" if ours else "theirs")
    shutil.copytree(place / "run" / "sae", copy)
    if not ours:
        cfg = json.loads((copy / "cfg.json").read_text())
        del cfg["metadata"]["mechint_version"]
        (copy / "cfg.json").write_text(json.dumps(cfg))
    return copy


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_of_another_tool_is_read_by_every_command(place: Path, tmp_path: Path, name: str, capsys):
    theirs = folder_of(place, tmp_path, ours=False)
    flags = argv_of(place, tmp_path)[name]
    if name in ("eval", "rank"):
        flags += ["--activations-path", str(place / "store")]
    assert COMMANDS[name]([str(theirs), *flags]) == 0, capsys.readouterr().err
    if name == "eval":
        notes = json.loads((tmp_path / "eval.json").read_text())["notes"]
        assert any("which rows" in note for note in notes)


def test_results_go_beside_an_sae_of_ours_and_nowhere_else_unasked(place: Path, tmp_path: Path, capsys):
    flags = [word for word in argv_of(place, tmp_path)["rank"][:-2]] + ["--eval-texts-path", str(place / "texts.txt")]
    ours, theirs = folder_of(place, tmp_path, ours=True), folder_of(place, tmp_path, ours=False)
    assert rank.main([str(ours), *flags]) == 0 and (ours / "ranking.csv").is_file()
    assert rank.main([str(theirs), *flags]) == 2
    assert "give --output" in capsys.readouterr().err and not (theirs / "ranking.csv").exists()
    assert concepts.main([str(theirs), "--labels", str(place / "labels.csv")]) == 2
    assert "give --output-dir" in capsys.readouterr().err


def test_texts_alone_are_enough_to_evaluate(place: Path, tmp_path: Path, capsys):
    theirs = folder_of(place, tmp_path, ours=False)
    flags = ["--resamples", "10", "--output", str(tmp_path / "x.json")]
    assert evaluate.main([str(theirs), *flags]) == 2
    assert "--activations-path" in capsys.readouterr().err
    assert evaluate.main([str(theirs), "--eval-texts-path", str(place / "texts.txt"), *flags]) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["fvu"] > 0 and found["ce_sae"] > 0 and found["activations_path"] is None


def test_a_transcoder_is_read_by_every_command(place: Path, tiny_neox_dir: Path, tmp_path: Path, capsys):
    model = load_model(str(tiny_neox_dir), device="cpu")
    torch.manual_seed(0)
    known = {
        "hook_name": "blocks.2.ln2.hook_normalized", "hook_name_out": "blocks.2.mlp.hook_post", "processing": "raw",
        "model_name": str(tiny_neox_dir), "prepend_bos": True, "tokenizer_sha256": model.tokenizer_sha256(),
    }  # fmt: skip
    sae = SAE(SAEConfig(32, 40, "skip_transcoder", d_out=64, metadata=SAEMetadata(known)))
    save_folder(sae, tmp_path / "transcoder")
    texts = ["--eval-texts-path", str(place / "texts.txt")]
    for name, main in COMMANDS.items():
        flags = argv_of(place, tmp_path)[name]
        flags += texts if name in ("eval", "rank") else []
        assert main([str(tmp_path / "transcoder"), *flags]) == 0, (name, capsys.readouterr().err)
    found = json.loads((tmp_path / "eval.json").read_text())
    # the error is that of the output: of a new transcoder's, a multiple of what is there
    assert found["fvu"] > 0.5 and found["num_features"] == 40 and "ce_mean" not in found
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "transcoder"), "--output", str(tmp_path / "y.json")]) == 2
    assert "needs its model and texts" in capsys.readouterr().err


def test_one_sae_is_named_and_once(place: Path, tmp_path: Path):
    run = place / "run"
    with pytest.raises(MechintError, match="first argument"):
        named_sae(EvalConfig())
    for other in ({"run_dir": tmp_path}, {"checkpoint": tmp_path / "checkpoint.pt"}):
        with pytest.raises(MechintError, match="which SAE is it"):
            named_sae(EvalConfig(sae=str(run), **other))
    assert named_sae(EvalConfig(sae=str(run), run_dir=run)).run_dir == run
    assert named_sae(EvalConfig(sae=str(run / "checkpoint.pt"))).checkpoint == run / "checkpoint.pt"
    # a folder of another tool that has a config.json of its own is no run
    (tmp_path / "config.json").write_text("{}")
    assert named_sae(EvalConfig(sae=str(tmp_path))).run_dir is None


def test_a_hook_that_contradicts_the_record_is_refused_by_every_command(place: Path, tmp_path: Path, capsys):
    for name, main in COMMANDS.items():
        assert main([str(place / "run"), "--hook", HOOK, *argv_of(place, tmp_path)[name]]) == 2, name
        error = capsys.readouterr().err
        assert HEADS in error and f"--hook says {HOOK}" in error, name
