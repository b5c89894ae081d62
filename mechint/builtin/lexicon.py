"""The words of the built-in world: nouns by class, verbs with their forms and objects, adjectives, adverbs.

A noun marked with ``~`` has no plural and takes no article. Verb forms are computed by rule unless listed.
"""

from functools import cache
from typing import no_type_check

from mechint.builtin.world import ANIMALS, words

NOUN_CLASSES: dict[str, tuple[str, ...]] = {
    key: words(text)
    for key, text in {
        "fruit": "apple pear plum lemon banana cherry peach melon grape fig mango strawberry apricot kiwi lime coconut "
        "raspberry blueberry",
        "vegetable": "carrot onion potato tomato cabbage pea pumpkin turnip cucumber radish leek aubergine lettuce",
        "food": "bread~ soup~ cake pie sandwich honey~ butter~ egg biscuit pancake jam~ salad pudding omelette "
        "toast~ muffin pizza roll",
        "drink": "water~ milk~ tea~ coffee~ juice~ lemonade~ cocoa~ wine~ cider~",
        "clothes": "hat coat shirt dress scarf glove sock shoe boot jacket skirt belt cap sweater apron cloak sandal "
        "uniform",
        "furniture": "table chair bed lamp shelf desk sofa mirror carpet cupboard stool bench curtain wardrobe pillow "
        "blanket",
        "container": "box bag basket bottle jar bucket cup bowl chest suitcase drawer purse pot sack crate vase",
        "tool": "hammer saw knife spoon fork axe shovel broom brush needle rope ladder key nail hook rake wrench",
        "readable": "book letter newspaper map poem story diary magazine postcard novel recipe menu dictionary",
        "instrument": "piano violin flute drum guitar trumpet harp cello organ banjo whistle bell clarinet",
        "vehicle": "car train bus bicycle boat ship truck tram plane taxi ferry wagon tractor canoe sled scooter",
        "toy": "ball doll kite puzzle puppet balloon robot",
        "treasure": "ring coin watch clock candle necklace bracelet camera umbrella lantern pencil pen stamp mask flag "
        "medal jewel crown painting statue photograph telescope",
        "flower": "rose tulip daisy lily orchid poppy sunflower daffodil",
        "tree": "oak pine birch maple willow elm cedar palm chestnut",
        "building": "school hospital library museum church castle hotel station market theatre bank factory cinema "
        "palace temple tower barn mill cottage restaurant cafe",
        "room": "kitchen bedroom bathroom cellar attic hall garage balcony corridor pantry nursery",
        "outdoor": "garden park forest beach hill lake field meadow valley bridge street road island mountain desert "
        "harbour square cave cliff pond village farm path swamp river",
        "body": "hand foot head arm leg eye ear nose knee shoulder finger tooth mouth elbow",
        "group": "family team crowd class club band army crew choir",
        "human": "child woman man girl boy neighbour friend guest stranger visitor student king queen prince princess "
        "thief hero witch giant wizard pirate twin",
        "sky": "sun moon star cloud rainbow",
    }.items()
}

NOUN_CLASSES["animal"] = tuple(animal.name for animal in ANIMALS)
# Unions that a template may ask for when any of several classes would do.
NOUN_UNIONS: dict[str, tuple[str, ...]] = {
    "object": ("clothes", "furniture", "container", "tool", "readable", "instrument", "vehicle", "toy", "treasure"),
    "edible": ("fruit", "vegetable", "food"),
    "place": ("building", "outdoor"),
    "living": ("flower", "tree"),
}

