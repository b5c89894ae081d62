"""Several hooks in one pass: the stores of separate collections, whatever interrupts it."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from collecting import SCRIPT, collect_quietly, flags, one_thread, snapshot, texts_fixture  # noqa: F401  (fixtures)
from conftest import HOOK
from test_collect_resume import Stop, environment, start

from mechint.cli.collect import main
from mechint.config import CollectConfig
from mechint.data import open_activations
from mechint.data.collect import collect_command
from mechint.data.store_write import only_writer
from mechint.errors import MechintError
from mechint.models import load_model

HOOKS = ["blocks.0.hook_resid_pre", "blocks.3.hook_resid_post", "blocks.1.hook_resid_post"]


def at(hooks: list[str], model: Path, texts: Path, output: Path, *more: object) -> list[str]:
    words = flags(model, texts, output, *more)
    where = words.index("--hook")
    return [*words[:where], "--hook", *hooks, *words[where + 2 :]]


def same_files(one: Path, other: Path) -> None:
    """Byte for byte, but for the commit, which has changes while one works on the code."""
    first, second = snapshot(one), snapshot(other)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name] and not name.endswith("store.json")] == []
    for name in first:
        if name.endswith("store.json"):
            infos = [json.loads((folder / name).read_text()) | {"git_commit": 0} for folder in (one, other)]
            assert infos[0] == infos[1]


@pytest.fixture(scope="module")
def separate(tiny_neox_dir: Path, texts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each hook collected alone, as the stores of one folder."""
    folder = tmp_path_factory.mktemp("separate") / "acts"
    for hook in HOOKS:
        collect_quietly(*at([hook], tiny_neox_dir, texts_file, folder / hook))
    return folder


@pytest.mark.parametrize("more", [["--batch-size", 4], ["--dtype", "bfloat16", "--keep-bos"]])
def test_one_pass_gives_what_separate_ones_give(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, more: list):
    for hook in HOOKS:
        collect_quietly(*at([hook], tiny_neox_dir, texts_file, tmp_path / "separate" / hook, *more))
    collect_quietly(*at(HOOKS, tiny_neox_dir, texts_file, tmp_path / "acts", *more))
    same_files(tmp_path / "acts", tmp_path / "separate")
    stores = [open_activations(tmp_path / "acts" / hook) for hook in HOOKS]
    for store in stores:
        store.verify()
        for name in ("tokens", "text_ids", "positions"):
            assert torch.equal(getattr(store, name), getattr(stores[0], name))
    assert not torch.equal(stores[0].tensor(), stores[1].tensor())


def test_the_model_runs_once_and_no_further_than_it_must(tiny_neox_dir: Path, monkeypatch: pytest.MonkeyPatch):
    model = load_model(str(tiny_neox_dir), device="cpu", hook_name=HOOK)
    passed: list[int] = []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: passed.append(number))
    tokens = torch.arange(12).view(2, 6)
    found = model.activations_at(tokens, HOOKS)
    assert passed == [0, 1, 2, 3] and list(found) == HOOKS
    for hook in HOOKS:
        assert torch.equal(found[hook], model.activations(tokens, hook))


@pytest.mark.parametrize("processing", ["raw", "centred"])
def test_the_bridge_reads_several_hooks_in_one_pass(tiny_neox_dir: Path, processing: str):
    hooks = ["blocks.2.mlp.hook_post", "blocks.1.attn.hook_z", "blocks.3.hook_resid_post", "hook_embed"]
    model = load_model(str(tiny_neox_dir), device="cpu", hook_name=hooks[0], processing=processing)
    passes = []
    model.bridge.original_model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    tokens = torch.arange(12).view(2, 6)
    found = model.activations_at(tokens, hooks)
    assert list(found) == hooks and [value.shape[-1] for value in found.values()] == [64, 32, 32, 32]
    for hook in hooks:
        assert torch.equal(found[hook], model.activations(tokens, hook))


