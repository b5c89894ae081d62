"""Renders a sentence template: fills its slots from the state of the tale and keeps the concept of every word.

A template is plain English with slots in braces.

- ``{A.city}``: an attribute of an entity. An entity whose name starts with a capital lives as long as the tale, so
  later sentences repeat what earlier ones said; one in lower case lives for the sentence. Digits tell apart two
  entities of one kind (``{animal1} ... {animal2}``).
- ``{fruit1|a}``, ``{tool|pl}``, ``{tool|n1}``: a noun with an article, in the plural, or in a number drawn once for
  the sentence; ``{chase/n1}`` makes a verb agree with it, however far away it stands. ``{room1|at}`` is "in the
  cellar".
- ``{walk/past}``, ``{act.v/when}``: a verb in a form, or in the tense of the time expression ``{when}``.
- ``<...>`` marks a relative clause, ``^`` a capital, ``a~`` the article that fits the next word, and
  ``A.pet :: text`` a template that may be used only when the tale has said ``A.pet``.

The functions here run a hundred times a tale, so they opt out of the type checks that the tests switch on
(``no_type_check``), which would make every test that needs text fifty times slower.
"""

import random
import re
from functools import cache
from typing import NamedTuple, no_type_check

from mechint.builtin import lexicon, world
from mechint.builtin.concepts import LITERAL, WORD
from mechint.builtin.facts import FACT_KINDS, Entity, person_facts, pick

Piece = tuple[str, tuple[str, ...]]  # text, concepts
_PRONOUNS = {"he": ("she", "he"), "him": ("her", "him"), "his": ("her", "his"), "self": ("herself", "himself")}
_WORD_KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "adj": (lexicon.THING_ADJECTIVES, "adjective"),
    "size": (lexicon.SIZES, "size"),
    "colour": (lexicon.COLOURS, "colour"),
    "material": (lexicon.MATERIALS, "material"),
    "comp": (lexicon.COMPARATIVES, "comparative"),
    "super": (lexicon.SUPERLATIVES, "superlative"),
    "trait": (lexicon.PERSON_ADJECTIVES, "trait"),
    "good": (lexicon.GOOD_FEELINGS, "good_emotion"),
    "bad": (lexicon.BAD_FEELINGS, "bad_emotion"),
    "manner": (lexicon.MANNER, "manner"),
    "degree": (lexicon.DEGREE, "degree"),
    "freq": (lexicon.FREQUENCY, "frequency"),
    "weather": (lexicon.WEATHER, "weather"),
    "prep": (lexicon.PREPOSITIONS, "preposition"),
    "num": (world.NUMBERS[2:13], "number"),
    "tens": (world.TENS, "number"),
    "ordinal": (world.ORDINALS, "ordinal"),
    "interj": (lexicon.INTERJECTIONS, "interjection"),
}
_VERB_KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "motion": (lexicon.MOTION, "motion_verb"),
    "resting": (lexicon.RESTING, "verb"),
    "giving": (lexicon.GIVING, "verb"),
    "saying": (lexicon.SAYING, "speech_verb"),
    "thinking": (lexicon.THINKING, "thought_verb"),
    "liking": (lexicon.LIKING, "verb"),
}
_TENSE_CONCEPT = {"past": "past_tense", "s": "present_tense", "base": "infinitive", "ing": "progressive",
                  "pp": "participle", "fut": "future_tense", "pres": "present_tense"}  # fmt: skip
_ARTICLE = "a~"
_SLOT = re.compile(r"\{([^}]*)\}")
_PEOPLE = {"a", "b", "p", "q"}


class State(NamedTuple):
    """What a tale has said so far. ``last`` is the person mentioned last, ``seen`` every person mentioned."""

    entities: dict[str, Entity]
    last: str
    seen: tuple[str, ...]

    def copy(self) -> "State":
        return State({key: dict(value) for key, value in self.entities.items()}, self.last, self.seen)


class Rendered(NamedTuple):
    text: str
    spans: list[tuple[int, int, str]]
    state: State


