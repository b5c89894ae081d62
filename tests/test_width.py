"""Any width: --d-sae beside --expansion, through training, resuming, evaluating, sweeps and plans."""

import csv
import json
from pathlib import Path

import pytest
import torch
from collecting import collect_quietly

from mechint.cli import evaluate, plan, sweep, train
from mechint.config import SAETrainConfig
from mechint.errors import MechintError
from mechint.sae import load_sae
from mechint.train import loop
from mechint.train import plan as planning

D_IN = 128
ARCHITECTURES = ("standard", "topk", "batchtopk", "matryoshka_batchtopk", "jumprelu", "gated")
SHORT = ("--steps", "12", "--batch-size", "64", "--warmup-steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    return collect_quietly(
        *("--model", "builtin/pythia-tiny", "--dataset", "builtin/tales", "--num-texts", 12, "--device", "cpu"),
        *("--output", folder / "tales"),
    )


@pytest.fixture
def here(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(store: Path, name: str, *flags: object) -> dict:
    """Train, and the config.json that came of it."""
    words = ["--activations-path", str(store), "--run-name", name, *SHORT, *map(str, flags)]
    assert train.main(words) == 0
    return json.loads(Path("runs", name, "config.json").read_text())


# --- what the settings mean -------------------------------------------------------------------------------------------


def test_the_width_by_either_setting():
    for given, latents in (
        ({}, 4096),
        ({"expansion": 4}, 2048),
        ({"d_sae": 1000}, 1000),
        ({"activation_dim": 100, "d_sae": 250}, 250),
        ({"activation_dim": 100, "d_sae": 200, "expansion": 2}, 200),
    ):
        assert SAETrainConfig(**given).num_features == latents
        assert SAETrainConfig.from_dict(given).num_features == latents
    assert SAETrainConfig().expansion == 8


def test_the_later_of_the_two_counts():
    saved = SAETrainConfig(activation_dim=100, d_sae=200, expansion=2)
    assert saved.with_overrides(expansion=3).num_features == 300
    assert saved.with_overrides(d_sae=55).num_features == 55
    assert saved.with_overrides(activation_dim=50).num_features == 100  # two latents per dimension stay two
    odd = SAETrainConfig(activation_dim=100, d_sae=55)
    assert odd.with_overrides(activation_dim=50).num_features == 55
    assert odd.with_overrides(expansion=1).num_features == 100


@pytest.mark.parametrize("given", [{"d_sae": 100, "expansion": 8}, {"d_sae": 4097, "expansion": 8}])
def test_both_are_refused_where_they_contradict(given: dict):
    for make in (lambda: SAETrainConfig(**given), lambda: SAETrainConfig.from_dict(given)):
        with pytest.raises(MechintError, match=rf"--d-sae {given['d_sae']} and --expansion 8 .* 4096; give one"):
            make()


def test_contradictions_on_the_command_line_and_in_files(here: Path, store: Path, capsys: pytest.CaptureFixture[str]):
    files = {
        "both.json": {"activation_dim": D_IN, "d_sae": 300, "expansion": 2},
        "agree.json": {"activation_dim": D_IN, "d_sae": 256, "expansion": 2},
        "odd.json": {"activation_dim": D_IN, "d_sae": 300},
        "times.json": {"activation_dim": D_IN, "expansion": 3},
    }
    for name, values in files.items():
        Path(name).write_text(json.dumps(values))
    commands = {
        "train": (train.main, ["--activations-path", str(store), *SHORT]),
        "plan": (plan.main, ["--activations-path", str(store), *SHORT, "--seconds", "0", "--json"]),
    }
    for command, words in commands.values():
        for bad in (["--d-sae", "300", "--expansion", "2"], ["--config", "both.json"]):
            assert command([*words, *bad]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert "--d-sae 300 and --expansion 2 contradict each other" in line and "d_in 128 is 256" in line
    assert not Path("runs").exists()
    fine = {
        256: (["--d-sae", "256", "--expansion", "2"], ["--config", "agree.json"], ["--config", "odd.json", *_x(2)]),
        300: (["--config", "times.json", *_n(300)], ["--config", "both.json", *_n(300)], ["--config", "odd.json"]),
        384: (
            ["--config", "times.json"],
            ["--config", "agree.json", "--expansion=3"],
            ["--config", "odd.json", *_x(3)],
        ),
    }
    command, words = commands["plan"]
    for latents, mixtures in fine.items():
        for flags in mixtures:
            assert command([*words, *flags]) == 0
            config = json.loads(capsys.readouterr().out)["config"]
            assert (config["d_sae"], config["expansion"]) == (latents, None if latents % D_IN else latents // D_IN)


def _x(times: int) -> list[str]:
    return ["--expansion", str(times)]


def _n(latents: int) -> list[str]:
    return ["--d-sae", str(latents)]


# --- through the commands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_at_an_odd_width(here: Path, store: Path, architecture: str):
    config = run(store, architecture, "--d-sae", 201, "--architecture", architecture, "--preset", "mechint")
    assert (config["d_sae"], config["expansion"], config["activation_dim"]) == (201, None, D_IN)
    sae = load_sae(Path("runs", architecture))
    assert (sae.d_in, sae.d_sae) == (D_IN, 201)
    summary = json.loads(Path("runs", architecture, "summary.json").read_text())
    assert summary["num_features"] == 201 and summary["l0"] == pytest.approx(201 * summary["val_l0"])


def test_a_saved_config_says_the_width_in_both_ways(here: Path, store: Path):
    assert {"expansion": 2, "d_sae": 256}.items() <= run(store, "a", "--expansion", 2).items()
    assert {"expansion": 2, "d_sae": 256}.items() <= run(store, "b", "--d-sae", 256).items()
    weights = [torch.load(f"runs/{name}/checkpoint.pt", weights_only=True) for name in "ab"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    again = run(store, "c", "--config", "runs/a/config.json")
    assert again["d_sae"] == 256 and run(store, "d", "--config", "runs/a/config.json", "--d-sae", 70)["d_sae"] == 70


def test_an_odd_width_is_resumed_exactly_and_evaluated(
    here: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run(store, "whole", "--d-sae", 201, "--save-every", 4)
    advance, steps = loop.advance, []

    def stop_at_7(*args: object):
        steps.append(0)
        if len(steps) > 7:
            raise KeyboardInterrupt
        return advance(*args)

    monkeypatch.setattr(loop, "advance", stop_at_7)
    flags = ["--activations-path", str(store), "--run-name", "cut", *SHORT, "--d-sae", "201", "--save-every", "4"]
    assert train.main(flags) == 130
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert train.main(["--resume", "runs/cut", "--expansion", "2"]) == 2
    assert "being trained with" in capsys.readouterr().err
    assert train.main(["--resume", "runs/cut", "--d-sae", "201"]) == 0
    assert Path("runs/cut/checkpoint.pt").read_bytes() == Path("runs/whole/checkpoint.pt").read_bytes()
    assert evaluate.main(["--run-dir", "runs/cut", "--device", "cpu", "--max-eval-texts", "2"]) == 0
    found = json.loads(Path("runs/cut/eval.json").read_text())
    assert found["num_features"] == 201 and found["ce_sae"] > 0


def test_the_legacy_layout_of_an_odd_width(here: Path, store: Path):
    assert train.main(["--activations-path", str(store), *SHORT, "--legacy-layout", "--d-sae", "201"]) == 0
    assert Path("saved_models/sae_model_201latents.pt").is_file()
    assert train.main(["--activations-path", str(store), *SHORT, "--legacy-layout", "--d-sae", "256"]) == 0
    assert Path("saved_models/sae_model_2x.pt").is_file()


def test_a_sweep_over_widths(here: Path, store: Path):
    words = ["--activations-path", str(store), "--steps", "6", "--set", "batch_size=64", "--eval-texts", "0"]
    words += ["--device", "cpu", "--name", "s", "--d-sae", "100", "256", "201", "--expansion", "1", "2"]
    assert sweep.main(words) == 0
    with open("runs/s/results.csv") as file:
        rows = {row["member"]: (row["expansion"], row["d_sae"]) for row in csv.DictReader(file)}
    assert rows == {  # 256 is 2x, which is trained once
        "standard-1x": ("1", "128"),
        "standard-2x": ("2", "256"),
        "standard-100latents": ("", "100"),
        "standard-201latents": ("", "201"),
    }
    member = json.loads(Path("runs/s/standard-201latents/config.json").read_text())
    alone = ["--config", "runs/s/standard-201latents/config.json", "--runs-root", "runs", "--run-name", "alone"]
    assert train.main(alone) == 0
    assert member["d_sae"] == 201
    one, other = (Path("runs", name, "checkpoint.pt").read_bytes() for name in ("s/standard-201latents", "alone"))
    assert one == other
    assert sweep.main([*words[:-9], "--name", "t", "--config", "runs/alone/config.json", "--expansion", "1", "2"]) == 0
    assert {path.name for path in Path("runs/t").glob("standard-*")} == {"standard-1x", "standard-2x"}


def test_a_plan_names_the_setting_to_lower(
    here: Path, store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    words = ["--activations-path", str(store), *SHORT, "--seconds", "0"]
    assert plan.main([*words, "--d-sae", "201"]) == 0
    assert "128 -> 201 latents" in capsys.readouterr().out
    monkeypatch.setattr(planning, "available_memory", lambda device: 10**8)
    assert plan.main([*words, "--d-sae", "90001"]) == 2
    assert "--d-sae to" in (said := capsys.readouterr().err) and "(now 90001)" in said
    fits = int(said.split("--d-sae to ")[1].split()[0])
    assert plan.main([*words, "--d-sae", str(int(0.9 * fits))]) == 0


def test_a_config_file_without_a_width_takes_that_of_the_activations(here: Path, store: Path):
    Path("few.json").write_text(json.dumps({"expansion": 2, "batch_size": 64}))
    config = run(store, "e", "--config", "few.json")
    assert (config["activation_dim"], config["d_sae"]) == (D_IN, 2 * D_IN)
