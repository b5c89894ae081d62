"""What the files of a training say of its activations: what they themselves say, or a flag, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from collecting import collect_quietly

from mechint.cli import sweep, train
from mechint.config import SAETrainConfig, said
from mechint.data import open_activations
from mechint.sae import load_sae

D_IN, N_ROWS = 32, 600
HOOK = "blocks.2.hook_resid_post"
SHORT = ("--steps", "6", "--batch-size", "64", "--device", "cpu")
# What an SAE's own record and config.json both say, and the flag that says it.
FLAGS = {
    "model_name": "--model",
    "model_source": "--model-source",
    "hook_name": "--hook",
    "processing": "--processing",
    "prepend_bos": "--prepend-bos",
    "dataset_name": "--dataset",
}
# What only config.json holds, for the keys that the first version's had.
MORE = ("layer", "dataset_split", "num_texts", "max_chars")
GIVEN: dict[str, Any] = {
    "model_name": "gpt2",
    "model_source": "openai-community/gpt2",
    "hook_name": "blocks.5.hook_mlp_out",
    "processing": "raw",
    "prepend_bos": False,
    "dataset_name": "mine",
}
ORIGINAL = {
    "activation_dim": 512, "activations_path": "acts.pt", "batch_size": 4096, "dataset_name": "openwebtext",
    "dataset_split": "train", "device": "cpu", "epochs": 50000, "eval_batch_size": 8192, "expansion": 8,
    "hook_name": HOOK, "l1_lambda": 3.0, "lambda_warmup_steps": 5000, "layer": 3, "learning_rate": 3e-4,
    "legacy_layout": False, "max_chars": 512, "max_grad_norm": 1.0, "model_name": "pythia-70m",
    "model_source": "EleutherAI/pythia-70m", "num_texts": 50000, "run_name": None, "runs_root": "runs", "seed": 42,
    "val_fraction": 0.05, "warmup_steps": 2000,
}  # fmt: skip
KINDS = ("bare", "originals", "ours", "store")


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory, tiny_neox_dir: Path) -> Path:
    """The four kinds of activations; ours are of a random model at another hook than the first version's."""
    folder = tmp_path_factory.mktemp("collected")
    (folder / "texts.txt").write_text("the cat sat on the mat and ran far away from home\n" * 60)
    for output in ("ours.pt", "store"):
        collect_quietly(
            *("--model", tiny_neox_dir, "--hook", HOOK, "--dataset", folder / "texts.txt", "--max-chars", 77),
            *("--output", folder / output, "--device", "cpu"),
        )
    for name in ("bare", "originals"):
        torch.save(torch.randn(N_ROWS, D_IN, generator=torch.Generator().manual_seed(0)), folder / f"{name}.pt")
    sidecar = {"activation_dim": 512, "activation_path": "originals.pt", "config": ORIGINAL, "num_vectors": N_ROWS}
    (folder / "originals.json").write_text(json.dumps({**sidecar, "git_commit": "d141e85"}))
    return folder


def path_of(collected: Path, kind: str) -> str:
    return str(collected / (kind if kind == "store" else f"{kind}.pt"))


def flags_for(values: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for key, value in values.items():
        flag = FLAGS[key]
        words += [flag if value else flag.replace("--", "--no-")] if isinstance(value, bool) else [flag, str(value)]
    return words


def trained(path: str, *flags: str) -> dict[str, dict[str, Any]]:
    """Every file that could say something: the SAE's own record by the two ways to read it, and the others."""
    assert train.main(["--activations-path", path, "--run-name", "a", *SHORT, *flags]) == 0
    run = max(Path("runs").iterdir(), key=lambda place: place.stat().st_mtime_ns)
    read = {name: json.loads((run / name).read_text()) for name in ("config.json", "manifest.json", "sae/cfg.json")}
    return {**read, "sae": load_sae(run).metadata}


def expected_of(collected: Path, kind: str) -> dict[str, Any]:
    """What the activations say of themselves."""
    if kind == "bare":
        return dict.fromkeys((*FLAGS, *MORE))
    if kind == "originals":
        known = {key: ORIGINAL[key] for key in (*FLAGS, *MORE) if key in ORIGINAL}
        return {**known, "layer": 2, "processing": "centred", "prepend_bos": True}
    info = open_activations(path_of(collected, kind)).info
    return {key: info["n_texts" if key == "num_texts" else key] for key in (*FLAGS, *MORE)}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_known_is_in_every_file_and_nothing_else(
    collected: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    files, expected = trained(path_of(collected, kind)), expected_of(collected, kind)
    assert ORIGINAL.keys() <= files["config.json"].keys()
    for config in (files["config.json"], files["manifest.json"]["config"]):
        assert {key: config[key] for key in expected} == expected
    for metadata in (files["sae/cfg.json"]["metadata"], files["sae"]):
        assert {key: metadata.get(key) for key in FLAGS} == {key: expected[key] for key in FLAGS}
        assert not metadata.get("legacy")
    text = " ".join(path.read_text() for path in Path("runs/a").rglob("*.json"))
    assert ("pythia" in text) == ("centred" in text) == (kind == "originals")
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"note: {collected}")]
    assumed = files["manifest.json"]["inputs"]["activations"].get("assumed")
    if kind == "bare":
        assert "does not say its model_name, hook_name, processing, prepend_bos" in notes[0] and "--hook" in notes[0]
    elif kind == "originals":
        assert "the original pipeline always collected so" in assumed and assumed in notes[0]
    assert len(notes) == (kind in ("bare", "originals")) and (assumed is None) == (kind != "originals")


