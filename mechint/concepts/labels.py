"""Rows of activations with the concepts of each: from the built-in tales, or from a user's CSV of spans."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechint.concepts.spans import Span, SpanFile, SpanTokens, TokenMap, columns_of, label_tokens
from mechint.data.contexts import Context
from mechint.data.store import Activations
from mechint.data.windows import plan_block, run_block
from mechint.errors import MechintError
from mechint.inside import Inside
from mechint.models.pieces import decoder, token_strings

TALES = "builtin/tales"
TEXTS_AT_ONCE = 256


@dataclass(frozen=True)
class Labelled:
    """Rows with labels; BOS rows and rows of unlabelled texts are not among them.

    Attributes:
        rows: where the vectors are: a store, or a tensor for texts of the user's own.
        indices: the number in `rows` of each labelled row, ascending.
        labels: which row carries which concept; a concept's column holds its children's too.
        parents: every concept, in the order of the columns, with its parent.
        n_spans: spans of each concept that lie over tokens, those of its children included.
        notes: in words, what was left out.
    """

    rows: Activations | Tensor
    indices: Int[np.ndarray, " n"]
    labels: Bool[np.ndarray, "n concepts"]
    text_ids: Int[np.ndarray, " n"]
    tokens: Int[np.ndarray, " n"]
    parents: dict[str, str | None]
    n_spans: list[int]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def concepts(self) -> list[str]:
        return list(self.parents)

    def batches(self, which: Bool[np.ndarray, " n"], batch_size: int) -> Iterator[Float[Tensor, "batch d_in"]]:
        """The vectors of the rows marked in `which`, in order."""
        wanted = torch.from_numpy(self.indices[which])
        for part in wanted.split(batch_size):
            yield self.rows[part].float() if isinstance(self.rows, Tensor) else self.rows.rows(part)

    def halves(self, seed: int) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """(rows to choose on, rows to report on): whole texts, in two random halves. One text alone cannot be split."""
        texts, of_row = np.unique(self.text_ids, return_inverse=True)
        if len(texts) < 2:
            raise MechintError(
                "labels of one text cannot be scored: thresholds are chosen on half of the texts and reported on the"
                " other; label more texts"
            )
        chosen = np.zeros(len(texts), dtype=bool)
        chosen[np.random.default_rng(seed).permutation(len(texts))[: len(texts) // 2]] = True
        return chosen[of_row], ~chosen[of_row]


def label_tales(
    activations: Activations, tokenizer: Any, *, span_tokens: SpanTokens = "any", max_texts: int | None = None
) -> Labelled:
    """Labels for activations that were collected from `builtin/tales`: each text number is a tale's.

    The tales are made again and tokenised; every stored token must be the one that the tale has in its place.

    Raises:
        MechintError: activations of other texts or without tokens, or of tales that this version tells differently.
    """
    from mechint.builtin.concepts import CONCEPTS
    from mechint.builtin.tales import tale

    info = activations.info
    if info.get("dataset_name") != TALES:
        raise MechintError(
            f"{activations.path} was collected from {info.get('dataset_name') or 'unknown texts'}, which has no labels"
            f" of its own (only {TALES} has): give labels with --labels FILE.csv"
        )
    by_text = _rows_by_text(activations, max_texts)
    parents = {concept: kind.parent for concept, kind in CONCEPTS.items()}
    builder = _Builder(
        activations, activations.tokens, by_text, parents, span_tokens, f"{TALES} {info['dataset_split']}"
    )
    max_chars = info.get("max_chars") or None
    numbers = list(by_text)
    for start in range(0, len(numbers), TEXTS_AT_ONCE):
        told = [tale(number, info["dataset_split"], info["seed"]) for number in numbers[start : start + TEXTS_AT_ONCE]]
        texts = [each.text[:max_chars] for each in told]
        encoded = _tokenized(tokenizer, texts)
        for number, each, ids, offsets in zip(
            numbers[start:], told, encoded.input_ids, encoded.offset_mapping, strict=False
        ):
            if not builder.same_tokens(number, ids):
                raise MechintError(
                    f"the tokens of text {number} in {activations.path} are not those of tale {number}: another"
                    " version of the tales or another tokenizer made them; collect again"
                )
            builder.add(number, each.text[:max_chars], offsets, tale_spans(each))
    return builder.finish()


def tale_spans(tale: Any) -> list[Span]:
    """A tale's spans with those that `mechint.builtin.tales.token_labels` derives from where its sentences are."""
    spans = [Span(span.start, span.end, span.concept) for span in tale.spans]
    sentences = [span for span in spans if span.concept == "sentence"]
    spans += [Span(span.start, span.start + 1, "sentence_start") for span in sentences]
    spans += [Span(span.end - 1, span.end, "sentence_end") for span in sentences]
    if sentences:
        spans.append(Span(0, min(span.end for span in sentences), "text_start"))
    return spans


