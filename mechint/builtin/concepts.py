"""The concepts a span of a tale can carry, and the function words that carry one wherever they stand."""

import re
from typing import NamedTuple

from mechint.builtin import lexicon, world


class Concept(NamedTuple):
    """``description`` says which tokens carry it; every token of a concept also carries its ``parent``."""

    description: str
    parent: str | None = None


_TABLE = """
animate|a person, an animal, or a word that stands for one|
name|a proper name of a person|animate
female_name|a woman's first name|name
male_name|a man's first name|name
surname|a family name|name
pet_name|the name of a pet|animate
pronoun|a personal or possessive pronoun|
female_pronoun|she, her, hers, herself|pronoun
male_pronoun|he, him, his, himself|pronoun
kinship|a family word: sister, uncle|animate
human|a common noun for a person: queen, neighbour|animate
occupation|a job: baker, pilot|animate
animal|an animal|animate
young_animal|the young of an animal: kitten, foal|animal
animal_kind|mammal, bird, fish, insect, reptile, amphibian|animate
body|a part of the body|
group|a word for a group of people: family, team|animate
place|a place that can be named or visited|
city|a city|place
capital|a city that is the capital of its country|city
country|a country|place
continent|a continent|place
river_name|the name of a river|place
building|a building|place
room|a room|place
outdoor|a place out of doors: forest, bridge|place
workplace|where a job is done|place
habitat|where an animal lives|place
nationality|the adjective of a country: French|
language|a language|
edible|something to eat|
fruit|a fruit|edible
vegetable|a vegetable|edible
food|prepared food|edible
dish|the dish a country is known for|edible
feed|what an animal eats|edible
drink|something to drink|
artifact|a thing made by people|
clothes|a piece of clothing|artifact
furniture|a piece of furniture|artifact
container|a container|artifact
tool|a tool|artifact
readable|something to read|artifact
instrument|a musical instrument|artifact
vehicle|a vehicle|artifact
toy|a toy|artifact
treasure|a small valued object|artifact
thing|any other thing|
flower|a flower|
tree|a tree|
sky|something in the sky|
plural|a plural noun|
colour|a colour|
size|a word of size|
material|what a thing is made of|
adjective|a describing adjective of a thing|
trait|an adjective of character|
emotion|a feeling|
good_emotion|a pleasant feeling|emotion
bad_emotion|an unpleasant feeling|emotion
comparative|a comparative adjective or adverb|
superlative|a superlative adjective|
manner|an adverb of manner|
degree|an adverb of degree|
frequency|an adverb of frequency|
number|a number word|
ordinal|an ordinal number word|
arithmetic|plus, minus, makes, equals|
weekday|a day of the week|
month|a month|
season|a season|
time_expression|a word or phrase that says when|
weather|a word for the weather|
verb|a verb|
past_tense|a verb in the past|verb
present_tense|a verb in the present|verb
future_tense|will with its verb|verb
progressive|an -ing form|verb
participle|a past participle|verb
infinitive|a verb in its base form|verb
speech_verb|a verb of saying|verb
thought_verb|a verb of thinking|verb
motion_verb|a verb of movement|verb
negation|a negative word|
modal|can, must, should, could, would|
possessive|the 's of possession|
determiner|a, an, the, this, that, some|
preposition|a preposition|
coordinator|and, or, but|
subordinator|because, although, if, when, before, after, while|
question_word|who, what, where, when, why, how, in a question|
relative_pronoun|who, that, which, opening a relative clause|
relative_clause|inside a relative clause|
interjection|oh, well, yes, no, thanks|
quotation|inside quotation marks|
question|inside a sentence or a quotation that ends with a question mark|
sentence_start|the first token of a sentence|
sentence_end|the last token of a sentence|
text_start|inside the first sentence of the text|
repeated_name|a name that already stood earlier in the text|
sentence|every sentence of the text, one span each|
"""

CONCEPTS: dict[str, Concept] = {
    name: Concept(description, parent or None)
    for name, description, parent in (line.split("|") for line in _TABLE.strip().splitlines())
}
# Labelled from other spans rather than by the words themselves.
DERIVED = ("sentence_start", "sentence_end", "text_start", "repeated_name")


def _literal_words() -> dict[str, str]:
    table: dict[str, str] = {}
    verbs = {*lexicon.OBJECTS, *lexicon.IRREGULAR, *lexicon.MOTION, *lexicon.RESTING, *lexicon.GIVING}
    verbs |= {*lexicon.SAYING, *lexicon.THINKING, *lexicon.LIKING, *_TEMPLATE_VERBS}
    for lemma in sorted(verbs):
        table[lexicon.verb_form(lemma, "past")] = "past_tense"
        table[lexicon.verb_form(lemma, "s")] = "present_tense"
        table[lexicon.verb_form(lemma, "ing")] = "progressive"
    for concept, words in _FUNCTION_WORDS.items():
        for word in words.split():
            table[word] = concept
    table.update({number: "number" for number in (*world.NUMBERS, *world.TENS)})
    table.update({ordinal: "ordinal" for ordinal in world.ORDINALS})
    table.update({word: "interjection" for word in lexicon.INTERJECTIONS})
    table.update({word: "comparative" for word in lexicon.COMPARATIVES})
    table.update({colour: "colour" for colour in lexicon.COLOURS})
    return table


# Verbs that stand as plain words in templates and in no other table.
_TEMPLATE_VERBS = world.words(
    """
live ask call use open close start end seem look turn stay help try love cost rain snow smell belong celebrate
agree decide plan own share follow point wave nod wake cross flow raise happen become arrive thank move reach knock
"""
)
_FUNCTION_WORDS = {
    "past_tense": "was were had did became lay listened",
    "present_tense": "is are am has have do does lies counts",
    "future_tense": "will",
    "participle": "called born made written invited built left lost seen",
    "plural": "friends years days coins animals people",
    "interjection": "yes",
    "degree": "very too",
    "frequency": "always once ever",
    "good_emotion": "glad proud",
    "bad_emotion": "afraid",
    "adjective": "young old ripe full empty heavy good favourite",
    "building": "market",
    "furniture": "mirror",
    "readable": "letter postcard story",
    "modal": "can must should could would may might cannot",
    "negation": "no not never nobody nothing neither nor none without",
    "male_pronoun": "he him his himself",
    "female_pronoun": "she her hers herself",
    "pronoun": "i you me my your we us our they them their it its mine yours",
    "determiner": "a an the this these those some every each another both",
    "preposition": "in on at of from to with by for into near behind under beside above inside about over between "
    "through across along around",
    "coordinator": "and or but",
    "subordinator": "because although if when before after while until unless since though whenever",
    "comparative": "more less than",
    "time_expression": "yesterday today tomorrow now then later soon",
    "arithmetic": "plus minus makes equals",
    "season": "spring summer autumn winter",
    "infinitive": "become visit learn prefer grow change travel bring want need ask be go say see buy live come "
    "know tell eat sell find make take give speak remember believe",
    "question_word": "what where why how whose",
}

LITERAL: dict[str, str] = _literal_words()
WORD = re.compile(r"[A-Za-z]+")
