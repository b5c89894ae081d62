"""Draws the facts that fill the slots of a sentence: each function gives one consistent group of words.

A group maps an attribute to ``(word, concept)``. Words that never take a plural or an article end in ``~``.
"""

import random
from collections.abc import Sequence
from typing import no_type_check

from mechint.builtin import lexicon, world

Entity = dict[str, object]
PET_NAMES = world.words(
    "Rex Fluffy Spot Luna Milo Rocky Coco Ginger Shadow Pepper Lucky Misty Simba Toby Oreo Patch Smokey Bandit Ziggy "
    "Nemo Pixie Whiskers Buster Pip"
)


@no_type_check
def pick(rng: random.Random, items: Sequence[object], skew: float = 1.35) -> object:
    """One of ``items``, the early ones more often, as words in real text are not equally common."""
    return items[int(len(items) * rng.random() ** skew)]


@no_type_check
def _country_facts(rng: random.Random, country: world.Country | None = None) -> Entity:
    land = country or pick(rng, world.COUNTRIES)
    assert isinstance(land, world.Country)
    city = str(rng.choice((land.capital, *land.cities)))
    return {
        "country": (land.name, "country"), "people": (land.people, "nationality"), "lang": (land.language, "language"),
        "capital": (land.capital, "capital"), "river": (land.river, "river_name"), "dish": (land.dish + "~", "dish"),
        "continent": (land.continent, "continent"),
        "city": (city, "capital" if city == land.capital else "city"),
        "town": (str(rng.choice(land.cities)), "city"),
    }  # fmt: skip


@no_type_check
def _job_facts(rng: random.Random) -> Entity:
    job = pick(rng, world.JOBS)
    assert isinstance(job, world.Job)
    return {
        "job": (job.name, "occupation"), "work": (job.place, "workplace"), "jverb": (job.verb, "verb"),
        "jthing": (job.thing + "~", "thing"), "jtool": (job.tool, "tool"),
    }  # fmt: skip


@no_type_check
def _animal_facts(rng: random.Random) -> Entity:
    beast = pick(rng, world.ANIMALS)
    assert isinstance(beast, world.Animal)
    return {
        "name": (beast.name, "animal"), "kind": (beast.kind, "animal_kind"), "home": (beast.home, "habitat"),
        "v": (beast.verb, "verb"), "feed": (beast.food + "~", "feed"), "young": (beast.young, "young_animal"),
    }  # fmt: skip


@no_type_check
def _day_facts(rng: random.Random) -> Entity:
    day = rng.randrange(7)
    names = ("before", "prev", "day", "next", "after")
    return {name: (world.WEEKDAYS[(day + step) % 7], "weekday") for name, step in zip(names, range(-2, 3), strict=True)}


@no_type_check
def _month_facts(rng: random.Random) -> Entity:
    month = rng.randrange(12)
    facts: Entity = {
        name: (world.MONTHS[(month + step) % 12], "month")
        for name, step in (("prev", -1), ("month", 0), ("next", 1), ("after", 2))
    }
    return {**facts, "season": (world.SEASONS[month], "season")}


@no_type_check
def _sum_facts(rng: random.Random) -> Entity:
    left, right = rng.randint(1, 10), rng.randint(1, 10)
    words = {"a": left, "b": right, "sum": left + right, "succ": left + 1, "pred": left - 1, "succ2": left + 2}
    return {name: (world.NUMBERS[value] + "~", "number") for name, value in words.items()}


@no_type_check
def _count_facts(rng: random.Random) -> Entity:
    left, right = rng.randint(2, 8), rng.randint(2, 8)
    low, high = sorted((left, right))
    words = {"a": left, "b": right, "sum": left + right, "low": low, "all": high + 1, "rest": high + 1 - low}
    words["one"] = high - low + 1
    return {name: (world.NUMBERS[value] + "~", "number") for name, value in words.items()}


@no_type_check
def _opposite_facts(rng: random.Random) -> Entity:
    pair = list(rng.choice(world.OPPOSITES))
    rng.shuffle(pair)
    return {"a": (pair[0] + "~", "adjective"), "b": (pair[1] + "~", "adjective")}


@no_type_check
def _fruit_facts(rng: random.Random) -> Entity:
    fruit, colour = rng.choice(world.FRUIT_COLOURS)
    return {"name": (fruit, lexicon.class_of(fruit)), "colour": (colour + "~", "colour")}


@no_type_check
def _act_facts(rng: random.Random) -> Entity:
    """A verb and an object it goes with."""
    verb = str(pick(rng, tuple(lexicon.OBJECTS)))
    noun = str(pick(rng, lexicon.nouns(str(rng.choice(lexicon.OBJECTS[verb])))))
    return {"v": (verb, "verb"), "o": (noun, lexicon.class_of(noun))}


@no_type_check
def _kind_facts(rng: random.Random) -> Entity:
    """A noun, its class as a word, and another noun that is not of the class."""
    classes = ("fruit", "vegetable", "flower", "tree", "animal", "tool", "instrument", "toy", "vehicle", "building")
    kind, other = rng.sample(classes, 2)
    noun, wrong = (str(pick(rng, lexicon.NOUN_CLASSES[name])).rstrip("~") for name in (kind, other))
    twin = rng.choice([member.rstrip("~") for member in lexicon.NOUN_CLASSES[kind] if member != noun])
    return {"name": (noun, kind), "kind": (kind, kind), "wrong": (wrong, other), "twin": (twin, kind)}


