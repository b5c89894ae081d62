"""Texts as a model reads them, and which of their positions the SAE may touch."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechint.data.store import Activations
from mechint.errors import MechintError


class Text(NamedTuple):
    """One text as the model reads it."""

    tokens: list[int]
    seen: list[bool]  # positions whose activation the SAE was trained on; only those are replaced


def texts_from_rows(
    activations: Activations, indices: Int[Tensor, " rows"] | None = None, *, max_texts: int | None = None
) -> list[Text]:
    """What the model read where the rows `indices` (all if None) are from, put together from the stored tokens.

    Each context becomes one `Text`: a text that was longer than the context size gives several, and one of a packed
    store holds several texts. They come in the order of the rows, the first `max_texts` of them; a packed context is
    taken whole if any of its rows is asked for. A BOS or separator that was left out of the store is put back, unseen.
    Where rows are missing from the store, the context ends before the gap.

    Raises:
        MechintError: the activations were stored without tokens, or no context has two tokens.
    """
    tokens, text_ids, positions = activations.tokens, activations.text_ids, activations.positions
    if tokens is None or text_ids is None or positions is None:
        raise MechintError(
            f"{activations.path} was stored without its tokens: give texts with --eval-texts-path, or collect again"
        )
    context = activations.context_ids
    assert context is not None
    wanted = torch.unique(context if indices is None else context[indices])
    rows = torch.isin(context, wanted[:max_texts]).nonzero().flatten()
    bos = activations.info.get("bos_token_id") if activations.info.get("prepend_bos") else None
    separator = activations.info.get("separator_token_id") if activations.info.get("pack") else None
    _, counts = context[rows].unique_consecutive(return_counts=True)
    pieces = zip(*(column[rows].split(counts.tolist()) for column in (positions, tokens, text_ids)), strict=True)
    texts = [
        _rebuild(*(column.tolist() for column in piece), bos=separator if bos is None else bos, separator=separator)
        for piece in pieces
    ]
    texts = [text for text in texts if len(text.tokens) > 1]
    if not texts:
        raise MechintError(f"no text of {activations.path} has two tokens, so there is nothing to predict")
    return texts


def _rebuild(
    positions: list[int], tokens: list[int], text_ids: list[int], *, bos: int | None, separator: int | None
) -> Text:
    """One context from its rows. Only a packed one has a `separator`."""
    first = [bos] if positions[0] == 1 and bos is not None else []
    text = Text(first, [False] * len(first))
    before = text_ids[0]
    for position, token, text_id in zip(positions, tokens, text_ids, strict=True):
        if separator is not None and text_id != before and position == len(text.tokens) + 1:
            text.tokens.append(separator)
            text.seen.append(False)
        if position != len(text.tokens):
            break
        text.tokens.append(token)
        text.seen.append(True)
        before = text_id
    return text


def texts_from_tokens(token_lists: Sequence[Sequence[int]], *, prepend_bos: bool, keep_bos: bool) -> list[Text]:
    """Tokenised texts, BOS included if prepended, with position 0 unseen if the SAE was trained without BOS rows.

    Raises:
        MechintError: no text has two tokens.
    """
    texts = []
    for tokens in token_lists:
        if len(tokens) > 1:
            texts.append(Text(list(tokens), [keep_bos or not prepend_bos] + [True] * (len(tokens) - 1)))
    if not texts:
        raise MechintError("no evaluation text has two tokens, so there is nothing to predict: give longer texts")
    return texts


class Batch(NamedTuple):
    """Texts padded on the right to one length; `numbers` are their places in the list."""

    numbers: list[int]
    tokens: Int[Tensor, "batch pos"]
    seen: Bool[Tensor, "batch pos"]
    lengths: Int[Tensor, " batch"]

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """Where there is a token, not padding."""
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None]

    @property
    def predicts(self) -> Bool[Tensor, "batch pos"]:
        """Where a prediction can be checked: at positions 0 .. length - 2, of the tokens one further on."""
        return torch.arange(self.tokens.shape[1]) < (self.lengths - 1)[:, None]


def batches(
    texts: Sequence[Text], batch_size: int, max_tokens: int, *, progress: bool = False, what: str = ""
) -> Iterator[Batch]:
    """Texts of like length together, at most `batch_size` and, padding included, `max_tokens` (but one text always)."""
    groups: list[list[int]] = []
    for number in sorted(range(len(texts)), key=lambda number: len(texts[number].tokens)):
        length = len(texts[number].tokens)
        if not groups or len(groups[-1]) == batch_size or (len(groups[-1]) + 1) * length > max_tokens:
            groups.append([])
        groups[-1].append(number)
    if progress:
        from tqdm import tqdm

        groups = tqdm(groups, desc=what, unit="batch", leave=False)  # type: ignore[assignment]
    for group in groups:
        batch = [texts[number] for number in group]
        lengths = torch.tensor([len(text.tokens) for text in batch])
        longest = int(lengths.max())
        # Attention is causal, so what stands in the padding changes nothing before it; 0 is a token of every model.
        tokens = torch.tensor([text.tokens + [0] * (longest - len(text.tokens)) for text in batch])
        seen = torch.tensor([text.seen + [False] * (longest - len(text.seen)) for text in batch])
        yield Batch(group, tokens, seen, lengths)
