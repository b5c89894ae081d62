"""Contexts to batches to rows: nothing lost, like lengths together, any pattern of kept rows."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from collecting import collect_quietly, flags, one_thread, texts_fixture  # noqa: F401  (fixtures)
from conftest import HOOK

from mechint.config import CollectConfig
from mechint.data import windows
from mechint.data.collect import block_of, load_hooked, open_source
from mechint.data.contexts import Context, contexts_of
from mechint.data.store_write import shard_name, write_shard
from mechint.data.windows import plan_block, run_block
from mechint.errors import MechintError


def random_contexts(rng: random.Random, n: int, longest: int = 60) -> list[Context]:
    """Contexts of several texts each, of any length and with any rows left out, as packing gives them."""
    contexts = []
    for text in range(n):
        length = rng.choice([0, 1, 2, rng.randint(1, longest)])
        kept = [rng.random() < rng.choice([0.0, 0.5, 0.9, 1.0]) for _ in range(length)]
        ids = sorted(rng.randint(text, text + 1) for _ in range(length))
        contexts.append(Context([rng.randint(1, 99) for _ in range(length)], ids, kept))
    return contexts


class Echo:
    """A model whose activation says which token stands where in which batch line: (token, position, 7)."""

    name, device, d_model = "echo", "cpu", 3

    def __init__(self):
        self.hf_model = SimpleNamespace(dtype=torch.float32)
        self.shapes: list[tuple[int, int]] = []

    def hook_width(self, hook_name: str) -> int:
        return 3

    def activations_at(self, tokens: torch.Tensor, hook_names: list[str]) -> dict[str, torch.Tensor]:
        self.shapes.append(tuple(tokens.shape))
        where = torch.arange(tokens.shape[1]).expand_as(tokens)
        value = torch.stack([tokens, where, torch.full_like(tokens, 7)], dim=-1).float()
        return {hook: value * (i + 1) for i, hook in enumerate(hook_names)}


@pytest.mark.parametrize("batch_size", [None, 1, 5])
@pytest.mark.parametrize("seed", range(4))
def test_every_kept_token_has_its_row(batch_size: int | None, seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(windows.BATCH_TOKENS, "cpu", 150)
    rng = random.Random(seed)
    contexts = random_contexts(rng, rng.choice([1, 17, 60]))
    expected = [
        (token, position, text)
        for context in contexts
        for position, (token, text, kept) in enumerate(zip(context.tokens, context.text_ids, context.kept, strict=True))
        if kept
    ]
    model, seen = Echo(), []
    block = plan_block(contexts, batch_size=batch_size)
    found = run_block(model, ["a", "b"], block, on_batch=lambda *counts: seen.append(counts))
    assert block.tokens.tolist() == [token for token, _, _ in expected]
    assert block.positions.tolist() == [position for _, position, _ in expected]
    assert block.text_ids.tolist() == [text for _, _, text in expected]
    rows = [[float(token), float(position), 7.0] for token, position, _ in expected]
    assert found.activations["a"].tolist() == rows and found.activations["b"].shape == found.activations["a"].shape
    n_tokens = sum(len(context.tokens) for context in contexts)
    assert block.n_tokens == n_tokens == sum(tokens for _, tokens in seen)
    assert sum(n for n, _ in seen) == sum(1 for context in contexts if context.tokens)
    firsts = sum(1 for context in contexts if context.tokens and not context.kept[0])
    assert len(found.left_out["a"]) == firsts and bool((found.left_out["a"][:, 1] == 0).all())
    norms = found.checked_norms("a")
    counts = found.histograms("a", norms)
    in_bins = [sum(counts[name]["bins"].values()) for name in ("position_0", "rest")]
    assert in_bins == [firsts + sum(p == 0 for _, p, _ in expected), sum(p > 0 for _, p, _ in expected)]
    if batch_size:
        assert all(lines <= batch_size for lines, _ in model.shapes)
    else:
        assert all(lines == 1 or lines * length <= 150 for lines, length in model.shapes)


def test_batches_by_tokens_are_full_and_little_padded():
    rng = random.Random(0)
    contexts = contexts_of([[1] * rng.randint(5, 200) for _ in range(512)], range(512), context_size=128, bos=0,
                           keep_bos=False)  # fmt: skip
    block = plan_block(contexts)
    padded = [batch.tokens.numel() for batch in block.batches]
    assert max(padded) <= 4096 and sum(padded) <= 1.1 * block.n_tokens
    assert sum(padded) / len(padded) > 0.9 * 4096
    long = plan_block(contexts_of([[1] * 9000, [1] * 3], range(2), context_size=9000, bos=None, keep_bos=False))
    assert [tuple(batch.tokens.shape) for batch in long.batches] == [(1, 3), (1, 9000)]


def test_a_bad_row_is_named_and_an_overflowing_norm_is_no_bad_row():
    block = plan_block(contexts_of([[5, 6], [7, 8, 9]], [3, 4], context_size=9, bos=None, keep_bos=False))
    found = run_block(Echo(), ["a"], block)
    found.activations["a"][1] = 3e38
    assert float(found.checked_norms("a")[1]) == torch.finfo(torch.float32).max
    found.activations["a"][3, 1] = float("nan")
    with pytest.raises(MechintError, match="echo gave NaN or Inf at a in text 4, first at position 1"):
        found.checked_norms("a")


def test_texts_without_a_row_make_an_empty_block():
    block = plan_block(contexts_of([[], []], [0, 1], context_size=9, bos=None, keep_bos=False))
    found = run_block(Echo(), ["a"], block)
    assert found.activations["a"].shape == (0, 3) and len(found.checked_norms("a")) == 0
    assert plan_block([]).n_rows == 0


def test_threads_change_no_byte(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path):
    """The shards of `collect` against the same three steps one after another on this thread."""
    output = collect_quietly(*flags(tiny_neox_dir, texts_file, tmp_path / "store"))
    config = CollectConfig(model=str(tiny_neox_dir), hook=HOOK, dataset=str(texts_file), num_texts=50, batch_size=4,
                           checkpoint_every=8, device="cpu")  # fmt: skip
    model, source = load_hooked(config), open_source(config)
    for number in range(7):
        texts = source.read(8 * number, min(8, 50 - 8 * number))
        _, block, _ = block_of(config, model, texts, 8 * number)
        rows = run_block(model, [HOOK], block)
        norms = rows.checked_norms(HOOK)
        write_shard(tmp_path / "serial", number, activations=rows.activations[HOOK], tokens=block.tokens,
                    text_ids=block.text_ids, positions=block.positions, norms=norms,
                    record={"norms": rows.histograms(HOOK, norms)})  # fmt: skip
        name = shard_name(number)
        assert (tmp_path / "serial" / name).read_bytes() == (output / name).read_bytes()