def label_stored(
    activations: Activations, tokenizer: Any, file: SpanFile, *, span_tokens: SpanTokens = "any"
) -> Labelled:
    """A user's labels for texts of a store, named by their numbers. Only the texts that the file names are scored.

    Characters count in the text as it was stored, cut where the collection cut it; `stored_texts` gives it.

    Raises:
        MechintError: a text number that the store does not have, a span that lies over no token.
    """
    by_text = _rows_by_text(activations, None)
    for number in file.texts:
        if number not in by_text:
            raise MechintError(
                f"{file.path} labels text {number}, but {activations.path} has only the texts {min(by_text)} to"
                f" {max(by_text)}{'' if len(by_text) == max(by_text) - min(by_text) + 1 else ', not all of them'}"
            )
    chosen = {number: by_text[number] for number in sorted(int(number) for number in file.texts)}
    builder = _Builder(activations, activations.tokens, chosen, file.parents, span_tokens, str(file.path))
    for number, text, offsets in _decoded(activations, tokenizer, chosen):
        spans = file.texts[number]
        _check_ends(file, spans, text, f"text {number}")
        _check_all_met(file, builder.add(number, text, offsets, spans), text)
    return builder.finish()


def label_texts(
    inside: Inside, file: SpanFile, *, span_tokens: SpanTokens = "any", batch_size: int = 32, progress: bool = False
) -> Labelled:
    """A user's labels on texts of their own, which go through the model now.

    Raises:
        MechintError: a span that lies over no token, or behind the text's end. Spans behind the last token that the
            model reads (`context_size`) are left out, with a note.
    """
    texts = [str(text) for text in file.texts]
    token_lists = inside.tokenize(texts)
    first = inside.first_seen()
    contexts = [
        Context(tokens, [number] * len(tokens), [position >= first for position in range(len(tokens))])
        for number, tokens in enumerate(token_lists)
    ]
    block = plan_block(contexts, batch_size=batch_size, device=inside.model.device)
    found = run_block(inside.model, [inside.hook_name], block, on_batch=_bar(len(texts), progress))
    found.checked_norms(inside.hook_name)
    alone = block.text_ids.numpy()  # each text is one context
    by_text = _group(alone, block.positions.numpy(), alone, {"prepend_bos": inside.prepend_bos}, None)
    rows = found.activations[inside.hook_name]
    builder = _Builder(rows, block.tokens, by_text, file.parents, span_tokens, str(file.path))
    encoded = _tokenized(inside.model.tokenizer, texts)
    late: list[Span] = []
    for number, (text, offsets) in enumerate(zip(texts, encoded.offset_mapping, strict=True)):
        _check_ends(file, file.texts[text], text, f"the text {text[:40]!r}")
        n_read = len(token_lists[number]) - inside.prepend_bos
        read_to = offsets[n_read - 1][1] if 0 < n_read < len(offsets) else len(text)
        spans = [span for span in file.texts[text] if span.start < read_to]
        late += [span for span in file.texts[text] if span.start >= read_to]
        _check_all_met(file, builder.add(number, text, offsets[:n_read], spans), text)
    if late:
        builder.notes.append(
            f"{len(late)} spans lie behind the last token that the model reads and were left out (first: line"
            f" {late[0].line})"
        )
    return builder.finish()


