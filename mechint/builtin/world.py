"""The facts of the built-in world: countries, people, jobs, animals, opposites, the calendar.

Plain tables, one record a line, parsed once on import. Everything the tales state about these things comes from here,
so that a fact is the same in every sentence that states it. Geography follows the real world where a single word names
the thing; the rest (which job uses which tool, which animal lives where) is everyday knowledge.
"""

from typing import NamedTuple


def words(text: str) -> tuple[str, ...]:
    """The words of a space-separated list."""
    return tuple(text.split())


class Country(NamedTuple):
    name: str
    people: str  # adjective of the country: "French"
    language: str
    capital: str
    cities: tuple[str, ...]  # other cities than the capital
    river: str
    dish: str
    continent: str


_COUNTRIES = """
France French French Paris Lyon,Nice,Bordeaux Seine cheese Europe
Germany German German Berlin Hamburg,Munich,Cologne Rhine sausages Europe
Italy Italian Italian Rome Milan,Venice,Naples Tiber pasta Europe
Spain Spanish Spanish Madrid Seville,Barcelona,Valencia Ebro paella Europe
Japan Japanese Japanese Tokyo Osaka,Kyoto,Nagoya Shinano sushi Asia
China Chinese Mandarin Beijing Shanghai,Wuhan,Nanjing Yangtze rice Asia
India Indian Hindi Delhi Mumbai,Chennai,Kolkata Ganges curry Asia
Egypt Egyptian Arabic Cairo Luxor,Aswan,Alexandria Nile beans Africa
Russia Russian Russian Moscow Kazan,Omsk,Perm Volga caviar Europe
Britain British English London Leeds,Bristol,York Thames pies Europe
Brazil Brazilian Portuguese Brasilia Recife,Salvador,Manaus Amazon steak America
Canada Canadian English Ottawa Toronto,Montreal,Calgary Yukon syrup America
Portugal Portuguese Portuguese Lisbon Porto,Braga Tagus cod Europe
Ireland Irish Irish Dublin Cork,Galway Shannon stew Europe
Norway Norwegian Norwegian Oslo Bergen,Stavanger Glomma salmon Europe
Sweden Swedish Swedish Stockholm Uppsala,Malmo Torne meatballs Europe
Finland Finnish Finnish Helsinki Turku,Tampere Kemi buns Europe
Denmark Danish Danish Copenhagen Aarhus,Odense Skjern pastries Europe
Iceland Icelandic Icelandic Reykjavik Akureyri Thjorsa lamb Europe
Holland Dutch Dutch Amsterdam Rotterdam,Utrecht Amstel waffles Europe
Belgium Belgian Flemish Brussels Ghent,Bruges,Antwerp Scheldt chocolate Europe
Austria Austrian German Vienna Salzburg,Graz Mur schnitzel Europe
Switzerland Swiss German Bern Zurich,Geneva,Basel Aare fondue Europe
Poland Polish Polish Warsaw Krakow,Gdansk Vistula dumplings Europe
Hungary Hungarian Hungarian Budapest Szeged,Debrecen Danube goulash Europe
Greece Greek Greek Athens Patras,Corinth Evros olives Europe
Turkey Turkish Turkish Ankara Istanbul,Izmir Sakarya kebabs Asia
Ukraine Ukrainian Ukrainian Kyiv Lviv,Odesa Dnipro borscht Europe
Romania Romanian Romanian Bucharest Cluj,Brasov Olt polenta Europe
Bulgaria Bulgarian Bulgarian Sofia Varna,Plovdiv Maritsa yogurt Europe
Serbia Serbian Serbian Belgrade Subotica Sava peppers Europe
Croatia Croatian Croatian Zagreb Zadar,Rijeka Drava squid Europe
Czechia Czech Czech Prague Brno,Ostrava Vltava strudel Europe
Morocco Moroccan Arabic Rabat Fez,Marrakesh Sebou couscous Africa
Kenya Kenyan Swahili Nairobi Mombasa,Kisumu Tana maize Africa
Nigeria Nigerian Hausa Abuja Lagos,Kano Niger yams Africa
Ghana Ghanaian Akan Accra Kumasi,Tamale Volta plantain Africa
Tanzania Tanzanian Swahili Dodoma Arusha,Mwanza Rufiji cassava Africa
Mali Malian Bambara Bamako Timbuktu,Segou Bani millet Africa
Korea Korean Korean Seoul Busan,Daegu Naktong kimchi Asia
Vietnam Vietnamese Vietnamese Hanoi Hue,Danang Mekong noodles Asia
Thailand Thai Thai Bangkok Phuket,Pattaya Ping satay Asia
Nepal Nepali Nepali Kathmandu Pokhara,Lalitpur Gandaki lentils Asia
Iran Iranian Persian Tehran Shiraz,Isfahan Karun pilaf Asia
Iraq Iraqi Arabic Baghdad Mosul,Basra Tigris dates Asia
Mongolia Mongolian Mongolian Ulaanbaatar Darkhan Selenga mutton Asia
Australia Australian English Canberra Sydney,Perth,Brisbane Murray prawns Oceania
Peru Peruvian Spanish Lima Cusco,Arequipa Ucayali ceviche America
Chile Chilean Spanish Santiago Valparaiso,Temuco Loa empanadas America
Ecuador Ecuadorian Spanish Quito Guayaquil,Cuenca Napo soup America
Colombia Colombian Spanish Bogota Cali,Medellin Magdalena arepas America
Bolivia Bolivian Spanish Sucre Potosi,Oruro Beni quinoa America
Cuba Cuban Spanish Havana Holguin,Camaguey Cauto sugar America
"""