@cache
def parse(template: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Split a template into the facts it needs and its parts, each ``("text", ...)`` or ``("slot", ...)``."""
    needs, _, body = template.rpartition(" :: ")
    parts: list[tuple[str, str]] = []
    for index, part in enumerate(_SLOT.split(body)):
        if part:
            parts.append(("slot" if index % 2 else "text", part))
    return tuple(needs.split()), tuple(parts)


@no_type_check
class _Filler:
    """Fills the slots of one sentence; holds the tale's state, changed only in this copy."""

    def __init__(self, rng: random.Random, state: State):
        self.rng = rng
        self.entities = state.copy().entities
        self.last = state.last
        self.seen = list(state.seen)

    def fill(self, slot: str) -> list[Piece]:
        path, *forms = slot.split("/")
        path, *mods = path.split("|")
        key, _, attribute = path.partition(".")
        kind = key.rstrip("0123456789").lower()
        if forms:
            return self.verb(key, kind, attribute, forms)
        if kind in _PEOPLE:
            return self.person(key, attribute or "name", mods)
        entity = self.entities.setdefault(key, {})
        if kind in FACT_KINDS:
            if not entity:
                entity.update(FACT_KINDS[kind](self.rng))
            word, concept = entity[attribute]  # type: ignore[misc]
            return self.noun(str(word), str(concept), mods)
        if "word" not in entity:
            entity["word"] = self.draw(kind, countable="pl" in mods)
        word, concept = entity["word"]  # type: ignore[misc]
        return self.noun(word, concept, mods) if concept not in _NOT_NOUNS else _with_article(word, concept, mods)

    def draw(self, kind: str, countable: bool) -> tuple[str, str]:
        """A word of a kind that is not already used in this tale by an entity of the same kind, with its concept."""
        if kind in _WORD_KINDS:
            words, concept = _WORD_KINDS[kind]
        elif kind in _VERB_KINDS:
            words, concept = _VERB_KINDS[kind]
        else:
            concept = str(self.rng.choice(lexicon.NOUN_UNIONS.get(kind, (kind,))))
            words = lexicon.NOUN_CLASSES[concept]
        taken = {entity["word"][0] for entity in self.entities.values() if "word" in entity}  # type: ignore[index]
        while True:
            word = str(pick(self.rng, words))
            if word not in taken and not (countable and word.endswith("~")):
                return word, concept

    def noun(self, word: str, concept: str, mods: list[str]) -> list[Piece]:
        mass = word.endswith("~")
        word = word.rstrip("~")
        many = any(mod == "pl" or (mod[0] == "n" and self.number(mod) == "pl") for mod in mods)
        concepts: tuple[str, ...] = (concept,)
        if many and not mass:
            word, concepts = lexicon.plural(word), (concept, "plural")
        if "at" in mods:
            preposition = "on" if word in lexicon.ON_PLACES else "in"
            return [(preposition, ("preposition",)), (" ", ()), ("the", ("determiner",)), (" ", ()), (word, concepts)]
        if "a" in mods:
            if mass or many:
                return [("some", ("determiner",)), (" ", ()), (word, concepts)]
            return _with_article(word, concept, mods)
        return [(word, concepts)]

    def number(self, name: str) -> str:
        entity = self.entities.setdefault(name, {})
        return str(entity.setdefault("number", self.rng.choice(("sg", "pl"))))

    def verb(self, key: str, kind: str, attribute: str, forms: list[str]) -> list[Piece]:
        concept = "verb"
        if attribute:
            lemma = str(self.fill(f"{key}.{attribute}")[0][0])
        elif kind in _VERB_KINDS:
            lemma = str(self.fill(key)[0][0])
            concept = _VERB_KINDS[kind][1]
        else:
            lemma = key
        form, plural_subject = forms[0], False
        for name in forms:
            if name.rstrip("0123456789") == "n":
                plural_subject = self.number(name) == "pl"
                form = "pres" if form == name else form
            elif name.rstrip("0123456789").lower() == "when":
                self.fill(f"{name}.phrase")
                form = str(self.entities[name]["tense"])
        if form == "pres":
            form, tense = ("base" if plural_subject else "s"), "present_tense"
        else:
            tense = _TENSE_CONCEPT[form]
        concepts = (tense, concept) if concept != "verb" else (tense,)
        if form == "fut":
            return [("will " + lemma, concepts)]
        if lemma == "be" and plural_subject:
            return [("were" if form == "past" else "are", concepts)]
        return [(lexicon.verb_form(lemma, form), concepts)]

    def person(self, key: str, attribute: str, mods: list[str]) -> list[Piece]:
        entity = self.entities.setdefault(key, {})
        if "name" not in entity:
            gender = int(self.rng.random() < 0.5)
            taken = {other.get("name") for other in self.entities.values()}
            while "name" not in entity:
                name = pick(self.rng, (world.FEMALE_NAMES, world.MALE_NAMES)[gender])
                if name not in taken:
                    entity["name"], entity["gender"] = name, gender
        gender = int(entity["gender"])  # type: ignore[call-overload]
        sex = ("female_name", "male_name")[gender]
        if attribute in ("ref", "refs", "name"):
            alone = all(self.entities[other]["gender"] != gender for other in self.seen if other != key)
            pronoun = attribute != "name" and key in self.seen and (alone or self.last == key)
            pronoun = pronoun and self.rng.random() < 0.65
            self.last = key
            if key not in self.seen:
                self.seen.append(key)
            if pronoun:
                return [(_PRONOUNS["his" if attribute == "refs" else "he"][gender], (sex[:-4] + "pronoun",))]
            piece: Piece = (str(entity["name"]), (sex,))
            return [piece, ("'s", ("possessive",))] if attribute == "refs" else [piece]
        if attribute in _PRONOUNS:
            return [(_PRONOUNS[attribute][gender], (sex[:-4] + "pronoun",))]
        if attribute not in entity:
            entity.update(person_facts(self.rng, attribute, self.entities))
        word, concept = entity[attribute]  # type: ignore[misc]
        return self.noun(word, concept, mods)


@no_type_check
def _with_article(word: str, concept: str, mods: list[str]) -> list[Piece]:
    if "a" in mods:
        return [(lexicon.article(word), ("determiner",)), (" ", ()), (word, (concept,))]
    return [(word, (concept,))]


_NOT_NOUNS = {concept for _, concept in (*_WORD_KINDS.values(), *_VERB_KINDS.values())}


def _literal(text: str) -> list[Piece]:
    """Cut plain template text at the words that carry a concept of their own."""
    pieces: list[Piece] = []
    end = 0
    for match in WORD.finditer(text):
        concept = LITERAL.get(match.group().lower())
        if text[match.end() : match.end() + 1] == "~":
            pieces += [(text[end : match.start()], ()), (_ARTICLE, ("determiner",))]
            end = match.end() + 1
        elif concept:
            pieces += [(text[end : match.start()], ()), (match.group(), (concept,))]
            end = match.end()
    return [*pieces, (text[end:], ())]


_literal_cached = cache(_literal)


@no_type_check
def said(state: State, fact: str) -> bool:
    """Whether the tale already holds ``fact``, written as in a template's needs (``A.pet`` or ``B``)."""
    key, _, attribute = fact.partition(".")
    return (key in state.seen) if not attribute else attribute in state.entities.get(key, {})


@no_type_check
def render(rng: random.Random, template: str, state: State) -> Rendered:
    """Fill ``template``; the returned state keeps what the tale must remember. Spans are relative to the text."""
    filler = _Filler(rng, state)
    pieces: list[Piece] = []
    for kind, part in parse(template)[1]:
        pieces += filler.fill(part) if kind == "slot" else _literal_cached(part)
    text, spans, capital = "", [], True
    opened = -1
    for index, (piece, concepts) in enumerate(pieces):
        if piece == _ARTICLE:
            piece = lexicon.article(next(t for t, _ in pieces[index + 1 :] if t.strip()))
        start = len(text)
        for char in piece:
            if char == "^":
                capital = True
            elif char == "<":
                opened = len(text)
            elif char == ">":
                spans.append((opened, len(text), "relative_clause"))
            else:
                text += char.upper() if capital and char.isalpha() else char
                capital = capital and not char.isalpha()
        spans += [(start, len(text), concept) for concept in concepts]
    kept = {key: value for key, value in filler.entities.items() if key[0].isupper()}
    seen = tuple(key for key in filler.seen if key in kept)
    return Rendered(text, spans, State(kept, filler.last if filler.last in kept else "", seen))
