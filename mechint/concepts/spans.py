"""From spans of characters to labels of tokens: which tokens count, which concepts hold others, a user's own CSV."""

import csv
import io
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool

from mechint.errors import MechintError, one_line

SpanTokens = Literal["any", "first", "last"]
# Characters of the longest text that a CSV may hold; the default of 131,072 is less than a book.
MAX_FIELD = 2**27


class Span(NamedTuple):
    """Characters `start` to `end` (exclusive) of a text carry `concept`; `line` of a file says so."""

    start: int
    end: int
    concept: str
    line: int | None = None


@dataclass
class SpanFile:
    """A user's labels. `texts` holds the spans of each text, by its number in the store or by its own words.

    A text with no span is one that was looked at and has no concept: its tokens count as negatives.
    """

    path: Path
    by: Literal["text_id", "text"]
    texts: dict[int | str, list[Span]] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)  # every concept, in the order of first mention


def read_span_file(path: str | Path) -> SpanFile:
    """Read a CSV with the columns `text_id` or `text`, `start`, `end`, `concept` and, if wanted, `parent`.

    `start` and `end` count characters from 0, `end` is exclusive. A row whose start, end and concept are empty says
    that its text has none.

    Raises:
        MechintError: a missing file or column, a row that cannot be read (with its line), a concept with two parents,
            parents in a circle, no span at all.
    """
    path = Path(path)
    csv.field_size_limit(MAX_FIELD)
    reader = csv.DictReader(io.StringIO(_read(path), newline=""), strict=True)
    try:
        columns = [name.strip() for name in reader.fieldnames or []]
    except csv.Error as error:
        raise MechintError(f"{path}, line 1: {error}") from error
    reader.fieldnames = columns
    by: Literal["text_id", "text"] = "text_id" if "text_id" in columns else "text"
    if by not in columns or not {"start", "end", "concept"} <= set(columns) or {"text", "text_id"} <= set(columns):
        raise MechintError(
            f"{path}: the first line should name the columns text_id,start,end,concept (texts of the activations) or"
            f" text,start,end,concept (texts of your own), and parent if wanted; it names {one_line(','.join(columns))}"
        )
    file = SpanFile(path, by)
    for cells in _rows(reader, path):
        line = reader.line_num
        if None in cells or None in cells.values():
            raise MechintError(f"{path}, line {line}: {_count(cells)} values under {len(columns)} columns")
        _add_row(file, {name: cell for name, cell in cells.items()}, line)
    if not file.parents:
        raise MechintError(f"{path} holds no label: each line is one span, such as 0,4,9,animal under {by},start,...")
    _check_parents(file)
    return file


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MechintError(f"labels not found: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MechintError(f"labels {path} cannot be read: {error}") from error


def _rows(reader: csv.DictReader, path: Path) -> Iterator[dict]:
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise MechintError(f"{path}, line {reader.reader.line_num}: {error}") from error
        yield cells


def _count(cells: Mapping[str | None, object]) -> int:
    extra = cells.get(None)
    return sum(value is not None for key, value in cells.items() if key) + (
        len(extra) if isinstance(extra, list) else 0
    )


def _add_row(file: SpanFile, cells: dict[str, str], line: int) -> None:
    where = f"{file.path}, line {line}"
    text: int | str = cells[file.by]
    if file.by == "text_id":
        text = _number(cells["text_id"], "text_id", where)
    elif not cells["text"].strip():
        raise MechintError(f"{where}: the text is empty")
    spans = file.texts.setdefault(text, [])
    concept = cells["concept"].strip()
    if not concept and not cells["start"].strip() and not cells["end"].strip():
        return
    if not concept:
        raise MechintError(f"{where}: the concept has no name")
    start, end = _number(cells["start"], "start", where), _number(cells["end"], "end", where)
    if end <= start:
        raise MechintError(f"{where}: a span from {start} to {end} is empty; end is the character after the last one")
    parent = (cells.get("parent") or "").strip() or None
    known = file.parents.setdefault(concept, parent)
    if parent is not None and known not in (None, parent):
        raise MechintError(f"{where}: concept {concept!r} has parent {parent!r} here and {known!r} before")
    file.parents[concept] = known or parent
    spans.append(Span(start, end, concept, line))


def _number(cell: str, name: str, where: str) -> int:
    try:
        value = int(cell)
    except ValueError:
        raise MechintError(f"{where}: {name} should be a whole number, found {cell.strip()!r}") from None
    if value < 0:
        raise MechintError(f"{where}: {name} should not be negative, found {value}")
    return value


def _check_parents(file: SpanFile) -> None:
    for parent in list(file.parents.values()):
        if parent is not None:
            file.parents.setdefault(parent, None)  # holds what its children hold
    for concept in file.parents:
        seen = [concept]
        while (above := file.parents[seen[-1]]) is not None:
            if above in seen:
                raise MechintError(f"{file.path}: the parents {' -> '.join([*seen, above])} go round in a circle")
            seen.append(above)


class TokenMap:
    """Which tokens of a text lie under which characters, from the tokenizer's character ranges.

    A token's white space in front does not count (" cat" covers "cat"), so that a span ending before a blank does not
    reach the next word. Tokens that are empty then (BOS, a blank alone) lie under nothing.
    """

    def __init__(self, text: str, offsets: Sequence[tuple[int, int]]):
        self.tokens: list[int] = []
        self.starts: list[int] = []
        self.ends: list[int] = []
        for index, (start, end) in enumerate(offsets):
            while start < end and text[start].isspace():
                start += 1
            if start < end:
                self.tokens.append(index)
                self.starts.append(start)
                self.ends.append(end)

    def under(self, start: int, end: int) -> list[int]:
        """Tokens, in order, that share a character with `start` to `end`. Byte pieces of one character all do."""
        return self.tokens[bisect_right(self.ends, start) : bisect_left(self.starts, end)]


def label_tokens(
    token_map: TokenMap,
    spans: Sequence[Span],
    places: Mapping[str, Sequence[int]],
    labels: Bool[np.ndarray, "tokens concepts"],
    span_tokens: SpanTokens = "any",
) -> list[Span]:
    """Mark the tokens of each span in `labels`, in place. Returns the spans that lie over no token.

    Args:
        places: the columns of a span's concept: its own and those of all its parents.
        span_tokens: of the tokens that a span overlaps, which ones carry the label: any of them (all), or only the
            first or last.
    """
    missed = []
    for span in spans:
        tokens = token_map.under(span.start, span.end)
        if not tokens:
            missed.append(span)
            continue
        if span_tokens == "first":
            tokens = tokens[:1]
        elif span_tokens == "last":
            tokens = tokens[-1:]
        for place in places[span.concept]:
            labels[tokens[0] : tokens[-1] + 1, place] = True
    return missed


def columns_of(parents: Mapping[str, str | None]) -> dict[str, list[int]]:
    """Columns of each concept in the label matrix: its own first, then those of its parent and so on upwards."""
    place = {concept: index for index, concept in enumerate(parents)}
    found: dict[str, list[int]] = {}
    for concept in parents:
        found[concept] = []
        above: str | None = concept
        while above is not None:
            found[concept].append(place[above])
            above = parents[above]
    return found