def _country(line: str) -> Country:
    name, people, language, capital, cities, river, dish, continent = line.split()
    return Country(name, people, language, capital, tuple(cities.split(",")), river, dish, continent)


COUNTRIES: tuple[Country, ...] = tuple(_country(line) for line in _COUNTRIES.strip().splitlines())

FEMALE_NAMES: tuple[str, ...] = words(
    """
Mary Anna Emma Lucy Sara Julia Laura Alice Clara Helen Nina Eva Maria Rosa Ella Grace Ruth Jane Kate Lily Ivy Nora
Diana Irene Olga Tina Vera Wendy Amy Beth Carla Dora Elsa Fiona Gina Hanna Iris Jenny Karen Linda Mona Nadia Paula
Rita Sonia Tara Ursula Yara Zoe Agnes Bella Celia Daisy Edith Flora Greta Heidi Ingrid Judith Katya Lena Martha Naomi
Olivia Petra Rachel Susan Teresa Violet Wilma Yasmin Zelda Amina Bianca Cora Doris Esther Freya Gloria Hilda Isabel
Joan Leila Mina Noor Odette Priya Renata Stella Thea Valerie Xenia Yuki Sakura Fatima Aisha Mei Lotte Marta Elena
Camille Ada Margaret Eleanor Beatrice
"""
)

MALE_NAMES: tuple[str, ...] = words(
    """
John Peter Paul Mark Tom David James Henry Robert Simon Adam Leo Max Oscar Hugo Felix Ivan Karl Luis Omar Ali Ben Carl
Daniel Eric Frank George Harry Isaac Jack Kevin Liam Martin Noah Oliver Philip Quentin Ralph Samuel Theo Victor Walter
Xavier Yusuf Zack Albert Bruno Claude Dennis Edgar Fred Gustav Hassan Igor Jonas Klaus Lars Mario Nils Otto Pablo
Rashid Stefan Tariq Umar Vincent William Yann Anton Boris Cesar Dmitri Emil Fabian Gabriel Hans Ibrahim Jorge Kenji
Louis Miguel Nathan Olaf Pedro Rafael Sven Tobias Viktor Wei Andre Bilal Chen Diego Enzo Francis Giles Hiroshi Jamal
Kofi Rupert Arthur Edward Charles Julian
"""
)

SURNAMES: tuple[str, ...] = words(
    """
Smith Brown Miller Taylor Wilson Clark Lewis Walker Young Allen King Wright Hill Green Baker Carter Mitchell Turner
Parker Evans Collins Stewart Morris Rogers Cooper Bailey Howard Ward Watson Brooks Bennett Gray Hughes Foster Powell
Fisher Mason Palmer Webb Stone Rossi Weber Novak Silva Tanaka Kim Singh Petrov Larsen Costa Moreau Haddad Okafor
"""
)


class Job(NamedTuple):
    name: str
    place: str  # where it is done
    verb: str  # lemma of what is done
    thing: str  # the object of the verb, as plural or mass
    tool: str


_JOBS = """
baker bakery bake bread oven
teacher school teach children blackboard
doctor hospital heal patients stethoscope
farmer farm grow wheat tractor
sailor harbour mend sails compass
painter studio paint portraits brush
tailor workshop sew suits needle
cook restaurant prepare meals pan
gardener garden plant flowers shovel
carpenter workshop build chairs hammer
nurse clinic help patients thermometer
librarian library lend books catalogue
fisherman lake catch fish net
miner mine dig coal lamp
pilot airport fly planes radio
driver station drive buses map
judge court judge cases gavel
actor theatre play roles mask
singer opera sing songs microphone
clerk office copy letters pen
waiter cafe serve drinks tray
butcher shop cut meat knife
florist market sell roses scissors
jeweller shop polish rings magnifier
postman post deliver letters bicycle
astronomer observatory watch stars telescope
chemist laboratory mix powders flask
soldier camp guard gates shield
shepherd meadow guard sheep staff
potter workshop shape bowls wheel
plumber bathroom repair pipes wrench
mechanic garage repair engines spanner
writer study write novels typewriter
photographer studio take pictures camera
architect office draw houses ruler
blacksmith forge bend iron anvil
barber salon cut hair razor
dentist clinic clean teeth drill
lawyer court defend clients briefcase
musician theatre play concerts violin
banker bank count money calculator
cleaner hotel sweep floors broom
beekeeper meadow collect honey smoker
weaver mill weave cloth loom
brewer brewery brew beer barrel
printer office print newspapers press
detective city solve crimes notebook
scientist laboratory study cells microscope
firefighter tower fight fires hose
lumberjack forest cut trees axe
"""

