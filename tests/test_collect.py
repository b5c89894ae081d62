"""Collection: the right rows, whatever happens on the way."""

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HOOK
from hypothesis import given
from hypothesis import strategies as st
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from mechint.cli.collect import main
from mechint.config import CollectConfig
from mechint.data import collect_activations, open_activations
from mechint.data.collect import collect_command
from mechint.data.norms import OUTLIER_MULTIPLE, add_histograms, norm_histograms, report_norms, summarise_norms
from mechint.errors import MechintError

REPO = Path(__file__).resolve().parent.parent
SCRIPT = REPO / "scripts" / "collect_activations.py"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The model is tiny; more threads only wait for one another, and worse when other tests run beside this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["the", "cat", "sat", "on", "mat", "and", "dog", "ran", "far", "away", "from", "home", "again"]
    rng = random.Random(0)
    lines = [" ".join(rng.choices(words, k=rng.choice([1, 2, 5, 9, 17, 30]))) for _ in range(60)]
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def flags(model: Path, texts: Path, output: Path, *more: object) -> list[str]:
    base = ["--model", model, "--hook", HOOK, "--dataset", texts, "--output", output]
    base += ["--num-texts", 50, "--checkpoint-every", 8, "--batch-size", 4, "--device", "cpu"]
    return [str(word) for word in (*base, *more)]


def snapshot(folder: Path) -> dict[str, str]:
    """Hash of every file under a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def collect_quietly(*words: object) -> Path:
    argv = [str(word) for word in words]
    assert main(argv) == 0
    return Path(argv[argv.index("--output") + 1])


def reference_rows(model_dir: Path, texts: list[str], *, bos: bool, skip: int, limit: int = 128) -> list[torch.Tensor]:
    """Hugging Face's own hidden states, a text at a time, without padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = []
    for text in texts:
        ids = ([0] if bos else []) + tokenizer(text).input_ids
        with torch.no_grad():
            states = model(torch.tensor([ids[:limit]]), output_hidden_states=True).hidden_states
        rows.append(states[4][0, skip:])
    return rows


@pytest.mark.parametrize(
    ("more", "bos", "skip", "limit", "centred"),
    [
        ([], True, 1, 128, False),
        (["--keep-bos"], True, 0, 128, False),
        (["--no-prepend-bos"], False, 0, 128, False),
        (["--preset", "mech-int"], True, 0, 128, True),
        (["--context-size", 6, "--processing", "centred"], True, 1, 6, True),
    ],
)
def test_rows_are_the_models_own(
    tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, more: list, bos: bool, skip: int, limit: int, centred: bool
):
    output = collect_quietly(*flags(tiny_neox_dir, texts_file, tmp_path / "store", *more))
    texts = texts_file.read_text().splitlines()[:50]
    expected = reference_rows(tiny_neox_dir, texts, bos=bos, skip=skip, limit=limit)
    activations = open_activations(output)
    whole = torch.cat(expected)
    if centred:
        whole = whole - whole.mean(-1, keepdim=True)
    assert activations.n_rows == len(whole)
    torch.testing.assert_close(activations.tensor(), whole, atol=1e-4, rtol=1e-4)
    counts = torch.tensor([len(rows) for rows in expected])
    assert torch.equal(activations.text_ids, torch.arange(50).repeat_interleave(counts))
    assert activations.positions.tolist() == [skip + i for count in counts.tolist() for i in range(count)]
    info = activations.info
    assert (info["prepend_bos"], info["keep_bos"]) == (bos, bos and skip == 0)
    assert info["processing"] == ("centred" if centred else "raw") and info["context_size"] == limit
    assert info["n_texts"] == 50 and len(info["shards"]) == 7 and info["bos_token_id"] == (0 if bos else None)
    activations.verify()


