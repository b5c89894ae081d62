"""Texts laid out as contexts, and put together again from the rows that a store keeps of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechint.data.contexts import Context, contexts_of
from mechint.data.store import Activations
from mechint.errors import MechintError
from mechint.eval import Text, texts_from_rows

BOS, EOS = 1, 2


def tokens_of(contexts: list[Context]) -> list[list[int]]:
    return [context.tokens for context in contexts]


def test_a_short_text_is_one_context_and_a_long_one_several():
    texts = [[10, 11], [20, 21, 22, 23, 24, 25, 26]]
    found = contexts_of(texts, [4, 5], context_size=4, bos=BOS)
    assert tokens_of(found) == [[BOS, 10, 11], [BOS, 20, 21, 22], [BOS, 23, 24, 25], [BOS, 26]]
    assert [context.text_ids for context in found] == [[4] * 3, [5] * 4, [5] * 4, [5] * 2]
    assert all(context.kept == [False] + [True] * (len(context.tokens) - 1) for context in found)
    kept = contexts_of(texts, [4, 5], context_size=4, bos=BOS, keep_bos=True)
    assert tokens_of(kept) == tokens_of(found) and all(all(context.kept) for context in kept)


def test_bos_at_the_start_of_a_text_only():
    found = contexts_of([list(range(20, 30))], [0], context_size=4, bos=BOS, every_window=False)
    assert tokens_of(found) == [[BOS, 20, 21, 22], [23, 24, 25, 26], [27, 28, 29]]
    assert [context.kept[0] for context in found] == [False, True, True]
    assert tokens_of(contexts_of([[20, 21, 22, 23]], [0], context_size=2, bos=None)) == [[20, 21], [22, 23]]


def test_a_window_is_never_a_lone_token():
    found = contexts_of([[20, 21, 22, 23], [30]], [0, 1], context_size=4, bos=BOS, every_window=False)
    assert tokens_of(found) == [[BOS, 20, 21], [22, 23], [BOS, 30]]


def test_packed_texts_are_begun_by_a_separator():
    texts = [[10, 11], [], [20], [30, 31, 32, 33, 34]]
    found = contexts_of(texts, range(4), context_size=5, bos=BOS, pack=True, separator=BOS)
    assert tokens_of(found) == [[BOS, 10, 11, BOS, 20], [BOS, 30, 31, 32, 33], [BOS, 34]]
    assert found[0].text_ids == [0, 0, 0, 2, 2] and found[0].kept == [False, True, True, False, True]
    # without BOS, the EOS separates; it never ends a context, where it would begin nothing
    found = contexts_of(texts, range(4), context_size=6, bos=None, pack=True, separator=EOS)
    assert tokens_of(found) == [[EOS, 10, 11, EOS, 20], [EOS, 30, 31, 32, 33, 34]]
    found = contexts_of(texts, range(4), context_size=4, bos=BOS, every_window=False, pack=True, separator=BOS)
    assert tokens_of(found) == [[BOS, 10, 11], [BOS, 20, BOS, 30], [31, 32, 33, 34]]


def test_texts_without_tokens():
    assert tokens_of(contexts_of([[], [10]], [0, 1], context_size=4, bos=BOS)) == [[BOS], [BOS, 10]]
    assert tokens_of(contexts_of([[], [10]], [0, 1], context_size=4, bos=None)) == [[10]]
    assert contexts_of([], [], context_size=4, bos=BOS) == []


def test_what_cannot_be():
    for pack in (False, True):
        with pytest.raises(MechintError, match="--context-size 1: a context must hold at least 2 tokens"):
            contexts_of([[10]], [0], context_size=1, bos=BOS, pack=pack, separator=BOS)
    with pytest.raises(MechintError, match="--pack needs a token between texts"):
        contexts_of([[10]], [0], context_size=4, bos=None, pack=True)


def stored(contexts: list[Context], **info: Any) -> Activations:
    """The rows that a store keeps of the contexts."""
    rows = [
        (token, text_id, position)
        for context in contexts
        for position, (token, text_id, kept) in enumerate(
            zip(context.tokens, context.text_ids, context.kept, strict=True)
        )
        if kept
    ]
    columns = torch.tensor(rows, dtype=torch.int32).reshape(-1, 3).T
    activations = Activations(Path("store"), info, [torch.zeros(len(rows), 1)], [])
    activations.__dict__["_columns"] = dict(zip(("tokens", "text_ids", "positions"), columns, strict=True))
    return activations


def info_of(bos: int | None, pack: bool) -> dict[str, Any]:
    separator = (EOS if bos is None else bos) if pack else None
    return {"prepend_bos": bos is not None, "bos_token_id": bos, "pack": pack, "separator_token_id": separator}


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.integers(2, 6),
    st.sampled_from([BOS, None]),
    *[st.booleans()] * 3,
)
def test_every_token_is_read_once_and_what_was_read_can_be_rebuilt(
    lengths: list[int], size: int, bos: int | None, every_window: bool, pack: bool, keep_bos: bool
):
    texts = [[100 * number + at for at in range(length)] for number, length in enumerate(lengths, 1)]
    info = info_of(bos, pack)
    found = contexts_of(
        texts, range(len(texts)), context_size=size, bos=bos, every_window=every_window, pack=pack, keep_bos=keep_bos,
        separator=info["separator_token_id"],
    )  # fmt: skip
    read = [(token, text) for context in found for token, text in zip(context.tokens, context.text_ids, strict=True)]
    assert [pair for pair in read if pair[0] >= 100] == [
        (token, number) for number, text in enumerate(texts) for token in text
    ]
    assert all(1 <= len(context.tokens) <= size for context in found)
    for context in found:
        assert all(kept == (keep_bos or token >= 100) for token, kept in zip(context.tokens, context.kept, strict=True))
    # A context without a kept row leaves nothing in the store; one of a single token predicts nothing.
    expected = [Text(c.tokens, c.kept) for c in found if any(c.kept) and len(c.tokens) > 1]
    if not expected:
        return
    rows = stored(found, **info)
    positions = rows.positions
    assert positions is not None
    begins = [0, *((positions[1:] <= positions[:-1]).nonzero().flatten() + 1).tolist()]
    assert len(begins) == sum(any(context.kept) for context in found), "the rule of positions alone"
    assert texts_from_rows(rows) == expected


def test_the_contexts_of_chosen_rows():
    texts = [[10, 11, 12, 13, 14], [20, 21], [30, 31, 32]]
    windows = contexts_of(texts, range(3), context_size=4, bos=BOS)
    rows = stored(windows, **info_of(BOS, False))
    # row 4 is in the second window of the first text
    assert [text.tokens for text in texts_from_rows(rows, torch.tensor([4, 5]))] == [[BOS, 13, 14], [BOS, 20, 21]]
    assert [text.tokens for text in texts_from_rows(rows, max_texts=1)] == [[BOS, 10, 11, 12]]
    packed = stored(
        contexts_of(texts, range(3), context_size=9, bos=BOS, pack=True, separator=BOS), **info_of(BOS, True)
    )
    assert [text.tokens for text in texts_from_rows(packed, torch.tensor([6]))] == [
        [BOS, 10, 11, 12, 13, 14, BOS, 20, 21]
    ]


def test_a_context_ends_before_missing_rows():
    texts = [[10, 11, 12, 13], [20, 21, 22]]
    rows = stored(contexts_of(texts, range(2), context_size=8, bos=BOS), **info_of(BOS, False))
    left = torch.tensor([0, 1, 3, 6])  # of the second text only the last row
    columns = {name: column[left] for name, column in rows._columns.items()}
    fewer = Activations(Path("store"), rows.info, [torch.zeros(4, 1)], [])
    fewer.__dict__["_columns"] = columns
    assert texts_from_rows(fewer) == [Text([BOS, 10, 11], [False, True, True])]


def test_stores_of_earlier_versions_say_nothing_of_packing():
    rows = stored(contexts_of([[10, 11], [20, 21]], range(2), context_size=8, bos=BOS))
    rows.info.update(prepend_bos=True, bos_token_id=BOS)
    assert [text.tokens for text in texts_from_rows(rows)] == [[BOS, 10, 11], [BOS, 20, 21]]