def stored_texts(activations: Activations, tokenizer: Any, max_texts: int | None = None) -> dict[int, str]:
    """Each text of a store, by its number, as labels by `text_id` count its characters."""
    return {number: text for number, text, _ in _decoded(activations, tokenizer, _rows_by_text(activations, max_texts))}


def _tokenized(tokenizer: Any, texts: Sequence[str]) -> Any:
    """Token ids of each text, without special ones, and the characters that each token covers."""
    if not getattr(tokenizer, "is_fast", False):
        raise MechintError(
            f"{type(tokenizer).__name__} does not say which characters a token covers, so labels cannot be laid over"
            " its tokens: use a model with a fast tokenizer (tokenizer.json)"
        )
    return tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)


def _bar(n_texts: int, progress: bool) -> Any:
    from tqdm import tqdm

    bar = tqdm(total=n_texts, desc="labelled texts", unit="text", disable=not progress, leave=False)
    return lambda texts, tokens: bar.update(texts)


def _check_ends(file: SpanFile, spans: Sequence[Span], text: str, name: str) -> None:
    for span in spans:
        if span.end > len(text):
            raise MechintError(
                f"{file.path}, line {span.line}: the span ends at character {span.end}, but {name} has {len(text)}"
            )


def _check_all_met(file: SpanFile, missed: Sequence[Span], text: str) -> None:
    if missed:
        span = missed[0]
        raise MechintError(
            f"{file.path}, line {span.line}: {text[span.start : span.end]!r} ({span.concept}) matches no token; the"
            " text is cut before it, or it is white space only"
        )


class TextRows(NamedTuple):
    """The rows of a text but for BOS and separators, and which of the text's tokens each is of."""

    rows: Int[np.ndarray, " n"]
    index: Int[np.ndarray, " n"]


def _rows_by_text(activations: Activations, max_texts: int | None) -> dict[int, TextRows]:
    text_ids, positions, contexts = activations.text_ids, activations.positions, activations.context_ids
    if text_ids is None or positions is None or contexts is None or activations.tokens is None:
        raise MechintError(
            f"{activations.path} was stored without its tokens, so labels cannot be laid over its rows: collect again"
        )
    return _group(text_ids.numpy(), positions.numpy(), contexts.numpy(), activations.info, max_texts)


def _group(
    text_ids: np.ndarray, positions: np.ndarray, contexts: np.ndarray, info: Mapping[str, Any], max_texts: int | None
) -> dict[int, TextRows]:
    """The first `max_texts` texts by number. Rows of one text may lie in several contexts, one after another."""
    order = np.argsort(text_ids, kind="stable")
    numbers, starts = np.unique(text_ids[order], return_index=True)
    pieces = np.split(order, starts[1:])[:max_texts]
    found = {}
    for number, rows in zip(numbers.tolist(), pieces, strict=False):
        windows = np.split(positions[rows].astype(np.int64), np.diff(contexts[rows]).nonzero()[0] + 1)
        index = _token_index(windows, info)
        found[number] = TextRows(rows[index >= 0], index[index >= 0])
    return found


def _token_index(windows: Sequence[np.ndarray], info: Mapping[str, Any]) -> np.ndarray:
    """Which of its text's tokens each row is of, from the positions in each window of the text; -1 for BOS."""
    found, before = [], 0
    for number, positions in enumerate(windows):
        begun = number == 0 or bool(info.get("bos_every_window", True))
        if info.get("pack"):  # the text begins where its first row is, behind a separator that may have a row
            opened = bool(info.get("keep_bos")) and (number == 0 or (begun and bool(info.get("prepend_bos"))))
            first = int(positions[0]) + int(opened)
        else:
            first = int(begun and bool(info.get("prepend_bos")))
        index = positions - first
        found.append(np.where(index < 0, -1, index + before))
        before += max(int(index[-1]) + 1, 0)
    return np.concatenate(found)