MATERIALS: tuple[str, ...] = words(
    "wood glass gold silver iron stone paper leather wool cotton silk clay copper plastic steel bronze wax"
)
COLOURS: tuple[str, ...] = words(
    "red blue green yellow black white brown grey pink purple orange violet scarlet turquoise crimson beige"
)
SIZES: tuple[str, ...] = words("big small large little tiny huge enormous")
THING_ADJECTIVES: tuple[str, ...] = words(
    """
old new heavy light long short clean dirty empty cheap expensive soft hard broken beautiful ugly strange plain round
wet dry sharp smooth rough thick thin lovely perfect modern ancient rare common valuable useless useful famous dusty
rusty shiny fragile precious
"""
)
PERSON_ADJECTIVES: tuple[str, ...] = words(
    """
kind clever brave lazy polite rude honest shy friendly patient strong weak rich poor young old tall famous careful silly
wise gentle greedy generous cruel loyal funny serious stubborn busy quiet foolish modest talented handsome elegant
"""
)
GOOD_FEELINGS: tuple[str, ...] = words(
    "happy proud cheerful grateful excited hopeful delighted glad pleased relieved thrilled satisfied"
)
BAD_FEELINGS: tuple[str, ...] = words(
    "sad angry afraid worried lonely nervous jealous ashamed upset unhappy miserable furious disappointed"
)
MANNER: tuple[str, ...] = words(
    """
quickly slowly quietly loudly carefully happily sadly gently suddenly calmly proudly nervously politely bravely eagerly
lazily patiently secretly angrily softly warmly clumsily gracefully silently
"""
)
DEGREE: tuple[str, ...] = words("very quite rather extremely really too so")
COMPARATIVES: tuple[str, ...] = words(
    "older younger taller shorter stronger weaker richer poorer wiser kinder braver cleverer busier quieter friendlier "
    "happier"
)
SUPERLATIVES: tuple[str, ...] = words(
    "oldest youngest tallest shortest strongest weakest richest poorest wisest kindest bravest cleverest busiest"
)
# Places one is on rather than in.
ON_PLACES = frozenset(words("beach hill field bridge street road island mountain square cliff farm path balcony"))
FREQUENCY: tuple[str, ...] = words("always often usually sometimes rarely seldom")
WEATHER: tuple[str, ...] = words("rainy sunny windy foggy snowy cloudy stormy warm cold hot mild freezing")
PREPOSITIONS: tuple[str, ...] = words("near behind under beside above inside opposite")
INTERJECTIONS: tuple[str, ...] = words("oh well ah hello goodbye thanks sorry please indeed perhaps certainly")

# lemma -> (third person, past, participle, -ing) where the rules below would be wrong.
_IRREGULAR = """
be is was been being
go goes went gone going
have has had had having
do does did done doing
say says said said saying
eat eats ate eaten eating
drink drinks drank drunk drinking
read reads read read reading
write writes wrote written writing
wear wears wore worn wearing
drive drives drove driven driving
ride rides rode ridden riding
buy buys bought bought buying
sell sells sold sold selling
find finds found found finding
lose loses lost lost losing
hide hides hid hidden hiding
steal steals stole stolen stealing
break breaks broke broken breaking
build builds built built building
cut cuts cut cut cutting
hear hears heard heard hearing
teach teaches taught taught teaching
fly flies flew flown flying
throw throws threw thrown throwing
catch catches caught caught catching
light lights lit lit lighting
ring rings rang rung ringing
grow grows grew grown growing
see sees saw seen seeing
sing sings sang sung singing
swim swims swam swum swimming
run runs ran run running
sit sits sat sat sitting
stand stands stood stood standing
sleep sleeps slept slept sleeping
give gives gave given giving
send sends sent sent sending
lend lends lent lent lending
show shows showed shown showing
bring brings brought brought bringing
tell tells told told telling
think thinks thought thought thinking
know knows knew known knowing
forget forgets forgot forgotten forgetting
understand understands understood understood understanding
come comes came come coming
leave leaves left left leaving
meet meets met met meeting
make makes made made making
take takes took taken taking
keep keeps kept kept keeping
win wins won won winning
fall falls fell fallen falling
speak speaks spoke spoken speaking
draw draws drew drawn drawing
choose chooses chose chosen choosing
feed feeds fed fed feeding
dig digs dug dug digging
bend bends bent bent bending
weave weaves wove woven weaving
fight fights fought fought fighting
sew sews sewed sewn sewing
spend spends spent spent spending
begin begins began begun beginning
put puts put put putting
feel feels felt felt feeling
hold holds held held holding
sweep sweeps swept swept sweeping
hang hangs hung hung hanging
shine shines shone shone shining
blow blows blew blown blowing
spit spits spat spat spitting
leap leaps leapt leapt leaping
get gets got got getting
dream dreams dreamt dreamt dreaming
learn learns learned learned learning
"""
IRREGULAR: dict[str, tuple[str, ...]] = {
    line.split()[0]: tuple(line.split()[1:]) for line in _IRREGULAR.strip().splitlines()
}