def test_flags_say_what_a_bare_file_does_not(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    files = trained(path_of(collected, "bare"), *flags_for(GIVEN))
    expected = {**GIVEN, "layer": 5, "dataset_split": None, "num_texts": None, "max_chars": None}
    assert {key: files["config.json"][key] for key in expected} == expected
    for metadata in (files["sae/cfg.json"]["metadata"], files["sae"]):
        assert {key: metadata[key] for key in GIVEN} == GIVEN
    assert f"note: {collected}" not in capsys.readouterr().err
    # one thing said leaves the others unknown; and what the first version always had can be said, too
    said_once = trained(path_of(collected, "bare"), "--model", "pythia-70m")["config.json"]
    assert {key: said_once[key] for key in FLAGS} == {**dict.fromkeys(FLAGS), "model_name": "pythia-70m"}
    by_file = Path("mine.json")
    by_file.write_text(json.dumps({"activation_dim": D_IN, "hook": HOOK, "prepend_bos": True}))
    config = trained(path_of(collected, "bare"), "--config", str(by_file))["config.json"]
    assert (config["hook_name"], config["layer"], config["prepend_bos"], config["model_name"]) == (HOOK, 2, True, None)


@pytest.mark.parametrize("kind", ["originals", "ours", "store"])
@pytest.mark.parametrize("key", FLAGS)
def test_a_flag_that_contradicts_the_record_is_refused(
    collected: Path, kind: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    """Also where the flag's value is what the first version had by default."""
    monkeypatch.chdir(tmp_path)
    recorded = expected_of(collected, kind)[key]
    default = said(getattr(SAETrainConfig(), key)) or str(getattr(SAETrainConfig(), key))
    others = {"processing": ["raw", "centred"], "prepend_bos": [True, False]}.get(key, [GIVEN[key], default])
    for other in (value for value in others if value != recorded):
        words = ["--activations-path", path_of(collected, kind), *SHORT, *flags_for({key: other})]
        assert train.main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"collected with {key} {recorded!r}" in line and repr(other) in line
    assert not Path("runs").exists()
    same = flags_for({key: recorded})
    assert trained(path_of(collected, kind), *same)["config.json"][key] == recorded


def test_a_sweep_over_a_bare_file(collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    words = ["--activations-path", path_of(collected, "bare"), "--steps", "4", "--seed", "0", "1", "--device", "cpu"]
    words += ["--eval-texts", "0", "--set", "batch_size=64", "hook_name=blocks.1.hook_mlp_out", "--name", "s"]
    assert sweep.main(words) == 0
    for member in Path("runs/s").glob("standard-*"):
        config = json.loads((member / "config.json").read_text())
        assert (config["hook_name"], config["layer"], config["model_name"]) == ("blocks.1.hook_mlp_out", 1, None)
        assert load_sae(member).metadata.get("model_name") is None
    assert "pythia" not in Path("runs/s/sweep.json").read_text()


def test_another_json_beside_a_pt_is_no_record(tmp_path: Path):
    torch.save(torch.randn(20, D_IN), tmp_path / "a.pt")
    for content in ({"config": ORIGINAL}, {"config": {"hook_name": HOOK}, "activation_path": "a.pt"}, {"rows": 20}):
        (tmp_path / "a.json").write_text(json.dumps(content))
        assert open_activations(tmp_path / "a.pt").info == {}
