"""Tokens as people read them: with their spaces, and with characters that several tokens share put together.

Decoding tokens one at a time loses both: SentencePiece-like tokenizers drop the space of what they take for the first
token, and the bytes of one character are no text by themselves.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Decode = Callable[[list[int]], str]
INCOMPLETE = "\ufffd"  # what bytes that are no whole character are decoded to


def decoder(tokenizer: Any) -> Decode:
    """A tokenizer's `decode` that leaves every space as it is."""
    return lambda tokens: tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def token_texts(decode: Decode, tokens: Iterable[int]) -> list[str]:
    """What each token writes within a text; `decode` is a tokenizer's, such as `model.tokenizer.decode`.

    Each is decoded behind itself, where it keeps a space that the beginning of a text would cost it.
    """
    known: dict[int, str] = {}
    found = []
    for token in tokens:
        if token not in known:
            alone, twice = decode([token]), decode([token, token])
            known[token] = (twice[len(alone) :] if twice.startswith(alone) else "") or alone
        found.append(known[token])
    return found


def token_strings(decode: Decode, tokens: Sequence[int]) -> list[str]:
    """The pieces of a text that its tokens write, one each, spaces included; joined, they are the text.

    A character whose bytes are divided between tokens is the last one's; the others, which complete nothing, are "".
    Bytes that make no character at all stay U+FFFD, at the last of their tokens.
    """
    pieces = token_texts(decode, tokens)
    parts = [INCOMPLETE in piece for piece in pieces]
    start = 0
    for is_part, run in itertools.groupby(parts):
        stop = start + len(list(run))
        if is_part:
            pieces[start:stop] = _by_prefix(decode, list(tokens[start:stop]))
        start = stop
    return pieces


def _by_prefix(decode: Decode, tokens: list[int]) -> list[str]:
    """What each token adds to the whole characters before it."""
    pieces, known = [], 0
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[:end])
        whole = len(text) if end == len(tokens) else len(text.rstrip(INCOMPLETE))
        pieces.append(text[known:whole])
        known = max(known, whole)
    return pieces