def test_hooks_of_both_backends_in_one_pass(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, separate: Path):
    hooks = ["blocks.2.mlp.hook_post", HOOK]
    collect_quietly(*at(hooks, tiny_neox_dir, texts_file, tmp_path / "acts"))
    wide, residual = (open_activations(tmp_path / "acts" / hook) for hook in hooks)
    assert (wide.d_in, residual.d_in) == (64, 32) and wide.info["backend"] == residual.info["backend"] == "bridge"
    assert torch.equal(wide.tokens, residual.tokens)
    torch.testing.assert_close(residual.tensor(), open_activations(separate / HOOK).tensor(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("more", "hooks"),
    [
        (["--layers", "0-2"], [f"blocks.{i}.hook_resid_post" for i in (0, 1, 2)]),
        (["--layers", "0, 2,4-5"], [f"blocks.{i}.hook_resid_post" for i in (0, 2, 4, 5)]),
        (["--layers", "4"], ["blocks.4.hook_resid_post"]),
        (["--layer", 2], ["blocks.2.hook_resid_post"]),
        ([], ["blocks.3.hook_resid_post"]),
        (["--hook", "blocks.1.hook_resid_pre", "hook_embed"], ["blocks.1.hook_resid_pre", "hook_embed"]),
    ],
)
def test_layers_and_hooks_on_the_command_line(tmp_path: Path, more: list, hooks: list[str]):
    import shlex

    from mechint.cli.flags import parse

    words = [str(word) for word in ["--output", tmp_path / "acts", *more]]
    config = parse(CollectConfig, words, prog="x")
    assert list(config.hooks) == hooks
    again = parse(CollectConfig, shlex.split(collect_command(config))[2:], prog="x")
    assert again.hooks == config.hooks
    assert CollectConfig.from_dict(json.loads(json.dumps(config.to_dict()))).hooks == config.hooks
    assert config.with_overrides(device="cpu").hooks == config.hooks


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--hook", HOOK, "blocks.9.hook_resid_post"], "has 6 layers"),
        (["--hook", HOOK, "blocks.2.hook_resid_pots"], "has no hook 'blocks.2.hook_resid_pots'"),
        (["--hook", HOOK, HOOK], "asked for twice"),
        (["--layers", "0-9"], "has 6 layers"),
        (["--layers", "3-1"], "expected numbers and ranges such as 0-5"),
        (["--layers", "all"], "expected numbers and ranges such as 0-5"),
        (["--layers", "0-2", "--layer", "1"], "--layers 0-2 and --layer"),
        (["--layers", "0-2", "--hook", HOOK], "--layers 0-2 and --hook"),
        (["--layer", "2", "--hook", "blocks.2.hook_resid_pre", HOOK], "--layer 2 contradicts --hook blocks.3"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, more: list, message: str, capsys
):
    words = flags(tiny_neox_dir, texts_file, tmp_path / "new" / "acts")
    where = words.index("--hook")
    assert main([*words[:where], *words[where + 2 :], *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_pt_holds_one_hook(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, capsys):
    assert main(at(HOOKS, tiny_neox_dir, texts_file, tmp_path / "a.pt")) == 2
    assert f"as in --output {tmp_path / 'a'}" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_folder_itself_is_no_store_and_says_what_is(separate: Path):
    with pytest.raises(MechintError, match="holds one store for each hook: give one of .*blocks.0.hook_resid_pre"):
        open_activations(separate)


def test_hooks_can_be_added_later(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, separate: Path, capsys):
    output = tmp_path / "acts"
    collect_quietly(*at(HOOKS[:2], tiny_neox_dir, texts_file, output))
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    collect_quietly(*at(HOOKS, tiny_neox_dir, texts_file, output))
    assert {path: path.stat().st_mtime_ns for path in times} == times
    same_files(output, separate)
    capsys.readouterr()
    collect_quietly(*at(HOOKS, tiny_neox_dir, texts_file, output))
    printed = capsys.readouterr().out
    assert "already collected" in printed and printed.count("activation_path: ") == 3
    # with other settings, at any hook: refused, and nothing touched
    for hooks in (HOOKS, ["blocks.4.hook_resid_post", "blocks.5.hook_resid_post"]):
        assert main(at(hooks, tiny_neox_dir, texts_file, output, "--num-texts", 49)) == 2
        assert "num_texts: 50 -> 49" in capsys.readouterr().err
    same_files(output, separate)


def test_stores_of_other_texts_do_not_share_a_folder(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, capsys):
    texts, output = tmp_path / "t.txt", tmp_path / "acts"
    texts.write_text(texts_file.read_text())
    collect_quietly(*at(HOOKS[:2], tiny_neox_dir, texts, output))
    texts.write_text("a cat\n" + texts_file.read_text())
    assert main(at(HOOKS, tiny_neox_dir, texts, output)) == 2
    assert "differ in texts_sha256" in capsys.readouterr().err


def test_two_collections_into_one_place_are_refused(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, capsys):
    output = tmp_path / "acts"
    with only_writer(output):  # whatever hooks the other one collects
        assert main(at(HOOKS, tiny_neox_dir, texts_file, output)) == 2
        assert "another process is collecting" in capsys.readouterr().err
    with only_writer(output / HOOKS[1]):  # that hook alone
        assert main(at(HOOKS, tiny_neox_dir, texts_file, output)) == 2
        assert "another process is collecting" in capsys.readouterr().err
    collect_quietly(*at(HOOKS, tiny_neox_dir, texts_file, output))
    # one hook's store where several are, and the other way round
    assert main(at(HOOKS[:1], tiny_neox_dir, texts_file, output)) == 2
    assert "holds other files" in capsys.readouterr().err
    collect_quietly(*at(HOOKS[:1], tiny_neox_dir, texts_file, tmp_path / "single"))
    assert main(at(HOOKS, tiny_neox_dir, texts_file, tmp_path / "single")) == 2
    assert "is the store of one hook" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert main(at(HOOKS, tiny_neox_dir, texts_file, tmp_path / "mine")) == 2
    assert "holds other files (thesis.tex)" in capsys.readouterr().err


@pytest.mark.parametrize("uneven", [False, True])
def test_a_stopped_collection_goes_on(
    tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, separate: Path, monkeypatch, uneven: bool
):
    """`uneven`: stopped between the hooks of a shard."""
    from mechint.data import store_write

    real, output = store_write.write_shard, tmp_path / "acts"

    def write_shard(folder: Path, number: int, **kwargs):
        if number >= (4 if uneven and folder.name == HOOKS[1] else 3):
            raise Stop
        return real(folder, number, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(store_write, "write_shard", write_shard)
        with pytest.raises(Stop):
            main(at(HOOKS, tiny_neox_dir, texts_file, output))
    times = {path: path.stat().st_mtime_ns for path in output.rglob("shard-*") if path.is_file()}
    assert len(times) == 9 + uneven
    with pytest.raises(MechintError, match="is not finished; go on with: .*--hook blocks.0.hook_resid_pre blocks.3"):
        open_activations(output / HOOKS[0])
    collect_quietly(*at(HOOKS, tiny_neox_dir, texts_file, output))
    assert {path: path.stat().st_mtime_ns for path in times} == times
    same_files(output, separate)


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_no_byte(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path):
    words = ["--checkpoint-every", 2]
    for hook in HOOKS:
        assert start(at([hook], tiny_neox_dir, texts_file, tmp_path / "whole" / hook, *words)).wait() == 0
    output = tmp_path / "killed"
    rng = random.Random(1)
    kills = 0
    while True:
        process = start(at(HOOKS, tiny_neox_dir, texts_file, output, *words))
        before = len(list(output.glob("*/progress/0*.json")))
        aim = before + rng.randint(1, 14)
        while process.poll() is None and kills < 6:
            if len(list(output.glob("*/progress/0*.json"))) >= aim:
                time.sleep(rng.random() * 0.01)
                process.kill()
                break
            time.sleep(0.002)
        if process.wait(60) == 0:
            break
        assert process.returncode == -9, process.communicate()
        kills += 1
    assert kills >= 3
    same_files(output, tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_make_the_files_of_one(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path):
    assert start(at(HOOKS, tiny_neox_dir, texts_file, tmp_path / "one")).wait(120) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    words = at(HOOKS, tiny_neox_dir, texts_file, tmp_path / "two")
    done = subprocess.run([*command, *words], env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("activation_path: ") == 3
    same_files(tmp_path / "one", tmp_path / "two")