def _decoded(
    activations: Activations, tokenizer: Any, by_text: dict[int, TextRows]
) -> Iterator[tuple[int, str, list[tuple[int, int]]]]:
    """(number, text, character range of each token) from stored tokens; rows missing in between end the text."""
    assert activations.tokens is not None
    tokens = activations.tokens.numpy()
    for number, (rows, index) in by_text.items():
        whole = index == np.arange(len(rows))
        ids = tokens[rows][: len(rows) if whole.all() else int(whole.argmin())].tolist()
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        again = _tokenized(tokenizer, [text])
        if again.input_ids[0] == ids:
            yield number, text, [tuple(pair) for pair in again.offset_mapping[0]]
            continue
        # Text that is tokenised otherwise when read again (cut inside a word, say): token by token.
        ends = np.cumsum([len(piece) for piece in token_strings(decoder(tokenizer), ids)])
        ends = np.minimum(ends - (ends[-1] - len(text) if len(ends) else 0), len(text)).clip(0).tolist()
        yield number, text, list(zip([0, *ends[:-1]], ends, strict=True))


class _Builder:
    """Collects the labels of text after text into one matrix."""

    def __init__(
        self,
        rows: Activations | Tensor,
        tokens: Int[Tensor, " n"] | None,
        by_text: dict[int, TextRows],
        parents: dict[str, str | None],
        span_tokens: SpanTokens,
        source: str,
    ):
        assert tokens is not None  # else there were no rows by text
        self.rows, self.tokens, self.by_text, self.parents = rows, tokens.numpy(), by_text, dict(parents)
        self.span_tokens: SpanTokens = span_tokens
        self.source = source
        self.places = columns_of(parents)
        self.n_spans = [0] * len(parents)
        self.notes: list[str] = []
        self.found: list[tuple[np.ndarray, np.ndarray, int]] = []

    def same_tokens(self, number: int, ids: Sequence[int]) -> bool:
        rows, index = self.by_text[number]
        return not len(index) or (index.max() < len(ids) and bool((np.asarray(ids)[index] == self.tokens[rows]).all()))

    def add(self, number: int, text: str, offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[Span]:
        """Label the rows of a text. Returns the spans that lie over no token."""
        rows, index = self.by_text[number]
        table = np.zeros((len(offsets), len(self.parents)), dtype=bool)
        missed = label_tokens(TokenMap(text, offsets), spans, self.places, table, self.span_tokens)
        left_out = set(missed)
        for span in spans:
            if span not in left_out:
                for place in self.places[span.concept]:
                    self.n_spans[place] += 1
        keep = index < len(offsets)
        self.found.append((rows[keep], table[index[keep]], number))
        return missed

    def finish(self) -> Labelled:
        indices = np.concatenate([rows for rows, _, _ in self.found])
        labels = np.concatenate([table for _, table, _ in self.found])
        text_ids = np.concatenate([np.full(len(rows), number) for rows, _, number in self.found])
        order = np.argsort(indices, kind="stable")
        return Labelled(
            self.rows,
            indices[order],
            labels[order],
            text_ids[order],
            self.tokens[indices[order]],
            self.parents,
            self.n_spans,
            self.source,
            tuple(self.notes),
        )


def write_texts(path: Path, texts: dict[int, str], *, overwrite: bool = False) -> None:
    """A CSV of `text_id,text`, from which labels by `text_id` can be made."""
    import csv
    import io

    from mechint.provenance import write_text

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["text_id", "text"])
    writer.writerows(texts.items())
    write_text(path, out.getvalue(), overwrite=overwrite)