@no_type_check
def _when_facts(rng: random.Random) -> Entity:
    tense = rng.choice(("past", "past", "pres", "fut"))
    day, month = str(rng.choice(world.WEEKDAYS)), str(rng.choice(world.MONTHS))
    number = str(rng.choice(world.NUMBERS[2:11]))
    phrase = rng.choice(
        {
            "past": ("yesterday", "last week", f"last {day}", f"last {month}", f"{number} days ago", "long ago",
                     "last night", "this morning", f"{number} years ago"),
            "pres": ("every day", f"every {day}", "every week", "every morning", f"every {month}", "on most days"),
            "fut": ("tomorrow", "next week", f"next {day}", f"next {month}", "soon", f"in {number} days", "one day"),
        }[tense]
    )  # fmt: skip
    return {"phrase": (phrase + "~", "time_expression"), "tense": tense}


FACT_KINDS = {
    "land": _country_facts, "trade": _job_facts, "beast": _animal_facts, "day": _day_facts, "month": _month_facts,
    "math": _sum_facts, "count": _count_facts, "opp": _opposite_facts, "hue": _fruit_facts, "act": _act_facts,
    "sort": _kind_facts, "when": _when_facts,
}  # fmt: skip


@no_type_check
def person_facts(rng: random.Random, attribute: str, entities: dict[str, Entity]) -> Entity:
    """The group of facts about a person that ``attribute`` belongs to, drawn together so that they agree."""
    if attribute in ("city", "country", "people", "lang", "capital", "river", "dish", "continent", "town"):
        return _country_facts(rng)
    if attribute in ("job", "work", "jverb", "jthing", "jtool"):
        return _job_facts(rng)
    if attribute in ("pet", "petname", "petcolour"):
        return {
            "pet": (str(pick(rng, world.PETS)), "animal"), "petname": (str(pick(rng, PET_NAMES)), "pet_name"),
            "petcolour": (str(rng.choice(lexicon.COLOURS[4:8])), "colour"),
        }  # fmt: skip
    if attribute in ("kin", "kinname", "kinhe", "kinhis"):
        pair, gender = rng.choice(world.KIN), int(rng.random() < 0.5)
        taken = {other.get("name") for other in entities.values()}
        name = str(pick(rng, [n for n in (world.FEMALE_NAMES, world.MALE_NAMES)[gender] if n not in taken]))
        sex = ("female", "male")[gender]
        return {
            "kin": (pair[gender], "kinship"), "kinname": (name, f"{sex}_name"),
            "kinhe": (("she", "he")[gender] + "~", f"{sex}_pronoun"),
            "kinhis": (("her", "his")[gender] + "~", f"{sex}_pronoun"),
        }  # fmt: skip
    if attribute in ("obj", "objcolour", "objmat", "objadj", "objplace"):
        kind = str(rng.choice(("clothes", "container", "treasure", "instrument", "toy", "vehicle", "readable")))
        return {
            "obj": (str(pick(rng, lexicon.NOUN_CLASSES[kind])), kind),
            "objcolour": (str(pick(rng, lexicon.COLOURS)), "colour"),
            "objmat": (str(pick(rng, lexicon.MATERIALS)) + "~", "material"),
            "objadj": (str(pick(rng, lexicon.THING_ADJECTIVES)), "adjective"),
            "objplace": (str(pick(rng, lexicon.NOUN_CLASSES["room"])), "room"),
        }  # fmt: skip
    if attribute in ("trip", "tripland", "triplang"):
        trip = _country_facts(rng)
        return {"trip": trip["city"], "tripland": trip["country"], "triplang": trip["lang"]}
    single = {
        "surname": (world.SURNAMES, "surname"), "day": (world.WEEKDAYS, "weekday"), "month": (world.MONTHS, "month"),
        "age": ((*world.NUMBERS[5:], *world.TENS[1:]), "number"), "trait": (lexicon.PERSON_ADJECTIVES, "trait"),
        "fav": (lexicon.COLOURS, "colour"), "fruit": (lexicon.NOUN_CLASSES["fruit"], "fruit"),
        "drink": (lexicon.NOUN_CLASSES["drink"], "drink"), "feel": (lexicon.GOOD_FEELINGS, "good_emotion"),
        "instrument": (lexicon.NOUN_CLASSES["instrument"], "instrument"),
        "place": (lexicon.NOUN_CLASSES["outdoor"], "outdoor"),
        "dream": ([job.name for job in world.JOBS], "occupation"),
        "gift": (lexicon.NOUN_CLASSES["treasure"], "treasure"), "fear": (lexicon.NOUN_CLASSES["animal"], "animal"),
        "newplace": (lexicon.NOUN_CLASSES["room"], "room"), "house": (world.NUMBERS[2:], "number"),
        "mood": (lexicon.BAD_FEELINGS, "bad_emotion"), "flower": (lexicon.NOUN_CLASSES["flower"], "flower"),
        "book": (lexicon.NOUN_CLASSES["readable"], "readable"), "boss": (lexicon.NOUN_CLASSES["human"], "human"),
    }  # fmt: skip
    words, concept = single[attribute]
    return {attribute: (str(pick(rng, words)), concept)}
