"""The two commands from outside: what they print and write, and everything that a user can get wrong."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mechint import steering
from mechint.cli.extract import main as extract
from mechint.cli.steer import main as steer
from mechint.models import load_model
from mechint.sae import StandardSAE, save_checkpoint

HOOK = "blocks.3.hook_resid_post"
PEOPLE = {"female": ("Anna", "Mary", "Emma", "Lucy", "Sara"), "male": ("Paul", "John", "Omar", "Mark", "Adam")}
JOBS = ("baker", "doctor", "sailor", "teacher", "farmer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of prompts, a direction from them, and a run whose latent 3 writes that direction."""
    root = tmp_path_factory.mktemp("steering")
    for sex, names in PEOPLE.items():
        lines = [f"{name} was a clever {job} who lived in Oslo. So\n" for name in names for job in JOBS]
        (root / f"{sex}.txt").write_text("".join(lines) + "\n")
    files = ["--positive", str(root / "female.txt"), "--negative", str(root / "male.txt")]
    assert extract([*files, "--model", "builtin/pythia-tiny", "--output", str(root / "gender"), "--device", "cpu"]) == 0
    vector = steering.load_direction(root / "gender").vector
    torch.manual_seed(0)
    sae = StandardSAE(128, 8)
    with torch.no_grad():
        sae.W_dec[3] = vector
        sae.W_enc[:, 3] = vector
        sae.b_enc[3] = 0.0
    sae.metadata = {
        "model_name": "builtin/pythia-tiny",
        "hook_name": HOOK,
        "processing": "raw",
        "prepend_bos": True,
        "keep_bos": False,
    }
    run = root / "runs" / "mine"
    run.mkdir(parents=True)
    save_checkpoint(sae, run / "checkpoint.pt")
    sae.save_model(run / "sae")
    (run / "config.json").write_text(json.dumps({"hook_name": HOOK, "model_name": "builtin/pythia-tiny"}))
    return root