JOBS: tuple[Job, ...] = tuple(Job(*line.split()) for line in _JOBS.strip().splitlines())


class Animal(NamedTuple):
    name: str
    kind: str  # mammal, bird, fish, insect, reptile
    home: str
    verb: str  # the sound or movement it is known for
    food: str
    young: str


_ANIMALS = """
dog mammal kennel bark bones puppy
cat mammal house purr mice kitten
horse mammal stable neigh hay foal
cow mammal farm moo grass calf
sheep mammal meadow bleat grass lamb
pig mammal farm grunt turnips piglet
lion mammal savanna roar meat cub
wolf mammal forest howl meat cub
bear mammal forest growl honey cub
fox mammal forest hunt mice cub
rabbit mammal burrow hop carrots bunny
mouse mammal hole squeak crumbs pup
monkey mammal jungle chatter bananas infant
elephant mammal savanna trumpet leaves calf
camel mammal desert spit thorns calf
goat mammal mountain bleat grass kid
donkey mammal stable bray hay foal
tiger mammal jungle roar meat cub
squirrel mammal tree climb nuts pup
bat mammal cave flutter moths pup
whale mammal ocean dive plankton calf
dolphin mammal ocean leap fish calf
kangaroo mammal desert jump grass joey
deer mammal forest gallop leaves fawn
owl bird barn hoot mice owlet
duck bird pond quack weeds duckling
hen bird farm cluck corn chick
goose bird pond honk grass gosling
eagle bird cliff soar rabbits eaglet
crow bird tree caw seeds chick
parrot bird jungle talk nuts chick
penguin bird ice waddle fish chick
swan bird lake glide weeds cygnet
sparrow bird hedge chirp seeds chick
pigeon bird square coo crumbs chick
robin bird garden whistle worms chick
salmon fish river swim shrimps fry
shark fish ocean swim fish pup
trout fish river swim flies fry
bee insect hive buzz nectar larva
ant insect anthill march crumbs larva
butterfly insect meadow flutter nectar caterpillar
cricket insect grass chirp leaves nymph
snake reptile desert hiss eggs hatchling
frog amphibian pond croak flies tadpole
turtle reptile beach crawl weeds hatchling
lizard reptile desert crawl flies hatchling
crocodile reptile swamp snap fish hatchling
"""

ANIMALS: tuple[Animal, ...] = tuple(Animal(*line.split()) for line in _ANIMALS.strip().splitlines())
PETS: tuple[str, ...] = words("dog cat horse rabbit parrot goat donkey duck hen turtle mouse sheep pig goose")

WEEKDAYS: tuple[str, ...] = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS: tuple[str, ...] = words("January February March April May June July August September October November December")
SEASONS: tuple[str, ...] = ("winter", "winter", *["spring"] * 3, *["summer"] * 3, *["autumn"] * 3, "winter")
NUMBERS: tuple[str, ...] = words(
    """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty
"""
)
TENS: tuple[str, ...] = words("twenty thirty forty fifty sixty seventy eighty ninety")
ORDINALS: tuple[str, ...] = words("first second third fourth fifth sixth seventh eighth ninth tenth")

OPPOSITES: tuple[tuple[str, str], ...] = tuple(
    (pair.split("/")[0], pair.split("/")[1])
    for pair in words("""
big/small old/new hot/cold long/short heavy/light clean/dirty empty/full cheap/expensive soft/hard beautiful/ugly
bright/dark dry/wet smooth/rough thick/thin strong/weak rich/poor fast/slow early/late good/bad happy/sad brave/cowardly
kind/cruel clever/foolish polite/rude honest/dishonest loud/quiet easy/difficult deep/shallow near/far wide/narrow
high/low true/false safe/dangerous sweet/bitter sharp/blunt tidy/messy generous/greedy lazy/busy simple/complicated
ancient/modern raw/cooked common/rare open/closed alive/dead public/private
""")
)

# (female word, male word): family words decide the gender of the person they name.
KIN: tuple[tuple[str, str], ...] = (
    ("sister", "brother"),
    ("mother", "father"),
    ("aunt", "uncle"),
    ("grandmother", "grandfather"),
    ("daughter", "son"),
    ("niece", "nephew"),
)

FRUIT_COLOURS: tuple[tuple[str, str], ...] = tuple(
    (pair.split("/")[0], pair.split("/")[1])
    for pair in words("""
lemon/yellow banana/yellow lime/green cherry/red strawberry/red plum/purple blueberry/blue raspberry/red kiwi/green
apricot/orange tomato/red carrot/orange cucumber/green pumpkin/orange cabbage/green coconut/brown
""")
)