def test_fast_products_are_the_same_products(tiny_neox_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """Within FastLinear each linear layer of the model goes through mechint.models.matmul, to float32 rounding."""
    from mechint.models import load_model, matmul

    model = load_model(str(tiny_neox_dir), device="cpu", hook_name=HOOK)
    tokens = torch.randint(0, 200, (4, 20), generator=torch.Generator().manual_seed(0))
    plain = model.activations(tokens, HOOK)
    real, shapes = matmul.linear, []
    monkeypatch.setattr(matmul, "linear", lambda x, w, b=None: shapes.append(x.shape) or real(x, w, b))
    with matmul.FastLinear():
        fast = model.activations(tokens, HOOK)
    assert len(shapes) == 4 * 4 and set(shapes) == {(80, 32), (80, 64)}
    torch.testing.assert_close(fast, plain, atol=2e-5, rtol=2e-5)
    low = load_model(str(tiny_neox_dir), device="cpu", dtype="bfloat16", hook_name=HOOK)
    plain = low.activations(tokens, HOOK)
    with matmul.FastLinear():
        assert torch.equal(low.activations(tokens, HOOK), plain)


@pytest.mark.parametrize(("hook", "width"), [("blocks.2.mlp.hook_post", 64), ("blocks.2.attn.hook_z", 32)])
def test_hooks_of_other_widths(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, hook: str, width: int):
    from mechint.models import load_model

    activations = open_activations(
        collect_quietly(*flags(tiny_neox_dir, texts_file, tmp_path / "store", "--hook", hook))
    )
    assert activations.d_in == width and activations.info["backend"] == "bridge" and activations.info["layer"] == 2
    model = load_model(str(tiny_neox_dir), device="cpu", hook_name=hook)
    (ids,) = model.tokenize([texts_file.read_text().splitlines()[7]], prepend_bos=True)
    expected = model.activations(torch.tensor([ids]), hook)[0, 1:].reshape(len(ids) - 1, width)
    torch.testing.assert_close(activations.rows(torch.nonzero(activations.text_ids == 7).flatten()), expected,
                               atol=1e-4, rtol=1e-4)  # fmt: skip


def test_tokens_give_the_text_back(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    activations = open_activations(collect_quietly(*flags(tiny_neox_dir, texts_file, tmp_path / "store")))
    tokenizer = AutoTokenizer.from_pretrained(tiny_neox_dir)
    for number, text in enumerate(texts_file.read_text().splitlines()[:50]):
        assert tokenizer.decode(activations.tokens[activations.text_ids == number].tolist()) == text


def test_pt_holds_the_same_rows_and_a_truthful_sidecar(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, capsys):
    store = open_activations(collect_quietly(*flags(tiny_neox_dir, texts_file, tmp_path / "store")))
    capsys.readouterr()
    output = collect_quietly(*flags(tiny_neox_dir, texts_file, tmp_path / "sub" / "a.pt", "--layer", 3))
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == [f"activation_path: {output}", f"metadata_path: {output.with_suffix('.json')}"]
    assert torch.equal(torch.load(output, mmap=True, weights_only=True), store.tensor())
    activations = open_activations(output)
    for name in ("tokens", "text_ids", "positions"):
        assert torch.equal(getattr(activations, name), getattr(store, name))
    for name in ("texts_sha256", "model_sha256", "norms", "n_rows", "n_texts", "hook_name", "processing"):
        assert activations.info[name] == store.info[name]
    activations.verify()
    sidecar = json.loads(output.with_suffix(".json").read_text())
    assert set(sidecar) == {"activation_dim", "activation_path", "config", "git_commit", "num_vectors", "store"}
    assert (sidecar["activation_dim"], sidecar["num_vectors"]) == (32, store.n_rows)
    config = sidecar["config"]
    assert len(config) == 25 and config["activation_dim"] == 32 and config["layer"] == 3 and config["num_texts"] == 50
    assert config["hook_name"] == HOOK and config["model_source"] == str(tiny_neox_dir)
    assert sorted(path.name for path in output.parent.iterdir()) == ["a.json", "a.pt", "a.tokens.safetensors"]


def test_lower_precision_is_stored_as_computed(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path):
    exact = open_activations(collect_quietly(*flags(tiny_neox_dir, texts_file, tmp_path / "exact"))).tensor()
    output = collect_quietly(*flags(tiny_neox_dir, texts_file, tmp_path / "low", "--dtype", "bfloat16"))
    low = open_activations(output)
    assert low.info["dtype"] == "bfloat16" and low.nbytes == low.n_rows * 32 * 2
    assert load_file(output / "shard-00000.safetensors")["activations"].dtype == torch.bfloat16
    error = (low.tensor() - exact).norm(dim=1) / exact.norm(dim=1)
    assert 1e-4 < float(error.mean()) < 0.05
    single = collect_quietly(*flags(tiny_neox_dir, texts_file, tmp_path / "low.pt", "--dtype", "bfloat16"))
    assert torch.equal(torch.load(single, weights_only=True), low.tensor())


def test_a_source_that_ends_early(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, capsys):
    for number in (60, 64, 1000):  # the end of the file inside a shard, with a shard, and far before
        output = collect_quietly(*flags(tiny_neox_dir, texts_file, tmp_path / f"{number}", "--num-texts", number))
        activations = open_activations(output)
        assert activations.info["n_texts"] == 60 and int(activations.text_ids.max()) == 59
        assert ("the source ended after 60" in capsys.readouterr().out) == (number > 60)
    exact = collect_quietly(*flags(tiny_neox_dir, texts_file, tmp_path / "exact", "--checkpoint-every", 10,
                                   "--num-texts", 90))  # fmt: skip
    assert len(open_activations(exact).info["shards"]) == 6


# --- done already, or something else there --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["store", "a.pt"])
def test_a_finished_collection_is_left_alone(
    tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, name: str, capsys, monkeypatch
):
    output = tmp_path / "out" / name
    collect_quietly(*flags(tiny_neox_dir, texts_file, output))
    before = snapshot(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr("mechint.data.collect.load_model", None)  # not even loaded
    collect_quietly(*flags(tiny_neox_dir, texts_file, output))
    assert "already collected" in capsys.readouterr().out
    for more in (["--num-texts", 49], ["--keep-bos"], ["--dtype", "bfloat16"], ["--max-chars", 9]):
        assert main(flags(tiny_neox_dir, texts_file, output, *more)) == 2
        error = capsys.readouterr().err
        assert more[0].strip("-").replace("-", "_") in error and "other settings" in error and error.count("\n") == 1
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", ["folder", "file", "bare pt", "other json"])
def test_other_peoples_files_are_not_touched(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, kind: str, capsys):
    output = tmp_path / "there"
    match kind:
        case "folder":
            output.mkdir()
            (output / "thesis.tex").write_text("x")
        case "file":
            output.write_text("x")
        case "bare pt":
            output = tmp_path / "a.pt"
            torch.save(torch.zeros(2, 2), output)
        case "other json":
            output = tmp_path / "a.pt"
            (tmp_path / "a.json").write_text('{"thesis": 1}')
    before = snapshot(tmp_path)
    assert main(flags(tiny_neox_dir, texts_file, output)) == 2
    assert "--output" in capsys.readouterr().err and snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layer", 2], "--layer 2 contradicts --hook blocks.3.hook_resid_post, which is in layer 3"),
        (["--hook", "hook_embed", "--layer", 2], "which is in no layer"),
        (["--hook", "blocks.9.hook_resid_post"], "has 6 layers"),
        (["--hook", "blocks.3.hook_resid_pots"], "has no hook 'blocks.3.hook_resid_pots'.*blocks.3.hook_resid_post"),
        (["--hook", "blocks.2.attn.hook_pattern"], "not one vector a token"),
        (["--model", "pythia-70n"], "unknown model 'pythia-70n'.*pythia-70m"),
        (["--model", "builtin/pythia-big"], "builtin/pythia-tiny"),
        (["--dataset", "builtin/tails"], "builtin/tales"),
        (["--dataset", "nowhere.txt"], "no such file"),
        (["--dataset", "openwebtext"], "the Hub cannot be reached.*builtin/tales"),  # conftest sets offline mode
        (["--split", "valid"], "no splits"),
        (["--num-texts", 0], "--num-texts must be at least 1"),
        (["--context-size", 1], "--context-size"),
        (["--device", "tpu9"], "device 'tpu9' cannot be used"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, more: list, message: str, capsys
):
    import re

    started = time.perf_counter()
    assert main(flags(tiny_neox_dir, texts_file, tmp_path / "new" / "store", *more)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_no_text_at_all_is_known_before_the_model_loads(
    tiny_neox_dir: Path, tmp_path: Path, content: str, capsys, monkeypatch
):
    (tmp_path / "texts.txt").write_text(content)
    monkeypatch.setattr("mechint.data.collect.load_model", None)
    assert main(flags(tiny_neox_dir, tmp_path / "texts.txt", tmp_path / "store")) == 2
    assert "has no text" in capsys.readouterr().err and not (tmp_path / "store").exists()


def test_a_second_collector_is_turned_away(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, capsys):
    from mechint.data.store_write import only_writer

    with only_writer(tmp_path / "store"):
        assert main(flags(tiny_neox_dir, texts_file, tmp_path / "store")) == 2
        assert "another process is collecting" in capsys.readouterr().err
    assert main(flags(tiny_neox_dir, texts_file, tmp_path / "store")) == 0


# --- stopped on the way ---------------------------------------------------------------------------------------------


class Stop(BaseException):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, n_shards: int, error: BaseException) -> None:
    from mechint.data import store_write

    real, made = store_write.write_shard, []

    def write_shard(*args, **kwargs):
        if len(made) == n_shards:
            raise error
        made.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(store_write, "write_shard", write_shard)


@pytest.mark.parametrize("name", ["store", "a.pt"])
def test_a_stopped_collection_goes_on_without_redoing_anything(
    tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, name: str, capsys, monkeypatch
):
    whole = tmp_path / "whole" / name
    collect_quietly(*flags(tiny_neox_dir, texts_file, whole))
    output = tmp_path / "stopped" / name
    with monkeypatch.context() as patch:
        stop_after(patch, 3, Stop())
        with pytest.raises(Stop):
            main(flags(tiny_neox_dir, texts_file, output))
    with pytest.raises(MechintError, match="is not finished; go on with: python scripts/collect_activations.py"):
        open_activations(output)
    folder = output if name == "store" else output.with_name("a.pt.shards")
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    assert len(times) == 3
    (folder / ".shard-00003.safetensors.abc.tmp").write_text("half a shard")
    (folder / "shard-00003.safetensors").write_text("a shard that was never recorded")

    # other settings: an error that names them, and nothing touched
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert main(flags(tiny_neox_dir, texts_file, output, "--batch-size", 5)) == 2
    assert "batch_size: 4 -> 5" in capsys.readouterr().err and snapshot(tmp_path) == before

    if name == "store":
        with monkeypatch.context() as patch:
            stop_after(patch, 0, Stop())
            with pytest.raises(Stop):
                main(flags(tiny_neox_dir, texts_file, output))
        assert {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")} == times
    collect_quietly(*flags(tiny_neox_dir, texts_file, output))
    if name == "store":
        assert {path: (output / path).stat().st_mtime_ns for path in times} == times
    ours, theirs = open_activations(output), open_activations(whole)
    assert ours.sha256 == theirs.sha256 and ours.info["texts_sha256"] == theirs.info["texts_sha256"]
    names = [path.name for path in output.parent.rglob("*") if path.is_file()]
    assert sorted(names) == sorted(path.name for path in whole.parent.rglob("*") if path.is_file())


def test_texts_or_weights_that_changed_meanwhile_are_refused(
    tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, capsys, monkeypatch
):
    import shutil

    texts, model = tmp_path / "t.txt", tmp_path / "model"
    shutil.copy(texts_file, texts)
    shutil.copytree(tiny_neox_dir, model)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, Stop())
        with pytest.raises(Stop):
            main(flags(model, texts, tmp_path / "store"))
    state = texts.stat()
    texts.write_text(texts.read_text() + "one more\n")
    assert main(flags(model, texts, tmp_path / "store")) == 2
    assert "texts: " in capsys.readouterr().err
    shutil.copy(texts_file, texts)
    os.utime(texts, ns=(state.st_atime_ns, state.st_mtime_ns))
    weights = load_file(model / "model.safetensors")
    good = {name: tensor.clone() for name, tensor in weights.items()}
    next(iter(weights.values())).add_(1)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert main(flags(model, texts, tmp_path / "store")) == 2
    assert "model_sha256" in capsys.readouterr().err
    save_file(good, model / "model.safetensors", metadata={"format": "pt"})
    assert main(flags(model, texts, tmp_path / "store")) == 0


def test_a_preset_in_python_and_json_is_its_settings():
    config = CollectConfig.from_dict({"preset": "mech-int"})
    assert (config.processing, config.prepend_bos, config.keep_bos) == ("centred", True, True)
    assert not CollectConfig.from_dict({"preset": "mech-int", "keep_bos": False}).keep_bos
    with pytest.raises(MechintError, match="unknown preset 'mechint'; nearest: mech-int"):
        CollectConfig.from_dict({"preset": "mechint"})


def test_the_command_that_goes_on_is_the_same_command(tmp_path: Path):
    from mechint.cli.flags import parse
    from mechint.config import COLLECT_PRESETS

    config = CollectConfig(
        model="a b", dataset="x.txt", output=tmp_path / "o", keep_bos=True, prepend_bos=False, context_size=7, seed=3
    )
    import shlex

    words = shlex.split(collect_command(config))
    assert parse(CollectConfig, words[2:], prog="x", presets=COLLECT_PRESETS) == config


def environment(**more: str) -> dict[str, str]:
    # one thread, so that the rounding does not depend on how many processes share the work
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **more}


def start(words: list[str], **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def progress_of(output: Path) -> Path:
    return (output if output.suffix != ".pt" else output.with_name(output.name + ".shards")) / "progress"


def wait_for_shards(output: Path, n: int, process: subprocess.Popen, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end and process.poll() is None:
        if len(list(progress_of(output).glob("0*.json"))) >= n:
            return
        time.sleep(0.005)
    raise AssertionError(f"{n} shards did not appear: {process.communicate()}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["store", "a.pt"])
def test_kill_9_at_any_moment_changes_no_byte(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, name: str):
    words = flags(tiny_neox_dir, texts_file, tmp_path / "whole" / name, "--checkpoint-every", 2)
    assert start(words).wait() == 0
    output = tmp_path / "killed" / name
    words = flags(tiny_neox_dir, texts_file, output, "--checkpoint-every", 2)
    rng = random.Random(len(name))
    kills = 0
    while True:
        process = start(words)
        finished = len(list(progress_of(output).glob("0*.json"))) if progress_of(output).exists() else 0
        if kills < 6:
            try:
                wait_for_shards(output, min(finished + rng.randint(1, 5), 25), process)
                time.sleep(rng.random() * 0.02)
            except AssertionError:
                if process.returncode:
                    raise
        else:
            process.wait(60)
        if process.poll() is not None:
            assert process.returncode == 0
            break
        process.kill()
        process.wait()
        kills += 1
        if not output.exists() or not (output.is_file() or (output / "store.json").exists()):
            with pytest.raises(MechintError):
                open_activations(output)
    assert kills >= 4
    whole = snapshot(tmp_path / "whole")
    killed = snapshot(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    different = [file for file in whole if whole[file] != killed[file]]
    assert [file for file in different if not file.endswith(".json")] == []
    ours, theirs = open_activations(output), open_activations(tmp_path / "whole" / name)
    assert {**ours.info, "git_commit": 0} == {**theirs.info, "git_commit": 0}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_politely(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, number: int):
    output = tmp_path / "store"
    words = flags(tiny_neox_dir, texts_file, output, "--checkpoint-every", 1)
    process = start(words)
    wait_for_shards(output, 3, process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error and "go on with: python scripts/collect_activations.py" in error
    kept = len(list(progress_of(output).glob("0*.json")))
    assert kept >= 3
    process = start(words)
    assert process.wait(60) == 0
    assert open_activations(output).info["n_texts"] == 50


@pytest.mark.slow
@pytest.mark.parametrize("name", ["store", "a.pt"])
def test_a_full_disk_keeps_what_was_finished(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, name: str):
    """A limit on the size of files stands for the disk: a shard that does not fit fails in the middle of its write."""
    output = tmp_path / "out" / name
    texts = tmp_path / "texts.txt"
    # small shards, then one too large for the limit
    lines = texts_file.read_text().splitlines()
    texts.write_text("\n".join(["one"] * 16 + [" ".join(lines)[:500]] * 16 + lines[:8]) + "\n")
    words = flags(tiny_neox_dir, texts, output)
    limit = 60_000
    process = start(words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "no room to write" in lines[0] and "run the same command again" in lines[0], error
    assert "Traceback" not in error
    folder = progress_of(output).parent
    assert [path.name for path in sorted(folder.glob("*shard*"))] == [f"shard-0000{i}.safetensors" for i in range(2)]
    with pytest.raises(MechintError, match="not finished"):
        open_activations(output)
    if name == "a.pt":  # now room for each shard, but not for the whole: the assembly is what fails
        limit = 200_000
        process = start(words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        _, error = process.communicate(timeout=120)
        assert process.returncode == 2 and "no room to write" in error and "Traceback" not in error, error
        assert not output.exists()
    process = start(words)
    assert process.wait(120) == 0
    activations = open_activations(output)
    assert activations.info["n_texts"] == 40
    activations.verify()


@pytest.mark.slow
def test_two_processes_make_the_files_of_one(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path):
    for name in ("store", "a.pt"):
        assert start(flags(tiny_neox_dir, texts_file, tmp_path / "one" / name)).wait(120) == 0
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        words = flags(tiny_neox_dir, texts_file, tmp_path / "two" / name)
        done = subprocess.run(
            [*command, str(SCRIPT), *words], env=environment(), capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("activation_path: ") == 1
        one, two = open_activations(tmp_path / "one" / name), open_activations(tmp_path / "two" / name)
        assert {**two.info, "git_commit": 0} == {**one.info, "git_commit": 0} and two.sha256 == one.sha256
        two.verify()
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "two")
    assert {file: digest for file, digest in one.items() if not file.endswith(".json")} == {
        file: digest for file, digest in two.items() if not file.endswith(".json")
    }


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_texts(tiny_neox_dir: Path, tmp_path: Path):
    peaks = []
    for n_texts in (400, 3200):
        output = tmp_path / f"{n_texts}.pt"
        words = ["--model", tiny_neox_dir, "--dataset", "builtin/tales", "--num-texts", n_texts, "--output", output]
        code = f"""
import resource, sys
from mechint.cli.collect import main
assert main({[str(word) for word in [*words, "--checkpoint-every", 100]]!r}) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
        done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) * 1024)
    data = (tmp_path / "3200.pt").stat().st_size - (tmp_path / "400.pt").stat().st_size
    assert data > 30e6
    assert peaks[1] - peaks[0] < 0.4 * data, (peaks, data)


@pytest.mark.slow
def test_the_default_names_with_a_hub(tiny_neox_dir: Path, tmp_path: Path):
    """The seed's own command, against a Hub on this machine that has the tiny model under the real name."""
    import pyarrow
    import pyarrow.parquet

    files = {}
    for part in range(2):
        table = pyarrow.table({"text": [f"the dog ran far away {part} {i}" for i in range(30)]})
        path = tmp_path / f"{part}.parquet"
        pyarrow.parquet.write_table(table, path)
        files[f"data/train-0000{part}-of-00002.parquet"] = path.read_bytes()
    with LoopbackHub(tmp_path) as hub:
        model_commit = hub.add_repo("EleutherAI/pythia-70m", tiny_neox_dir)
        data_commit = hub.add_repo("Skylion007/openwebtext", files, type="dataset")
        env = {**hub.env(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
        words = "--model pythia-70m --layer 3 --hook blocks.3.hook_resid_post --dataset openwebtext --num-texts 50"
        script = [sys.executable, str(SCRIPT), *words.split(), "--checkpoint-every", "8", "--output"]

        def run(command: list[str]) -> subprocess.CompletedProcess:
            return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)

        done = run([*script, str(tmp_path / "a.pt")])
        assert done.returncode == 0, done.stderr
        whole = open_activations(tmp_path / "a.pt")
        assert whole.info["n_texts"] == 50 and whole.info["dataset_revision"] == data_commit
        assert whole.info["model_revision"] == model_commit and whole.info["model_source"] == "EleutherAI/pythia-70m"

        # stopped and continued: the position in the stream was kept, even though the data set has moved on since
        process = subprocess.Popen([*script, str(tmp_path / "b.pt")], env=env, stderr=subprocess.PIPE, text=True)
        wait_for_shards(tmp_path / "b.pt", 2, process)
        process.kill()
        process.wait()
        hub.commit("Skylion007/openwebtext", {"data/train-00000-of-00002.parquet": files.popitem()[1]}, type="dataset")
        done = run([*script, str(tmp_path / "b.pt")])
        assert done.returncode == 0, done.stderr
        again = open_activations(tmp_path / "b.pt")
        assert again.sha256 == whole.sha256 and again.info["dataset_revision"] == data_commit

        # dealt out to two processes: each text once
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = run([*torchrun, *script[1:], str(tmp_path / "c"), "--revision", data_commit])
        assert done.returncode == 0, done.stderr
        both = open_activations(tmp_path / "c")
        assert both.info["n_texts"] == 50 and len(both.text_ids.unique()) == 50
        assert not hub.seen("OUTSIDE")


# --- norms and broken numbers ---------------------------------------------------------------------------------------


def changed_model(source: Path, folder: Path, token: str, value: float) -> Path:
    """A copy of the model with one entry of one token's embedding changed."""
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(source, folder)
    (token_id,) = AutoTokenizer.from_pretrained(source)(token).input_ids
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.embed_in.weight"][token_id, 3] = value
    save_file({k: v.clone() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_never_enters_a_shard(tiny_neox_dir: Path, tmp_path: Path, value: float, capsys):
    model = changed_model(tiny_neox_dir, tmp_path / "model", "7", value)
    (tmp_path / "texts.txt").write_text("\n".join(["the cat sat"] * 21 + ["the cat 7 sat"] + ["the dog"] * 9) + "\n")
    assert main(flags(model, tmp_path / "texts.txt", tmp_path / "store")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    # attention multiplies even the positions that it masks, so the first bad row can come before the bad token
    assert "NaN or Inf at blocks.3.hook_resid_post in text 21, first at position 1" in error
    assert "--dtype float32" in error
    shards = sorted((tmp_path / "store").glob("shard-*"))
    assert len(shards) == 2  # texts 0 to 15
    assert all(bool(load_file(shard)["activations"].isfinite().all()) for shard in shards)


def test_outliers_are_reported_with_what_to_do(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, capsys):
    model = changed_model(tiny_neox_dir, tmp_path / "model", "<|endoftext|>", 3000.0)
    kept = collect_quietly(*flags(model, texts_file, tmp_path / "kept", "--keep-bos"))
    printed = capsys.readouterr().out
    norms = open_activations(kept).info["norms"]
    assert (norms["n_outliers"], norms["n_outliers_position_0"]) == (50, 50)
    assert norms["position_0"]["median"] == pytest.approx(3000, rel=0.01)
    assert "100% of them at position 0" in printed and "warning" in printed and "--no-keep-bos" in printed
    left_out = collect_quietly(*flags(model, texts_file, tmp_path / "out"))
    printed = capsys.readouterr().out
    norms = open_activations(left_out).info["norms"]
    assert norms["n_outliers"] == 0 and norms["position_0"]["n"] == 50 and not norms["position_0"]["kept"]
    assert "position 0 (left out): median 3.0" in printed and "warning" not in printed


@given(
    st.lists(st.floats(2.0**-7, 1e6, width=32), min_size=1, max_size=60),
    st.integers(0, 5),
    st.booleans(),
    st.integers(1, 4),
)
def test_norm_summary_is_close_to_exact(values: list[float], n_start: int, kept: bool, n_parts: int):
    values = [*values, *[values[0] * 50] * n_start]
    norms = torch.tensor(values)
    at_start = torch.arange(len(values)) >= len(values) - n_start
    parts = [norm_histograms(norms[i::n_parts], at_start[i::n_parts]) for i in range(n_parts)]
    parts = json.loads(json.dumps(parts))
    summary = summarise_norms(add_histograms(parts), kept)
    rest, start_norms = norms[~at_start].double().numpy(), norms[at_start].double().numpy()
    median = np.quantile(rest, 0.5, method="inverted_cdf")
    assert summary["median"] == pytest.approx(median, rel=0.006)
    assert summary["max"] == pytest.approx(rest.max())
    assert summary["position_0"]["n"] == n_start
    counted = np.concatenate([rest, start_norms]) if kept else rest
    low, high = (np.sum(counted > OUTLIER_MULTIPLE * median * factor) for factor in (1.02, 0.98))
    assert low <= summary["n_outliers"] <= high
    assert report_norms(summary, len(counted)).startswith("norms: median")


def test_outliers_elsewhere_get_another_hint():
    norms = torch.tensor([1.0] * 20 + [100.0] * 2)
    summary = summarise_norms(norm_histograms(norms, torch.zeros(22, dtype=torch.bool)), True)
    report = report_norms(summary, 22)
    assert summary["n_outliers"] == 2 and "0% of them at position 0" in report and "not first positions" in report


def test_progress_goes_to_stderr_with_a_rate(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, capsys):
    collect_quietly(*flags(tiny_neox_dir, texts_file, tmp_path / "store"))
    captured = capsys.readouterr()
    assert "tokens/s]" in captured.err and "50/50" in captured.err and "text/s" in captured.err
    assert "50 texts" in captured.out and "tokens/s" in captured.out
    collect_activations(CollectConfig(model=str(tiny_neox_dir), dataset=str(texts_file), num_texts=5,
                                      output=tmp_path / "quiet"), progress=False)  # fmt: skip
    assert capsys.readouterr().err == ""
    tqdm.write("", file=sys.stderr)
