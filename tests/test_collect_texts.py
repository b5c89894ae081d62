"""What becomes of each text in a collection: windows, packing, cuts, chats, token ids, and what is no text."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from collecting import Stop, collect_quietly, flags, one_thread, stop_after, texts_fixture  # noqa: F401  (fixtures)
from conftest import HOOK

from mechint.cli.collect import main
from mechint.config import CollectConfig
from mechint.data import forecast, open_activations
from mechint.data.collect import collect, summary
from mechint.data.contexts import contexts_of
from mechint.data.documents import Document
from mechint.data.tokens import add_counts, read_texts
from mechint.errors import MechintError
from mechint.eval import Text, texts_from_rows
from mechint.models import load_model

BOS = 0


@pytest.fixture(scope="module")
def model(tiny_neox_dir: Path) -> Any:
    return load_model(str(tiny_neox_dir), device="cpu", hook_name=HOOK)


@pytest.fixture
def fresh(tiny_neox_dir: Path) -> Any:
    """A model that a test may change."""
    return load_model(str(tiny_neox_dir), device="cpu", hook_name=HOOK)


# --- documents to tokens --------------------------------------------------------------------------------------------


def test_strings_are_cut_cleaned_and_counted(model: Any):
    documents = [
        Document("the cat", "a, line 1"),
        Document("the dog ran far", "a, line 3", 1),
        Document("a\0b\ud83dc\U0001f600", "a, line 4"),
        Document([5, 6, 7], "b, row 1", 2),
    ]
    read = read_texts(model, documents, max_chars=7)
    assert read.texts == ["the cat", "the dog", "a\ufffdb\ufffdc\U0001f600", [5, 6, 7]]
    assert read.counts == {
        "n_texts": 4, "n_blank": 3, "n_chars": 28, "n_cut": 1, "n_chars_cut": 8, "n_replaced": 2, "n_pretokenised": 1,
    }  # fmt: skip
    tokenizer = model.tokenizer
    assert [tokenizer.decode(ids) for ids in read.token_lists[:3]] == read.texts[:3] and read.token_lists[3] == [
        5,
        6,
        7,
    ]
    assert read_texts(model, documents).texts[1] == "the dog ran far"
    assert add_counts([read.counts, read.counts])["n_chars"] == 56 and add_counts([]) == {}


def test_token_ids_are_taken_as_they_are_but_for_a_bos_that_comes_anyway(model: Any):
    documents = [Document([BOS, 5, 6], ""), Document([7, BOS], "")]
    assert read_texts(model, documents).token_lists == [[5, 6], [7, BOS]]
    assert read_texts(model, documents, prepend_bos=False).token_lists == [[BOS, 5, 6], [7, BOS]]


@pytest.mark.parametrize("wrong", [400, 50_000, -1])
def test_token_ids_of_another_model(model: Any, wrong: int):
    with pytest.raises(MechintError, match=f"b, row 9: token {wrong} is none of the {model.d_vocab} that .* has embed"):
        read_texts(model, [Document([5, wrong], "b, row 9")])


def test_a_tokenizer_with_more_tokens_than_the_model(fresh: Any):
    fresh.tokenizer.add_tokens(["<extra>"])
    with pytest.raises(MechintError, match="a, line 2: token .* is none of the"):
        read_texts(fresh, [Document("the cat", "a, line 1"), Document("the <extra>", "a, line 2")])


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "the dog."}]


def test_chats_go_through_the_template_once(fresh: Any):
    chat = Document(CHAT, "c, line 1")
    with pytest.raises(MechintError, match=r"c, line 1 holds a chat, and .* has no chat template: .*FIELD\.content"):
        read_texts(fresh, [chat])
    fresh.tokenizer.chat_template = TEMPLATE
    text = "[user] the cat?\n[assistant] the dog.\n"
    assert read_texts(fresh, [chat]).texts == [text], "BOS comes once, before the context"
    with_bos = read_texts(fresh, [chat], prepend_bos=False)
    assert with_bos.texts == ["<|endoftext|>" + text] and with_bos.token_lists[0][0] == BOS
    assert read_texts(fresh, [chat], max_chars=6).counts["n_cut"] == 1
    fresh.tokenizer.chat_template = "{{ raise_exception('roles must take turns') }}"
    with pytest.raises(MechintError, match="c, line 1: the chat template of .* refuses it: roles must take turns"):
        read_texts(fresh, [chat])


def test_a_bos_that_the_model_does_not_have(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, capsys: Any):
    folder = tmp_path / "model"
    shutil.copytree(tiny_neox_dir, folder)
    tokenizer = load_model(str(folder), device="cpu").tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.save_pretrained(folder)
    assert main(flags(folder, texts_file, tmp_path / "store")) == 2
    error = capsys.readouterr().err
    assert "as its BOS, and the model has only" in error and "--no-prepend-bos" in error and "Traceback" not in error
    assert main(flags(folder, texts_file, tmp_path / "store", "--no-prepend-bos")) == 0


# --- whole collections ----------------------------------------------------------------------------------------------


def own_states(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.hf_model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[4][0]


LAYOUTS = [
    ["--context-size", 6],
    ["--context-size", 6, "--no-bos-every-window"],
    ["--context-size", 6, "--no-prepend-bos"],
    ["--context-size", 2],
    ["--pack"],
    ["--pack", "--context-size", 7, "--keep-bos"],
    ["--pack", "--context-size", 7, "--no-bos-every-window"],
    ["--pack", "--context-size", 7, "--no-prepend-bos"],
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda words: "".join(map(str, words)))
def test_rows_are_those_of_the_contexts_that_the_model_reads(
    tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, model: Any, layout: list
):
    output = collect_quietly(*flags(tiny_neox_dir, texts_file, tmp_path / "store", *layout))
    config = CollectConfig(
        context_size=layout[layout.index("--context-size") + 1] if "--context-size" in layout else 128,
        prepend_bos="--no-prepend-bos" not in layout,
        bos_every_window="--no-bos-every-window" not in layout,
        pack="--pack" in layout,
        keep_bos="--keep-bos" in layout,
    )
    token_lists = model.token_lists(texts_file.read_text().splitlines()[:50])
    expected = []
    for first in range(0, 50, 8):  # a shard's texts are laid out by themselves
        ids = range(first, min(first + 8, 50))
        assert config.context_size is not None
        expected += contexts_of(
            [token_lists[i] for i in ids], ids, context_size=config.context_size,
            bos=BOS if config.prepend_bos else None, every_window=config.bos_every_window, pack=config.pack,
            keep_bos=config.keep_bos, separator=BOS,
        )  # fmt: skip
    activations = open_activations(output)
    flat = [
        (token, text_id, position)
        for context in expected
        for position, (token, text_id, kept) in enumerate(
            zip(context.tokens, context.text_ids, context.kept, strict=True)
        )
        if kept
    ]
    assert activations.text_ids is not None and activations.tokens is not None and activations.positions is not None
    columns = (activations.tokens.tolist(), activations.text_ids.tolist(), activations.positions.tolist())
    assert list(zip(*columns, strict=True)) == flat
    states = [own_states(model, context.tokens)[torch.tensor(context.kept)] for context in expected]
    torch.testing.assert_close(activations.tensor(), torch.cat(states), atol=1e-4, rtol=1e-4)
    read = [Text(context.tokens, context.kept) for context in expected]
    assert texts_from_rows(activations) == [text for text in read if len(text.tokens) > 1 and any(text.seen)]
    # Every token of every text has a row, whatever the layout.
    assert sum(map(len, token_lists)) == len(flat) - sum(
        kept for c in expected for kept, t in zip(c.kept, c.tokens, strict=True) if t == BOS
    )
    info = activations.info
    assert info["texts"]["n_contexts"] == len(expected) and info["texts"]["n_texts"] == info["n_texts"] == 50
    assert (info["pack"], info["separator_token_id"]) == (config.pack, BOS if config.pack else None)
    assert info["bos_every_window"] == config.bos_every_window


def test_packing_with_a_context_of_one(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, capsys: Any):
    assert main(flags(tiny_neox_dir, texts_file, tmp_path / "store", "--pack", "--context-size", 1)) == 2
    assert "--context-size must be at least 2" in capsys.readouterr().err and not (tmp_path / "store").exists()


def test_packed_shards_do_not_depend_on_who_makes_them(
    tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = ["--pack", "--context-size", 9]
    whole = collect_quietly(*flags(tiny_neox_dir, texts_file, tmp_path / "whole", *words))
    part = flags(tiny_neox_dir, texts_file, tmp_path / "part", *words)
    with monkeypatch.context() as patch:
        stop_after(patch, 3, Stop())
        with pytest.raises(Stop):
            main(part)
    ours, theirs = open_activations(collect_quietly(*part)), open_activations(whole)
    assert ours.sha256 == theirs.sha256 and ours.info["texts"] == theirs.info["texts"]


def told(config: CollectConfig) -> tuple[list[str], str]:
    notes: list[str] = []
    done = collect(config, progress=False, on_note=notes.append)
    return notes, summary(done)


def test_what_happens_to_each_text_is_said_before_and_after(tiny_neox_dir: Path, tmp_path: Path):
    texts = tmp_path / "long.jsonl"
    lines = ["the cat sat on the mat " * n for n in (1, 2, 10, 40)]
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in [*lines, "\ud83d the \0", "  "]))
    base = {"model": str(tiny_neox_dir), "hook": HOOK, "dataset": str(texts), "device": "cpu"}
    notes, after = told(CollectConfig(**base, output=tmp_path / "seed"))
    assert notes[0] == f"texts: {texts}, one text a record; field text"
    assert notes[1].startswith("this will be 5 texts, about ") and " are free there" in notes[1]
    share = 100 * (40 * 23 - 512) / (53 * 23 + 7)
    cut = f"1 of 5 texts cut to 512 characters, which leaves out {share:.3g} % of all characters: --max-chars 0 keeps"
    replaced = "2 characters that no text can hold (NUL, half a surrogate pair) replaced by U+FFFD"
    assert f"{cut} them" in notes and replaced in notes and cut in after and replaced in after
    info = open_activations(tmp_path / "seed").info
    assert info["texts"]["n_chars_cut"] == 40 * 23 - 512 and info["texts"]["n_cut"] == 1 and info["max_chars"] == 512

    notes, after = told(CollectConfig(**base, max_chars=0, output=tmp_path / "all"))
    split = "1 of 5 texts longer than 128 tokens: split into windows, each after BOS, nothing left out"
    assert split in notes and split in after and "cut to" not in after
    activations = open_activations(tmp_path / "all")
    assert activations.tokens is not None and activations.text_ids is not None
    tokenizer = load_model(str(tiny_neox_dir), device="cpu").tokenizer
    assert tokenizer.decode(activations.tokens[activations.text_ids == 3].tolist()) == lines[3]

    _, after = told(CollectConfig(**base, max_chars=0, pack=True, context_size=100, output=tmp_path / "packed"))
    assert (
        "5 texts packed into" in after and "of at most 100 tokens; a token attends to the texts before its own" in after
    )


def test_one_long_line_says_what_it_lost(tiny_neox_dir: Path, tmp_path: Path, capsys: Any):
    (tmp_path / "one.txt").write_text("the cat sat on the mat " * 500)
    words = [
        "--model",
        tiny_neox_dir,
        "--dataset",
        tmp_path / "one.txt",
        "--output",
        tmp_path / "acts",
        "--device",
        "cpu",
    ]
    assert main([str(word) for word in words]) == 0
    captured = capsys.readouterr()
    for said in (captured.out, captured.err):
        assert "1 of 1 text cut to 512 characters, which leaves out 95.5 % of all characters: --max-chars 0" in said
    assert f"texts: {tmp_path / 'one.txt'}, one text a line" in captured.err and "1 text, " in captured.out


@pytest.mark.parametrize("name", ["store", "a.pt"])
def test_what_cannot_fit_on_the_disk_is_refused_before_anything_is_written(
    tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, name: str
):
    class Usage:
        free, total = 40_000, 10**9

    output = tmp_path / "out" / name
    with monkeypatch.context() as patch:
        patch.setattr(forecast.shutil, "disk_usage", lambda place: Usage)
        assert main(flags(tiny_neox_dir, texts_file, output)) == 2
    error = capsys.readouterr().err
    assert "do not fit into" in error and "40 kB are free: --num-texts " in error
    assert not output.parent.exists() or not any(output.parent.iterdir())
    fitting = int(error.split("--num-texts ")[1].split()[0])
    assert 3 < fitting < 50
    collect_quietly(*flags(tiny_neox_dir, texts_file, output, "--num-texts", fitting))


def test_shards_that_do_not_fit_into_memory_are_said():
    assert forecast.shard_note(512, rows_per_text=120.0, widths=[512], itemsize=4) == []
    assert forecast.shard_note(500, rows_per_text=250_000.0, widths=[512], itemsize=4) == [
        "a shard of 500 texts will take about 258 GB of memory: --checkpoint-every 3 keeps it to 2 GB"
    ]


def test_the_forecast_counts_the_texts_that_are_there(tiny_neox_dir: Path, tmp_path: Path):
    (tmp_path / "t.txt").write_text("the cat sat\n" * 1000)
    base = {"model": str(tiny_neox_dir), "hook": HOOK, "dataset": str(tmp_path / "t.txt"), "device": "cpu"}
    for size, lower, upper in ((100, 900, 1100), (2000, 1000, 1000)):
        notes, after = told(CollectConfig(**base, checkpoint_every=size, output=tmp_path / f"{size}"))
        n_texts = int(notes[1].split(" text")[0].split()[-1].replace(",", ""))
        assert lower <= n_texts <= upper and ("about 1" in notes[1] or size == 2000) and "1,000 texts" in after
        vectors = int(notes[1].split(", about ")[1].split()[0].replace(",", ""))
        assert vectors == pytest.approx(open_activations(tmp_path / f"{size}").n_rows, rel=0.1)
