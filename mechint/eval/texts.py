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
    """The texts that the rows `indices` (all if None) are from, put together again from the stored tokens.

    Texts come in the order of their ids, the first `max_texts` of them. A BOS that was prepended for the model but left
    out of the store is prepended again. Where rows of a text are missing from the store, the text ends before the gap.

    Raises:
        MechintError: the activations were stored without tokens, or no text has two tokens.
    """
    tokens, text_ids, positions = activations.tokens, activations.text_ids, activations.positions
    if tokens is None or text_ids is None or positions is None:
        raise MechintError(
            f"{activations.path} was stored without its tokens: give texts with --eval-texts-path, or collect again"
        )
    wanted = torch.unique(text_ids if indices is None else text_ids[indices])
    rows = torch.isin(text_ids, wanted[:max_texts]).nonzero().flatten()
    bos = activations.info.get("bos_token_id") if activations.info.get("prepend_bos") else None
    groups: dict[int, list[tuple[int, int]]] = {}
    for text, position, token in zip(
        text_ids[rows].tolist(), positions[rows].tolist(), tokens[rows].tolist(), strict=True
    ):
        groups.setdefault(text, []).append((position, token))
    texts = [_rebuild(sorted(groups[text]), bos) for text in sorted(groups)]
    texts = [text for text in texts if len(text.tokens) > 1]
    if not texts:
        raise MechintError(f"no text of {activations.path} has two tokens, so there is nothing to predict")
    return texts


def _rebuild(row: list[tuple[int, int]], bos: int | None) -> Text:
    tokens: list[int] = []
    seen: list[bool] = []
    if row[0][0] == 1 and bos is not None:
        tokens, seen = [bos], [False]
    for position, token in row:
        if position != len(tokens):
            break
        tokens.append(token)
        seen.append(True)
    return Text(tokens, seen)


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