def test_extract_says_and_writes_what_it_found(folder: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ["--positive", str(folder / "female.txt"), "--negative", str(folder / "male.txt")]
    words = ["--model", "builtin/pythia-tiny", "--description", "she against he", "--source-paper", "none"]
    assert extract([*files, *words, "--method", "probe", "--token", "mean", "--license", "mit"]) == 0
    said = capsys.readouterr().out
    assert "direction: steering/female-male/direction.safetensors\n" in said
    assert re.search(r"extraction_quality: \d+\.\d+  \(25 female, 25 male prompts\)", said)
    assert re.search(r"heldout_accuracy: [01]\.\d+", said) and "width: 128" in said
    info = json.loads(Path("steering/female-male/direction.safetensors.json").read_text())
    assert info["female_prompt_count"] == info["male_prompt_count"] == 25
    assert (info["source"], info["token"], info["license"]) == ("probe", "mean", "mit")
    assert (info["description"], info["source_paper"], info["hook_site"]) == ("she against he", "none", HOOK)
    assert str(tmp_path) not in json.dumps(info) and str(folder) not in json.dumps(info)
    assert extract([*files, *words]) == 2  # it exists
    assert "exists: give another --output or --name" in capsys.readouterr().err
    assert extract([*files, *words, "--overwrite"]) == 0
    assert json.loads(Path("steering/female-male/direction.safetensors.json").read_text())["source"] != "probe"


def test_extract_takes_a_latent_and_scores_it(folder: Path, capsys):
    run = ["--run-dir", str(folder / "runs/mine"), "--latent", "3"]
    files = ["--positive", str(folder / "female.txt"), "--negative", str(folder / "male.txt")]
    assert extract([*run, *files, "--overwrite"]) == 0
    path = folder / "runs/mine/steering/latent-3/direction.safetensors"
    assert f"direction: {path}" in capsys.readouterr().out
    gender = steering.load_direction(folder / "gender")
    torch.testing.assert_close(load_file(path)["direction"], gender.vector)
    info = steering.load_direction(path).info
    assert (info["source"], info["latent"], info["source_run_id"]) == ("latent", 3, "mine")
    assert info["extraction_quality"] == pytest.approx(gender.info["extraction_quality"], rel=1e-4)
    assert info["female_prompt_count"] == 25
    assert extract([*run, "--name", "unscored"]) == 0
    assert "extraction_quality" not in capsys.readouterr().out
    assert steering.load_direction(folder / "runs/mine/steering/unscored").info["extraction_quality"] is None


def test_steer_shows_baseline_beside_steered_text(folder: Path, tmp_path: Path, capsys):
    out = tmp_path / "texts.json"
    flags = ["--direction", str(folder / "gender"), "--max-new-tokens", "6"]
    prompts = ["Peter was a clever nurse who lived in Rome. So", "Ella was a clever cook who lived in Bern. So"]
    assert steer([*flags, "--prompts", *prompts, "--coefficients", "0.5", "-0.5", "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "prompt: Peter was" in said and "baseline" in said and "add -0.5" in said
    found = json.loads(out.read_text())
    texts = {(one["prompt"], one["setting"]): one["text"].split()[0] for one in found["results"]}
    assert texts == {
        (prompts[0], "baseline"): "he",
        (prompts[0], "add 0.5"): "she",
        (prompts[0], "add -0.5"): "he",
        (prompts[1], "baseline"): "she",
        (prompts[1], "add 0.5"): "she",
        (prompts[1], "add -0.5"): "he",
    }
    norm = steering.load_direction(folder / "gender").info["mean_activation_norm"]
    assert found["unit"] == norm and found["hook_site"] == HOOK and found["direction"] == "female-male"
    # the same in raw units, from a file, with the folder's file named
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts))
    raw = ["--unit", "raw", "--coefficients", repr(0.5 * norm), "--prompts-path", str(tmp_path / "prompts.txt")]
    direction = ["--direction", str(folder / "gender/direction.safetensors"), "--max-new-tokens", "6"]
    assert steer([*direction, *raw, "--output", str(out), "--overwrite"]) == 0
    again = [one for one in json.loads(out.read_text())["results"] if one["setting"] != "baseline"]
    before = [one for one in found["results"] if one["setting"] == "add 0.5"]
    assert [one["text"] for one in again] == [one["text"] for one in before]
    assert [one["next_kl"] for one in again] == pytest.approx([one["next_kl"] for one in before], rel=1e-4)


def test_steer_with_a_latent_equals_its_direction(folder: Path, tmp_path: Path, capsys):
    """Adding the decoder row is adding the direction; clamping and removing act on the latent's own activation."""
    prompt = ["--prompts", "Peter was a clever nurse who lived in Rome. So", "--max-new-tokens", "6"]
    norm = steering.load_direction(folder / "gender").info["mean_activation_norm"]

    def texts(*flags: str) -> list[str]:
        assert steer([*flags, *prompt, "--output", str(tmp_path / "out.json"), "--overwrite"]) == 0
        return [one["text"] for one in json.loads((tmp_path / "out.json").read_text())["results"]]

    latent = ["--run-dir", str(folder / "runs/mine"), "--latent", "3"]
    raw = ["--unit", "raw", "--coefficients", repr(0.5 * norm)]
    assert texts(*latent, *raw) == texts("--direction", str(folder / "gender"), *raw)
    clamped = texts(*latent, *raw, "--mode", "clamp")
    assert clamped[1].startswith(" she")
    removed = texts(*latent, "--mode", "ablate")  # silent on men: nothing to remove
    assert removed[0] == removed[1]
    capsys.readouterr()
    texts(*latent, "--coefficient", "0.5")
    assert "coefficients count in the prompts' mean norm" in capsys.readouterr().err


def test_a_direction_without_sidecar_needs_its_place(folder: Path, tmp_path: Path, capsys):
    bare = tmp_path / "bare.safetensors"
    save_file({"direction": steering.load_direction(folder / "gender").vector}, bare)
    flags = ["--direction", str(bare), "--prompts", "Anna", "--max-new-tokens", "2"]
    for more, flag in [([], "--model"), (["--model", "builtin/pythia-tiny"], "--hook")]:
        assert steer([*flags, *more]) == 2
        assert f"no sidecar that says where it belongs: give {flag}" in capsys.readouterr().err
    assert steer([*flags, "--model", "builtin/pythia-tiny", "--hook", HOOK]) == 0


EXTRACT_MISTAKES = [
    ([], "nothing to extract from: give --positive and --negative, or --run-dir and --latent"),
    (["--positive", "F"], "--positive and --negative belong together"),
    (["--positive", "nowhere.txt", "--negative", "F"], "text file not found: nowhere.txt"),
    (["--positive", "EMPTY", "--negative", "F"], "empty.txt is empty"),
    (["--positive", "F", "--negative", "F", "--model", "builtin/pythia-tiny"], "both classes are called 'female'"),
    (["--positive", "F", "--negative", "COPY", "--model", "builtin/pythia-tiny"], "25 prompts are in both sets"),
    (["--positive", "F", "--negative", "M", "--model", "builtin/pythia-tiny", "--hook", "blocks.7.hook_resid_post"],
     "has 6 layers, so the last block is blocks.5"),
    (["--positive", "F", "--negative", "M", "--name", "../x"], "--name '../x' must be one plain word"),
    (["--latent", "3"], "--latent 3 of which SAE? Give --run-dir or --checkpoint"),
    (["--run-dir", "RUN", "--latent", "8"], "latent 8 does not exist: the SAE has 8, numbered 0 to 7"),
    (["--run-dir", "RUN", "--latent", "-1"], "latent -1 does not exist"),
    (["--run-dir", "TRAINING", "--latent", "3"], "its training is not finished; go on with"),
    (["--run-dir", "RUN", "--latent", "2", "--processing", "centred"], "trained on raw activations"),
    (["--run-dir", "RUN", "--checkpoint", "RUN", "--latent", "3"], "give --run-dir or --checkpoint, not both"),
]  # fmt: skip
STEER_MISTAKES = [
    ([], "give --prompts, or --prompts-path with a file"),
    (["--prompts", "a"], "steer with what? Give --direction, or --run-dir and --latent"),
    (["--prompts", "a", "--direction", "D", "--latent", "1"], "(one of the two)"),
    (["--prompts", "a", "--direction", "nowhere"], "direction not found: nowhere/direction.safetensors"),
    (["--prompts", "a", "--direction", "BROKEN"], "cannot be read as safetensors"),
    (["--prompts", "a", "--direction", "NARROW"],
     "direction thin is 64 wide, but blocks.3.hook_resid_post of builtin/pythia-tiny is 128 wide"),
    (["--prompts", "a", "--direction", "D", "--hook", "blocks.3.hook_resid"],
     "has no hook 'blocks.3.hook_resid'; nearest: blocks.3.hook_resid_p"),
    (["--prompts", "a", "--direction", "D", "--mode", "clamp"], "--mode clamp needs --coefficients"),
    (["--prompts", "a", "--direction", "D", "--mode", "ablate", "--coefficients", "1"], "ablate has no coefficient"),
    (["--prompts", "a", "--direction", "D", "--mode", "remove"], "invalid choice"),
    (["--prompts", "a", "--direction", "D", "--max-new-tokens", "300"], "more than the 256 that"),
    (["--prompts", "a", "--direction", "D", "--temperature", "-1"], "--temperature must be 0 or a positive number"),
    (["--prompts", "a", "--direction", "D", "--coefficients", "nan"], "--coefficients should be numbers, found nan"),
    (["--prompts-path", "EMPTY", "--direction", "D"], "empty.txt is empty"),
    (["--prompts", "a", "--run-dir", "RUN", "--latent", "99"], "latent 99 does not exist: the SAE has 8"),
    (["--prompts", "a", "--direction", "D", "--output", "F"], "exists: give another --output, or --overwrite"),
]  # fmt: skip


@pytest.fixture(scope="module")
def places(folder: Path) -> dict[str, str]:
    """The words of the tables above, as paths."""
    (folder / "empty.txt").write_text("\n\n")
    (folder / "copy.txt").write_text((folder / "female.txt").read_text())
    (folder / "broken").mkdir()
    (folder / "broken/direction.safetensors").write_bytes(b"not a tensor")
    info = {"name": "thin", "model": "builtin/pythia-tiny", "hook_site": HOOK}
    steering.save_direction(steering.make_direction(torch.ones(64), **info), folder / "narrow")
    training = folder / "runs/training"
    training.mkdir()
    (training / "config.json").write_text("{}")
    names = {"F": "female.txt", "M": "male.txt", "EMPTY": "empty.txt", "COPY": "copy.txt", "D": "gender"}
    names |= {"BROKEN": "broken", "NARROW": "narrow", "RUN": "runs/mine", "TRAINING": "runs/training"}
    return {word: str(folder / path) for word, path in names.items()}


@pytest.mark.parametrize(("flags", "message"), EXTRACT_MISTAKES)
def test_extract_names_a_mistake_in_one_line(flags, message: str, places, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert extract([places.get(word, word) for word in flags]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not list(tmp_path.rglob("*")), "something was written"


@pytest.mark.parametrize(("flags", "message"), STEER_MISTAKES)
def test_steer_names_a_mistake_in_one_line(flags, message: str, places, capsys):
    assert steer([places.get(word, word) for word in flags]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_wrong_width_of_the_sae_names_both(folder: Path, tiny_neox_dir: Path, capsys):
    run = ["--run-dir", str(folder / "runs/mine"), "--latent", "3"]
    assert steer([*run, "--prompts", "a", "--model", str(tiny_neox_dir)]) == 2
    assert "the SAE has d_in 128, but blocks.3.hook_resid_post of" in capsys.readouterr().err
    assert load_model(str(tiny_neox_dir)).d_model == 32
