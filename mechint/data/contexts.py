"""From the token ids of texts to contexts: what the model reads at once."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Context:
    """The tokens that the model reads in one go; for each the number of its text, and whether its row is kept."""

    tokens: list[int]
    text_ids: list[int]
    kept: list[bool]


def contexts_of(
    token_lists: Sequence[Sequence[int]],
    text_ids: Sequence[int],
    *,
    context_size: int,
    bos: int | None,
    keep_bos: bool,
) -> list[Context]:
    """One context a text: BOS first if there is one, cut to `context_size` tokens.

    Args:
        bos: id of the token to prepend; None for none.
        keep_bos: whether that token's row is kept.
    """
    first = [] if bos is None else [bos]
    contexts = []
    for tokens, text_id in zip(token_lists, text_ids, strict=True):
        ids = [*first, *tokens][:context_size]
        contexts.append(Context(ids, [text_id] * len(ids), [keep_bos] * len(first) + [True] * (len(ids) - len(first))))
    return contexts
