"""The commands from outside: help that is quick and true to the README, errors of one line, precedence of settings."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mechint.cli import COMMANDS, main
from mechint.cli.flags import command, flag_given, parse
from mechint.cli.reference import PAGE, README, command_help, reference, with_list
from mechint.config import CollectConfig, Config, SAETrainConfig, preset_values
from mechint.errors import MechintError, nearest, one_line

ROOT = Path(__file__).resolve().parent.parent
NAMED_IN = (".", "mechint", "mechint/sae", "mechint/kernels")  # places that the map's names are counted from


def test_the_command_reference_is_todays_help():
    text = (ROOT / README).read_text(encoding="utf-8")
    assert with_list(text) == text, "run `make readme`"
    assert reference() == (ROOT / PAGE).read_text(encoding="utf-8"), "run `make readme`"


def test_the_map_names_every_folder():
    """docs/architecture.md knows the package's folders; files say themselves what they are for."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = {path.parent.name for path in (ROOT / "mechint").glob("*/__init__.py")}
    assert not [name for name in sorted(folders) if f"`{name}/`" not in page]
    named = {name for name in re.findall(r"`([a-z_/]+/)`", page.split("## Around the package")[0])}
    assert not [name for name in sorted(named) if not any((ROOT / place / name).is_dir() for place in NAMED_IN)]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_flag_without_torch(name: str):
    text = command_help(name)
    assert text.startswith("usage: ")
    code = f"import sys\ntry:\n    from {COMMANDS[name][0]} import main; main(['--help'])\nexcept SystemExit: pass\n"
    code += "print('HEAVY', sorted({'torch', 'transformers', 'datasets', 'pandas', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    for line in text.splitlines():
        if line.strip().startswith("│ --"):
            assert line.strip(" │")


def test_every_script_is_its_command():
    for module, _, script in COMMANDS.values():
        if script:
            text = (ROOT / "scripts" / script).read_text()
            assert f"from {module} import main" in text
            assert len(text.splitlines()) <= 10


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'trian'; nearest: train, rank\n"
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def test_flags_win_over_preset_over_file_over_defaults(tmp_path: Path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"epochs": 7, "lr": 0.5, "split_by": "text", "seed": 3}))
    argv = ["--config", str(path), "--preset", "mech-int", "--seed=9", "--lam", "2"]
    config = parse(SAETrainConfig, argv, prog="t", presets=preset_values, config_file=True)
    assert (config.epochs, config.learning_rate) == (7, 0.5)  # file over default
    assert (config.split_by, config.batch_order) == ("row", "torch")  # preset over file
    assert (config.seed, config.l1_lambda) == (9, 2.0)  # flag over all
    assert config.batch_size == SAETrainConfig().batch_size


def test_a_preset_knows_the_architecture(tmp_path: Path):
    """However the two are given: as flags, in a file, or one in each."""
    path = tmp_path / "c.json"

    def parsed(settings: dict, *argv: str) -> SAETrainConfig:
        path.write_text(json.dumps(settings))
        return parse(SAETrainConfig, ["--config", str(path), *argv], prog="t", presets=preset_values, config_file=True)

    for architecture in ("standard", "topk", "matryoshka_batchtopk", "jumprelu"):
        expected = SAETrainConfig.from_dict({"preset": "mechint", "architecture": architecture})
        both = ["--preset=mechint", "--architecture", architecture]
        assert parse(SAETrainConfig, both, prog="t", presets=preset_values, config_file=True) == expected
        assert parsed({}, *both) == parsed({"preset": "mechint"}, *both[1:]) == expected
        assert parsed({"preset": "mechint", "architecture": architecture}) == expected
        assert parsed({"architecture": architecture}, both[0]) == expected
        assert parsed({"preset": "mechint", "architecture": "gated"}, *both[1:]) == expected
        own = preset_values("mechint", architecture)
        assert {name: getattr(expected, name) for name in own} == own
    assert preset_values("mechint", "topk") != preset_values("mechint", "standard") == preset_values("mechint", None)
    assert preset_values("mechint-topk", "topk") == preset_values("mechint-topk", "standard")
    with pytest.raises(MechintError, match="preset"):
        parse(SAETrainConfig, ["--preset", "mechnit"], prog="t", presets=preset_values)


def test_old_and_new_names_of_a_flag_are_one():
    old = ["--hook-name", "blocks.1.hook_resid_post", "--lam", "4", "--epochs", "11", "--activation-dim", "8"]
    new = ["--hook", "blocks.1.hook_resid_post", "--l1-coefficient", "4", "--steps", "11", "--d-in", "8"]
    assert parse(SAETrainConfig, old, prog="t") == parse(SAETrainConfig, new, prog="t")


def test_booleans_have_both_forms():
    assert parse(CollectConfig, ["--no-prepend-bos", "--keep-bos"], prog="t").prepend_bos is False
    assert parse(CollectConfig, ["--prepend-bos"], prog="t").prepend_bos is True


def test_flag_given():
    assert flag_given(["--d-in", "3"], "--d-in") and flag_given(["--d-in=3"], "--d-in")
    assert flag_given(["--activation_dim=3"], "--activation-dim")
    assert not flag_given(["--d-in-x", "3"], "--d-in")


def test_config_file_mistakes(tmp_path: Path):
    path = tmp_path / "c.json"
    for text, message in [("[1]", "JSON object"), ("{", "cannot be read"), ('{"epoch": 1}', "nearest: epochs")]:
        path.write_text(text)
        with pytest.raises(MechintError, match=message):
            parse(SAETrainConfig, ["--config", str(path)], prog="t", config_file=True)
    with pytest.raises(MechintError, match="config file not found"):
        parse(SAETrainConfig, ["--config", str(tmp_path / "none.json")], prog="t", config_file=True)


def test_a_command_turns_endings_into_statuses(capsys: pytest.CaptureFixture):
    def ends_with(error: BaseException | None) -> int:
        @command
        def run(argv):
            if error is not None:
                raise error

        return run([])

    assert ends_with(None) == 0
    assert ends_with(MechintError("two\nlines")) == 2
    assert capsys.readouterr().err == "error: two lines\n"
    assert ends_with(KeyboardInterrupt()) == 130
    with pytest.raises(ZeroDivisionError):  # our own mistakes keep their traceback
        ends_with(ZeroDivisionError())


def test_words_for_errors():
    assert nearest("trian", ["train", "eval"]) == "nearest: train"
    assert nearest("zzz", ["a", "b"]) == "valid: a, b"
    assert one_line("a\n  b", 10) == "a b" and len(one_line("x" * 50, 20)) == 20


def test_overrides_refuse_unknown_names():
    @dataclass(frozen=True)
    class Small(Config):
        size: int = 1
        name: str | None = None

    assert Small().with_overrides(size=3, name=None) == Small(3)
    with pytest.raises(MechintError, match="unknown key 'sise'; nearest: size"):
        Small().with_overrides(sise=3)


def test_the_home_folder_in_flags_and_in_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--dataset", "~/texts.txt", "--output=~/acts", "--model", "a~/b"]
    config = parse(CollectConfig, words, prog="x")
    assert (config.dataset, config.output, config.model) == (f"{tmp_path}/texts.txt", tmp_path / "acts", "a~/b")
    assert CollectConfig.from_dict({"output": "~/acts"}).output == tmp_path / "acts"