# verb -> classes or nouns it takes as object; this is what makes the next word predictable from the verb.
OBJECTS: dict[str, tuple[str, ...]] = {
    verb: words(classes)
    for verb, classes in {
        "read": "readable", "write": "letter poem story diary postcard novel recipe", "wear": "clothes",
        "drink": "drink", "eat": "food fruit vegetable", "cook": "vegetable soup~ egg omelette",
        "bake": "bread~ cake pie biscuit muffin pizza", "play": "instrument",
        "drive": "car bus truck tractor taxi tram",
        "ride": "bicycle horse camel donkey scooter", "climb": "tree hill mountain ladder tower cliff",
        "open": "container drawer wardrobe letter", "lock": "chest suitcase drawer garage barn cellar",
        "buy": "clothes treasure furniture food fruit vehicle", "sell": "fruit vegetable flower treasure furniture",
        "find": "treasure tool toy readable", "lose": "treasure glove key purse umbrella",
        "hide": "treasure readable key",
        "carry": "container furniture tool", "steal": "treasure vehicle instrument", "borrow": "tool readable vehicle",
        "drop": "container treasure egg", "break": "vase cup mirror bowl jar clock doll bottle",
        "repair": "vehicle clock shoe chair tool instrument", "clean": "room furniture container",
        "paint": "furniture room boat portrait flower", "draw": "map house tree flower animal",
        "admire": "statue painting palace flower castle", "collect": "coin stamp book shell postcard",
        "pick": "fruit flower", "plant": "tree flower vegetable", "feed": "animal", "chase": "animal",
        "visit": "building", "sew": "clothes curtain", "wash": "clothes container", "fill": "container",
        "light": "candle lantern lamp", "ring": "bell", "build": "boat house tower bridge barn cottage",
        "cut": "bread~ cake rope pie melon", "hear": "instrument animal", "fly": "kite plane",
        "throw": "ball stone rope",
        "kick": "ball bucket", "pour": "drink", "peel": "fruit potato onion", "taste": "food drink fruit",
        "sharpen": "knife axe saw pencil", "polish": "furniture treasure shoe", "water": "flower tree garden",
        "watch": "animal star ship train", "follow": "path animal human river", "paddle": "canoe",
        "fold": "blanket shirt map letter", "hang": "painting coat curtain flag", "iron": "shirt dress skirt",
    }.items()
}  # fmt: skip
MOTION: tuple[str, ...] = words("walk run travel hurry return drive wander march cycle move come go")
RESTING: tuple[str, ...] = words("sit stand sleep wait rest sing dance laugh smile work study play dream")
GIVING: tuple[str, ...] = words("give send lend show bring offer sell hand promise")
SAYING: tuple[str, ...] = words("say whisper shout reply answer add explain announce repeat mutter")
THINKING: tuple[str, ...] = words("think believe know hope remember forget guess notice learn claim doubt")
LIKING: tuple[str, ...] = words("love like hate prefer enjoy miss want need")

_DOUBLING = frozenset(words("drop chat hop plan stop grab hug slip snap travel hum"))
_PLURALS = {
    "child": "children", "woman": "women", "man": "men", "foot": "feet", "tooth": "teeth", "mouse": "mice",
    "goose": "geese", "sheep": "sheep", "fish": "fish", "salmon": "salmon", "trout": "trout", "deer": "deer",
    "wolf": "wolves", "knife": "knives", "shelf": "shelves", "scarf": "scarves", "calf": "calves", "thief": "thieves",
    "fisherman": "fishermen", "postman": "postmen", "piano": "pianos", "hero": "heroes", "potato": "potatoes",
    "tomato": "tomatoes", "mango": "mangoes", "fry": "fry", "larva": "larvae", "loaf": "loaves",
}  # fmt: skip
VOWEL_SOUND_EXCEPTIONS = {"uniform": "a", "useful": "a", "useless": "a", "honest": "an", "hour": "an", "unicorn": "a"}


@cache
@no_type_check
def plural(noun: str) -> str:
    """Plural of a count noun, by rule or from the table of irregular ones."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


@cache
@no_type_check
def verb_form(lemma: str, form: str) -> str:
    """Inflect ``lemma``; ``form`` is one of base, s, past, pp, ing."""
    if form == "base":
        return lemma
    if lemma in IRREGULAR:
        return IRREGULAR[lemma][("s", "past", "pp", "ing").index(form)]
    consonant_y = lemma.endswith("y") and lemma[-2] not in "aeiou"
    if form == "s":
        if consonant_y:
            return lemma[:-1] + "ies"
        return lemma + ("es" if lemma.endswith(("s", "x", "ch", "sh", "z")) else "s")
    if form == "ing":
        stem = lemma[:-1] if lemma.endswith("e") and not lemma.endswith(("ee", "oe")) else lemma
        return stem + (lemma[-1] if lemma in _DOUBLING else "") + "ing"
    if consonant_y:
        return lemma[:-1] + "ied"
    if lemma in _DOUBLING:
        return lemma + lemma[-1] + "ed"
    return lemma + ("d" if lemma.endswith("e") else "ed")


@no_type_check
def article(following: str) -> str:
    """The indefinite article that goes before ``following``."""
    word = following.split(" ")[0].lower()
    return VOWEL_SOUND_EXCEPTIONS.get(word, "an" if word[:1] in "aeiou" else "a")


@cache
@no_type_check
def nouns(selector: str) -> tuple[str, ...]:
    """Nouns of a class, or the single noun itself when ``selector`` names no class."""
    return NOUN_CLASSES.get(selector, (selector,))


@cache
@no_type_check
def class_of(noun: str) -> str:
    """The first class that lists the noun, ``"thing"`` when none does."""
    bare = noun.rstrip("~")
    for name, members in NOUN_CLASSES.items():
        if bare in members or bare + "~" in members:
            return name
    return "thing"
