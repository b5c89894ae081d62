"""Collection: the right rows, a truthful record, and mistakes known before anything is written."""

import json
import time
from pathlib import Path

import pytest
import torch
from collecting import collect_quietly, flags, one_thread, snapshot, texts_fixture  # noqa: F401  (fixtures)
from conftest import HOOK
from safetensors.torch import load_file

from mechint.cli.collect import main
from mechint.config import CollectConfig
from mechint.data import collect_activations, open_activations


def reference_rows(
    model_dir: Path, texts: list[str], *, bos: bool, skip: int, limit: int = 128
) -> list[tuple[int, torch.Tensor]]:
    """The number of the text, and Hugging Face's own hidden states of a window of it, without padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = []
    for number, text in enumerate(texts):
        first, ids = ([0] if bos else []), tokenizer(text).input_ids
        room = limit - len(first)
        for start in range(0, len(ids), room):
            window = torch.tensor([first + ids[start : start + room]])
            with torch.no_grad():
                states = model(window, output_hidden_states=True).hidden_states
            rows.append((number, states[4][0, skip:]))
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
    whole = torch.cat([rows for _, rows in expected])
    if centred:
        whole = whole - whole.mean(-1, keepdim=True)
    assert activations.n_rows == len(whole)
    torch.testing.assert_close(activations.tensor(), whole, atol=1e-4, rtol=1e-4)
    assert activations.text_ids.tolist() == [number for number, rows in expected for _ in rows]
    assert activations.positions.tolist() == [skip + i for _, rows in expected for i in range(len(rows))]
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


def disk_of(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    import shutil

    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr("mechint.data.forecast.shutil.disk_usage", lambda path: usage(10**12, 10**12 - free, free))


@pytest.mark.parametrize("name", ["store", "a.pt", "acts"])
def test_room_is_estimated_and_what_cannot_fit_is_refused(
    tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, name: str, capsys, monkeypatch
):
    """Texts alike, so that the estimate is exact: 48 texts of 8 rows, at one hook or two."""
    (tmp_path / "texts.txt").write_text("the cat sat on the mat and the\n" * 48)
    words = flags(tiny_neox_dir, tmp_path / "texts.txt", tmp_path / "out" / name, "--num-texts", 48)
    if name == "acts":
        words[words.index("--hook") + 1 : words.index("--hook") + 2] = [HOOK, "blocks.1.hook_resid_post"]
    rows = 48 * 8
    needed = rows * (32 * 4 + 16) * (2 if name == "acts" else 1)
    disk_of(monkeypatch, needed - 1)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no room: 48 texts, about 384 vectors") and error.count("\n") == 1
    assert "--num-texts 47 fits" in error and ("--dtype bfloat16" in error) == (name != "a.pt")
    assert not (tmp_path / "out").exists()
    assert ("fewer hooks" in error) == (name == "acts")
    disk_of(monkeypatch, needed)
    assert main(words) == 0
    hooks = " at each of 2 hooks" if name == "acts" else ""
    assert f"this will be 48 texts, about 384 vectors{hooks}, " in capsys.readouterr().err
    stored = open_activations(tmp_path / "out" / name / (HOOK if name == "acts" else ""))
    assert stored.n_rows == rows


def test_room_is_for_what_is_still_missing(tiny_neox_dir: Path, tmp_path: Path, capsys, monkeypatch):
    from test_collect_resume import Stop, stop_after

    (tmp_path / "texts.txt").write_text("the cat sat on the mat and the\n" * 48)
    words = flags(tiny_neox_dir, tmp_path / "texts.txt", tmp_path / "store", "--num-texts", 48)
    with monkeypatch.context() as patch:
        stop_after(patch, 4, Stop())
        with pytest.raises(Stop):
            main(words)
    disk_of(monkeypatch, 16 * 8 * (32 * 4 + 16))  # two shards of eight texts are left
    assert main(words) == 0
    # a source that ends in its first shard is known to be short, however many texts were asked for
    assert main(flags(tiny_neox_dir, tmp_path / "texts.txt", tmp_path / "short", "--num-texts", 10**5,
                      "--checkpoint-every", 64)) == 2  # fmt: skip
    disk_of(monkeypatch, 48 * 8 * (32 * 4 + 16))
    assert main(flags(tiny_neox_dir, tmp_path / "texts.txt", tmp_path / "short", "--num-texts", 10**5,
                      "--checkpoint-every", 64)) == 0  # fmt: skip


def test_each_rows_norm_is_kept(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path):
    store = collect_quietly(*flags(tiny_neox_dir, texts_file, tmp_path / "store", "--dtype", "bfloat16"))
    single = collect_quietly(*flags(tiny_neox_dir, texts_file, tmp_path / "a.pt", "--dtype", "bfloat16"))
    shard = load_file(store / "shard-00000.safetensors")
    assert shard["norms"].dtype == torch.float32 and shard["norms"].shape == shard["tokens"].shape
    expected = open_activations(store).tensor().double().norm(dim=1)
    for path in (store, single):
        torch.testing.assert_close(open_activations(path).norms.double(), expected, rtol=1e-6, atol=0)


def test_progress_goes_to_stderr_with_a_rate(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, capsys):
    collect_quietly(*flags(tiny_neox_dir, texts_file, tmp_path / "store"))
    captured = capsys.readouterr()
    assert "tokens/s]" in captured.err and "50/50" in captured.err and "text/s" in captured.err
    assert "50 texts" in captured.out and "tokens/s" in captured.out
    collect_activations(CollectConfig(model=str(tiny_neox_dir), dataset=str(texts_file), num_texts=5,
                                      output=tmp_path / "quiet"), progress=False)  # fmt: skip
    assert capsys.readouterr().err == ""
