"""A seeded stream of short English tales in which every word is labelled with the concepts behind it.

``tale(i, split, seed)`` is a pure function, so that a reader can resume at any text. A sentence belongs to the train or
the held-out split by a hash of its own words: no sentence, hence no template with the same fill, is in both. The facts
are stated in several ways, so that a held-out sentence can be predicted from other statements of its fact.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, no_type_check

from mechint.builtin import story
from mechint.builtin.concepts import CONCEPTS, DERIVED, Concept
from mechint.builtin.templates import GROUPS, PLANS

__all__ = ["CONCEPTS", "Concept", "Span", "Split", "Tale", "iter_tales", "sentence_split", "source_hash", "tale",
           "token_labels"]  # fmt: skip

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 0.10
MIN_WORDS, MAX_WORDS = 38, 92
_TRIES = 400  # fills tried before a tale ends without one more sentence
_SOURCES = ("world.py", "lexicon.py", "concepts.py", "facts.py", "story.py", "templates.py", "tales.py")
_QUOTED = re.compile(r'"[^"]*"')
_SENTENCE_END = re.compile(r'[.?!]"?(?= |$)')


@dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``end`` (exclusive) of the text carry ``concept``."""

    start: int
    end: int
    concept: str


@dataclass(frozen=True)
class Tale:
    text: str
    spans: tuple[Span, ...]


@cache
def source_hash() -> str:
    """sha256 of the generator's source, to record with anything made from its text."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(name.encode() + b"\0" + Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


@no_type_check
def sentence_split(text: str) -> Split:
    """The split that a rendered template belongs to, from a stable hash of its text."""
    value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
    return "heldout" if value < HELDOUT_SHARE * 2**64 else "train"


def iter_tales(split: Split = "train", seed: int = 0, start: int = 0) -> Iterator[Tale]:
    """Endless tales number ``start``, ``start + 1``, ... of a split."""
    index = start
    while True:
        yield tale(index, split, seed)
        index += 1


def tale(index: int, split: Split = "train", seed: int = 0) -> Tale:
    """Tale number ``index`` of ``split``: 40 to 120 words and marks, several sentences about the same things."""
    sentences = units(index, split, seed)
    text = " ".join(rendered.text for rendered in sentences)
    spans: list[Span] = []
    offset = 0
    for rendered in sentences:
        spans += [Span(offset + start, offset + end, concept) for start, end, concept in rendered.spans]
        offset += len(rendered.text) + 1
    spans += _structure(text, spans)
    return Tale(text, tuple(sorted(set(spans), key=lambda span: (span.start, span.end, span.concept))))


def units(index: int, split: Split, seed: int) -> list[story.Rendered]:
    """The rendered templates of a tale, each wholly in ``split``."""
    key = hashlib.blake2b(f"{split}/{seed}/{index}".encode(), digest_size=8).digest()
    rng = random.Random(int.from_bytes(key))
    _, opening, weights = rng.choices(PLANS, [plan[0] for plan in PLANS])[0]
    length = rng.randint(MIN_WORDS, MAX_WORDS)
    state = story.State({}, "", ())
    sentences: list[story.Rendered] = []
    used: set[str] = set()
    words = 0
    while words < length:
        groups = {opening: 1.0} if not sentences else weights
        rendered = _sentence(rng, groups, state, used, split)
        if rendered is None:
            break
        count = len(rendered.text.split())
        if sentences and words + count > MAX_WORDS:
            break
        words += count
        state = rendered.state
        sentences.append(rendered)
    return sentences


@no_type_check
def _sentence(
    rng: random.Random, groups: Mapping[str, float | int], state: story.State, used: set[str], split: Split
) -> story.Rendered | None:
    fitting = {
        name: [t for t in GROUPS[name] if t not in used and all(story.said(state, f) for f in story.parse(t)[0])]
        for name in groups
    }
    names = [name for name in groups if fitting[name]]
    weights = [groups[name] for name in names]
    for _ in range(_TRIES if names else 0):
        template = rng.choice(fitting[rng.choices(names, weights)[0]])
        rendered = story.render(rng, template, state)
        if sentence_split(rendered.text) == split:
            used.add(template)
            return rendered
    return None


@no_type_check
def _structure(text: str, spans: Sequence[Span]) -> list[Span]:
    """Spans that follow from the text as a whole: sentences, quotations, questions, openings, repetitions."""
    found: list[Span] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        if text[match.end() - 1] == '"' and text[match.end() + 1 : match.end() + 2].islower():
            continue  # a question in a quotation, and the sentence goes on: "Why?" asked Anna.
        end = match.end()
        found.append(Span(start, end, "sentence"))
        if text[end - 1] == "?":
            found.append(Span(start, end, "question"))
        start = end + 1
    for match in _QUOTED.finditer(text):
        found.append(Span(match.start(), match.end(), "quotation"))
        if match.group().endswith('?"'):
            found.append(Span(match.start(), match.end(), "question"))
    for span in spans:
        words = text[span.start : span.end]
        if span.concept == "relative_clause":
            found.append(Span(span.start, span.start + len(words.split(" ")[0]), "relative_pronoun"))
        elif CONCEPTS[span.concept].parent == "name" and re.search(rf"\b{words}\b", text[: span.start]):
            found.append(Span(span.start, span.end, "repeated_name"))
    return found


@no_type_check
def token_labels(tale: Tale, offsets: Sequence[tuple[int, int]]) -> dict[str, list[bool]]:
    """Which tokens carry which concept, for every concept that occurs in the tale or is derived from position.

    ``offsets`` are the tokenizer's character ranges, one a token; an empty range (BOS) carries nothing. A token carries
    a concept when its characters, a leading space aside, overlap a span of the concept or of one of its children.
    """
    trimmed = [(start + (tale.text[start : start + 1] == " "), end) for start, end in offsets]
    labels: dict[str, list[bool]] = {}

    def mark(concept: str, index: int) -> None:
        labels.setdefault(concept, [False] * len(trimmed))[index] = True

    starts = {span.start for span in tale.spans if span.concept == "sentence"}
    ends = {span.end for span in tale.spans if span.concept == "sentence"}
    first_end = min(ends, default=0)
    for index, (start, end) in enumerate(trimmed):
        if end <= start:
            continue
        for span in tale.spans:
            if start < span.end and span.start < end:
                concept: str | None = span.concept
                while concept:
                    mark(concept, index)
                    concept = CONCEPTS[concept].parent
        for concept, holds in (
            ("sentence_start", start in starts), ("sentence_end", end in ends), ("text_start", end <= first_end),
        ):  # fmt: skip
            if holds:
                mark(concept, index)
    for concept in DERIVED:
        labels.setdefault(concept, [False] * len(trimmed))
    return labels
