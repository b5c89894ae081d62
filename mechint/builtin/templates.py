"""The sentences of the tales, one template a line (syntax: story.py), grouped by what they are about."""

# A person: introduced, described, followed. Facts said here are asked for again in RECALL.
OPEN = """
{A} {A.surname} lived in {A.city}, a~ {A.people} city.
{A} lives in {A.city} and works as a~ {A.job}.
{A} was a~ {A.trait} {A.job} <who lived in {A.city}>.
There was once a~ {A.trait} {A.job} called {A}.
{A} is a~ {A.job} from {A.country}.
{A} comes from {A.city} in {A.country} and speaks {A.lang}.
My {A.kin}, {A.kinname}, has a friend called {A} <who comes from {A.city}>.
{A} has a~ {A.petcolour} {A.pet} called {A.petname}.
{A} had a~ {A.kin} called {A.kinname} and a~ {A.pet} called {A.petname}.
{A} and {B} were friends <who lived in {A.city}>.
{A} and {B} met in {A.city} in {A.month}.
{A} is {A.age} years old and lives with {A.his} {A.kin}, {A.kinname}.
When {A} was young, {A.he} lived in {A.country} with {A.his} {A.kin}.
On {A.day}, {A} went to the {A.place} with {A.his} {A.pet}, {A.petname}.
In the {room1} of {A} stood a~ {A.objcolour} {A.obj} made of {A.objmat}.
{A} owned a~ {A.objadj} {A.obj}, and it was {A.objcolour}.
{When.phrase}, {A} {walk/When} to the {A.place}.
{When.phrase}, {A} {visit/When} {B} in {B.city}.
Although {A} was born in {A.city}, {A.he} never learned {land.lang}.
{A}, <who was a~ {A.job}>, loved {A.his} {A.pet} and {A.his} {A.kin}.
This is the story of {A}, a~ {A.trait} {human1} from {A.country}.
"{interj}," said {A}, "my name is {A} and I come from {A.city}."
Everybody in {A.city} knew {A}, the {A.job}.
{A} lives at number {A.house} in {A.city} and is {A.age} years old.
{A} was {A.mood} of everything, most of all of {A.fear|pl}.
{A} wanted to become a~ {A.dream}, but {A.his} {A.kin} wanted {A.him} to become a~ {trade.job}.
{A} is the {super1} {A.job} in {A.city}.
It was {A} <who brought the first {A.flower} to {A.city}>.
{A} and {A.his} {A.kin} planned a journey to {A.trip}.
"""

ABOUT = """
{A.ref} {work/s} in the {A.work} every {A.day}.
Because {A.he} was a~ {A.job}, {A.ref} spent every {A.day} in the {A.work}.
Every {A.day} {A.ref} used a~ {A.jtool} at the {A.work}.
{A.refs} favourite colour was {A.fav}, so {A.he} bought a~ {A.fav} {clothes1}.
{A.ref} always wore a~ {A.fav} {clothes1} and a~ {colour1} {clothes2}.
{A.ref} {liking1/s} {A.drink} but {A.he} never drinks {drink1}.
In the morning {A.ref} drank {A.drink} and ate a~ {A.fruit}.
{A.ref} kept the {A.obj} {A.objplace|at}, {prep1} a~ {furniture1}.
The {A.obj} <that {A} owned> was {A.objcolour} and very {A.objadj}.
{A.refs} {A.obj} was made of {A.objmat}.
{A.refs} {A.kin}, {A.kinname}, gave {A.him} a~ {A.objadj} {A.obj}.
{A.refs} {A.pet}, {A.petname}, {resting1/past} {prep1} the {furniture1}.
{A.petname}, the {A.petcolour} {A.pet}, {freq1} followed {A} to the {A.place}.
{A.ref} {feed/When} {A.his} {A.pet} {manner1}.
{A.ref} played the {A.instrument} {A.place|at} on {A.day}.
{A.ref} speaks {A.lang} because {A.he} grew up in {A.country}.
{A.ref} missed the {A.river} and the {A.dish} of {A.country}.
At home {A.ref} cooked {A.dish}, as people do in {A.country}.
{A.ref} {act.v/When} {act.o|a} {A.place|at}.
{When.phrase}, {A.ref} {act.v/When} {act.o|a} and {act2.v/When} {act2.o|a}.
{A.ref} {motion1/When} to the {place1} and {resting1/When} there {manner1}.
{A.ref} did not {act.v/base} {act.o|a}, because {A.he} was too {bad1}.
{A.ref} was {good1} because {A.he} had won a~ {adj1} {treasure1}.
{A.ref} was {bad1} because {A.he} had lost {A.his} {treasure1}.
{A.ref} felt {bad1} when {A.his} {vehicle1} broke, but {A.his} {A.kin} {make/past} {A.him} {good1}.
Nobody in {A.city} was as {trait1} as {A.ref}.
{A.ref} is more {trait1} than {A.his} {A.kin}.
{A.ref} could not find {A.his} {clothes1}, so {A.he} wore a~ {adj1} {clothes2}.
{A.ref} bought {num1} {fruit1|pl}, {num2} {vegetable1|pl} and some {drink1}.
{A.ref} put the {object1} {prep1} the {object2} and the {edible1} {prep2} the {container1}.
{A.ref} has {num1} {object1|pl}, {num2} {object2|pl} and only one {object3}.
{A.ref} wants to {act.v/base} {act.o|a} before {A.he} goes to {land.city}.
{A.ref} has never {act.v/pp} {act.o|a} in {A.his} life.
{A.ref} was {act.v/ing} {act.o|a} when the {human1} {motion1/past} into the {room1}.
While {A.ref} was {resting1/ing} {room1|at}, {A.his} {A.kin} {act.v/past} {act.o|a}.
After {A.he} had {act.v/pp} {act.o|a}, {A.ref} {motion1/past} home {manner1}.
If {A.ref} goes to {land.country}, {A.he} will see the {land.river} and eat {land.dish}.
{A.ref} hoped that {A.his} {A.kin} would {act.v/base} {act.o|a}.
{A.ref} has a~ {size1} {body1} and {degree1} {adj1} {clothes1|pl}.
{A.ref} can {act.v/base} {act.o|a}, but {A.he} cannot {act2.v/base} {act2.o|a}.
On {day.day} {A.ref} {act.v/past} {act.o|a}, and on {day.next} {A.he} {act2.v/past} {act2.o|a}.
First {A.ref} {act.v/past} {act.o|a}, then {A.he} {act2.v/past} {act2.o|a}, and at last {A.he} {motion1/past} home.
{A.ref} wanted to become a~ {A.dream} <who works in a~ {trade.work}>.
{A.ref} was afraid of {A.fear|pl}, so {A.he} never went near the {beast.home}.
{A.ref} planned a journey to {A.trip} in {A.tripland}.
{A.ref} began to learn {A.triplang}, because {A.he} wanted to see {A.trip}.
{A.ref} moved the {A.obj} from the {A.objplace} to the {A.newplace}.
A~ {A.obj} is not a toy, but {A.ref} played with it {A.newplace|at}.
{A.ref} was {A.mood} all day, because nobody had {act.v/pp} {act.o|a}.
{A.ref} found an old {A.book} about {A.fear|pl} and read it {manner1}.
The {A.book} was written by a~ {A.people} {trade.job}, and {A.ref} read it every {day.day}.
{A.ref} planted {num1} {A.flower|pl} {prep1} the {building1}.
{A.ref} is {comp1} than {A.his} {A.kin}, but {A.his} {A.kin} is {comp2}.
A~ {A.boss} knocked at the door of {A} and asked for some {drink1}.
The {act.o} was {act.v/pp} by {A}, not by {p}.
It was not {p} but {A.ref} <who {act.v/past} {act.o|a}>.
{A.ref} would {act.v/base} {act.o|a} if {A.he} had a~ {tool1}.
{A.ref} asked {A.self} why the {human1} had not {act.v/pp} {act.o|a}.
Without {A.his} {A.obj}, {A.ref} felt {bad1} and {bad2}.
{A.ref} counts {A.his} {treasure1|pl}: {math.a}, {math.succ}, {math.succ2}.
"""

PAIR = """
{A} and {B} {motion1/past} to the {place1} together.
{A} gave {B} a~ {adj1} {object1}, and {B} gave {A} {num1} {edible1|pl}.
{A.ref} {giving1/past} {B} {A.his} {A.objcolour} {A.obj}.
{B.ref} {liking1/past} the {A.obj} of {A}, because it was {A.objcolour}.
{A} told {B} that {A.his} {A.kin}, {A.kinname}, was in {land.city}.
{A} {thinking1/past} that {B} was {trait1}, but {B} {thinking2/past} that {A} was {trait2}.
{A.ref} is a~ {A.job}, while {B} is a~ {B.job}.
{A.ref} lives in {A.city}, but {B} lives in {B.city}, the pride of {B.country}.
{A} speaks {A.lang}, and {B} speaks {B.lang}.
{B}, <who had {act.v/pp} {act.o|a}>, was {degree1} {good1}.
{B}, <whose {B.kin} was a~ {trade.job}>, came from {B.city}.
The {object1} <that {A} had bought for {B}> was {degree1} {adj1}.
The {human1} <who saw {A} and {B}> {saying1/past} nothing.
{A.ref} asked {B} to {act.v/base} {act.o|a}, but {B} did not want to.
{A} has {count.a} {object1|pl} and {B} has {count.b}, so together they have {count.sum} {object1|pl}.
{A} is taller than {B}, and {B} is taller than {p}, so {A} is taller than {p}.
{B.ref} {motion1/past} to {B.city} on {day.day}, and {A} came on {day.next}.
Neither {A} nor {B} {act.v/past} {act.o|a}.
Both {A} and {B} {act.v/past} {act.o|a} in {month.month}.
{A} looked at {A.self} in the mirror, and {B} laughed at {B.self}.
{B} {act.v/past} {act.o|a}, although {A} had {act.v/pp} it before.
{B.ref} is a~ {B.trait} {B.job} and owns a~ {B.objcolour} {B.obj}.
{B} has a~ {B.kin} called {B.kinname} <who works as a~ {trade.job}>.
{B.ref} showed {A} a~ {B.objadj} {B.obj} made of {B.objmat}.
{A} is a~ {A.job} and {B} is a~ {B.job}, but both are {trait1}.
{A} waited for {B} {prep1} the {building1} until the {weather1} evening.
{A}, {B} and {p} {act.v/past} {act.o|a} {outdoor1|at}.
{p} {giving1/past} {A} a~ {object1}, and {A} {giving1/past} it to {B}.
{B.refs} {B.pet}, {B.petname}, chased the {A.pet} of {A} through the {outdoor1}.
{A} saw {B}, <who was {act.v/ing} {act.o|a}>, and waved {manner1}.
{B} gave {A} a~ {adj1} {A.gift} on {day.day}.
{B.ref} promised to bring {A} a~ {A.gift} from {B.city}.
{A} is {comp1} than {B}, but {B} is {comp2} than {p}.
Of the three friends, {A} was the {super1}, {B} was the {super2} and {p} was the {super3}.
{A} came {ordinal1} in the race, and {B} came {ordinal2}.
{B} had lived in {land.country} for {num1} years before {B.he} met {A}.
{A} was invited by {B} to {act.v/base} {act.o|a} {outdoor1|at}.
When {A} {motion1/past} into the {room1}, {B} was {act.v/ing} {act.o|a}.
If {B} {act.v/s} {act.o|a}, {A} will {act2.v/base} {act2.o|a}.
{A} wrote to {B}, and {B} wrote to {p}, but {p} never answered.
"""

TALK = """
"Where do you live?" asked {B}. "I live in {A.city}," said {A}.
"What do you do?" asked {B}. "I am a~ {A.job}, and I work in a~ {A.work}," said {A}.
"Do you speak {A.lang}?" asked {B}. "Yes, I come from {A.country}," answered {A}.
"Do you speak {land.lang}?" asked {B}. "No, I speak only {A.lang}," answered {A}.
"What is the capital of {land.country}?" asked {A}. "It is {land.capital}," {saying1/past} {B}.
"What is {math.a} plus {math.b}?" asked {A}. "It is {math.sum}," {saying1/past} {B}.
"What day is it today?" asked {B}. "It was {day.prev} yesterday, so it is {day.day}," said {A}.
"Have you seen my {A.obj}?" asked {A}. "Your {A.objcolour} {A.obj} is {A.objplace|at}," said {B}.
"I am {bad1}," said {B.ref}. "Do not be {bad1}," {saying1/past} {A}.
"I have {act.v/pp} {act.o|a}," {saying1/past} {A.ref} {manner1}.
"We will {act.v/base} {act.o|a} on {day.day}," {saying1/past} {A.ref}.
"{interj}, {A}," said {B}, "your {A.pet} is {prep1} the {furniture1}."
"{interj}," {saying1/past} {A.ref}, "I never {act.v/base} {act.o|a}."
"Can you {act.v/base} {act.o|a}?" asked {A}. "No, but {p} can," {saying1/past} {B}.
"Who has {act.v/pp} the {act.o}?" asked {A}. "It was {p}," {saying1/past} {B}.
"Why are you {good1}?" asked {A}. "Because my {B.kin} will visit me on {day.day}," said {B}.
"Why are you {bad1}?" asked {B}. "Because I have lost my {A.obj}," said {A}.
"How many {object1|pl} do you have?" asked {B}. "I have {num1} {object1|pl}," {saying1/past} {A}.
"My {A.kin} is called {A.kinname}," said {A.ref}, "and {A.kinhe} lives in {land.city}."
"Please {giving1/base} me the {colour1} {object1}," said {B.ref}, and {A} did so {manner1}.
{A.ref} said that {A.he} {liking1/past} {drink1}, but {B} {saying1/past}, "^I prefer {drink2}."
{B.ref} asked {A} whether {A.he} had {act.v/pp} {act.o|a}, and {A} said that {A.he} had.
{A} {thinking1/past} that {B} {thinking2/past} that the {object1} was {colour1}.
"You must not {act.v/base} {act.o|a} {room1|at}," {saying1/past} {A.ref} {manner1}.
"If it is {weather1} on {day.day}, we should {act.v/base} {act.o|a}," {saying1/past} {B.ref}.
"Which is {comp1}, the {object1} or the {object2}?" asked {A}. "The {object2}," {saying1/past} {B}.
"I will become a~ {A.dream}," said {A.ref}, "because I {liking1/base} {edible1|pl}."
"Are you afraid of {A.fear|pl}?" asked {B}. "Yes, I am," {saying1/past} {A}.
"Where are you going?" asked {B}. "I am going to {A.trip}," {saying1/past} {A}.
"Thank you for the {A.gift}," {saying1/past} {A.ref} {manner1}.
"You are the {super1} {human1} I know," {saying1/past} {B.ref}.
"Nobody has {act.v/pp} {act.o|a}," {saying1/past} {A.ref}, "and nobody will."
"My favourite {A.flower} is {colour1}," said {A.ref}, "but yours is {colour2}."
"Were there {num1} or {num2} {animal1|pl}?" asked {A}. "There were {num2}," said {B}.
"""

RECALL = """
A.city :: So {A.ref} went back to {A.city}.
A.city :: {A.ref} was glad to be home in {A.city}, far from {land.city}.
A.city A.people :: {A.city} is in {A.country}, and its people speak {A.lang}.
A.job A.work :: As every {A.job} should, {A.ref} came to the {A.work} early.
A.job :: "You are a good {A.job}, {A}," {saying1/past} the {human1}.
A.petname A.pet :: The {A.pet} was called {A.petname}.
A.petname :: {A.petname} was {degree1} {adj1} and {freq1} {good1}.
A.petname :: When {A} came home, {A.petname} was {resting1/ing} {room1|at}.
A.petname A.petcolour :: Where was {A.petname}, the {A.petcolour} {A.pet}?
A.kinname A.kin :: {A.kinname}, {A.his} {A.kin}, was {degree1} {trait1}.
A.kinname :: {A.kinname} {act.v/past} {act.o|a} for {A}.
A.kinname A.kin :: In the evening {A.ref} wrote a letter to {A.kinname}.
A.obj A.objcolour :: What colour was the {A.obj}? It was {A.objcolour}.
A.obj A.objmat :: The {A.obj} was heavy, because it was made of {A.objmat}.
A.obj A.objplace :: {A.ref} looked for the {A.obj} {A.objplace|at}.
A.obj A.objadj :: Everybody wanted to see the {A.objadj} {A.obj} of {A}.
A.place :: On {day.day} {A.ref} came back to the {A.place}.
A.fav :: Of course the new {object1} of {A} was {A.fav}.
A.drink :: There was no {A.drink} left, so {A.ref} drank {drink1}.
A.instrument :: {A.ref} sold the {A.instrument} to a~ {human1}.
A.day :: It was {A.day}, and {A.ref} was {degree1} {good1}.
A.age A.kin :: {A} is {A.age}, but {A.his} {A.kin} is {tens1}.
A.surname :: People called {A.him} {A} {A.surname}.
A.lang :: {A.ref} sang a~ {A.lang} song and everybody listened.
A.trait :: Everybody said that {A.ref} was {A.trait}.
B A.name :: {B} and {A} said goodbye to {p}.
B.city A.city :: {B.ref} returned to {B.city}, and {A} stayed in {A.city}.
B.job A.job :: The {B.job} thanked the {A.job}, because the {A.job} had helped {B.him}.
B.job :: A~ {B.job} like {B} is never {bad1}.
Land.country :: In {Land.country} people eat {Land.dish} and speak {Land.lang}.
Land.city :: From {Land.city} it is far to {land.city} in {land.country}.
Beast.name :: A young {Beast.name} is called a~ {Beast.young}.
Beast.name :: The {Beast.name} {Beast.v/past} {manner1} near the {Beast.home}.
Trade.job :: The {Trade.job} works in the {Trade.work} with a~ {Trade.jtool}.
A.dream :: Many years later {A.ref} became a~ {A.dream}.
A.dream A.job :: "A~ {A.job} cannot become a~ {A.dream}," {saying1/past} the {human1}.
A.fear :: Suddenly a~ {A.fear} stood before {A}.
A.trip A.tripland :: At last {A.ref} arrived in {A.trip}, where everybody speaks {A.triplang}.
A.trip :: {A.ref} sent {p} a postcard from {A.trip}.
A.newplace A.obj :: In the end {p} found the {A.obj} {A.newplace|at}.
A.gift :: {A.ref} never {lose/past} the {A.gift} <that {B} had given {A.him}>.
A.mood :: "Why are you so {A.mood}?" asked the {human1}.
A.book :: {A.ref} closed the {A.book} and {motion1/past} home.
A.flower :: The {A.flower|pl} of {A} were {colour1} and {colour2}.
A.boss :: The {A.boss} {saying1/past} goodbye to {A}.
A.house :: Number {A.house} was the {super1} house in the street.
B.trait :: {B.ref} was as {B.trait} as ever.
B.petname :: {B.petname} {resting1/past} {prep1} the {furniture1} of {B}.
B.obj B.objcolour :: The {B.objcolour} {B.obj} belonged to {B}, not to {A}.
B.kinname B.kin :: {B.kinname}, the {B.kin} of {B}, came to see {A}.
Sort.name :: So the {Sort.name} is a~ {Sort.kind}.
"""

WORLD = """
{Land.capital} is the capital of {Land.country}.
The capital of {Land.country} is {Land.capital}.
{Land.city} is a city in {Land.country}.
{Land.town} lies in {Land.country}, but it is not the capital.
{Land.country} has a capital called {Land.capital}.
People in {Land.country} speak {Land.lang}.
In {Land.city} people speak {Land.lang}, because it is a~ {Land.people} city.
The {Land.river} is a river in {Land.country}.
The {Land.river} flows through {Land.country} to the sea.
{Land.people} people like to eat {Land.dish}.
The people of {Land.city} are proud of their {Land.dish}.
{Land.country} is a country in {Land.continent}.
{Land.city}, <which is a~ {Land.people} city>, lies in {Land.continent}.
{p} said that {land.capital} was the capital of {land.country}.
If you go from {Land.city} to {land.city}, you travel from {Land.country} to {land.country}.
In {land.country} they speak {land.lang}, but in {land2.country} they speak {land2.lang}.
A~ {Trade.job} works in a~ {Trade.work}.
A~ {Trade.job} needs a~ {Trade.jtool}.
It is the work of a~ {Trade.job} to {Trade.jverb/base} {Trade.jthing}.
{Trade.job|pl} {Trade.jverb/base} {Trade.jthing} in the {Trade.work}.
The {Trade.job} <who works in this {Trade.work}> {freq1} {Trade.jverb/s} {Trade.jthing}.
No {Trade.job} can work without a~ {Trade.jtool}.
A~ {Beast.name} is a~ {Beast.kind}.
{Beast.name|pl} like to eat {Beast.feed}.
{Beast.name|pl} {Beast.v/base}, but {beast.name|pl} {beast.v/base}.
The {Beast.name} {Beast.v/s} because it wants some {Beast.feed}.
You can see a~ {Beast.name} near the {Beast.home}.
The young of a~ {Beast.name} is a~ {Beast.young}.
A~ {Beast.young} is a young {Beast.name}.
The {Beast.name} <that lives in the {Beast.home}> {freq1} {Beast.v/s}.
Is a~ {Beast.name} a~ {Beast.kind}? Yes, it is.
{math.a} plus {math.b} is {math.sum}.
{math.sum} minus {math.b} is {math.a}.
{math.a} and {math.b} makes {math.sum}.
After {math.a} comes {math.succ}, and after {math.succ} comes {math.succ2}.
Before {math.a} comes {math.pred}.
The day after {day.day} is {day.next}.
If today is {day.day}, tomorrow will be {day.next}.
If today is {day.day}, yesterday was {day.prev}.
{day.day} comes before {day.next} and after {day.prev}.
{day.prev}, {day.day} and {day.next} are days of the week.
{month.month} comes after {month.prev}.
After {month.month} come {month.next} and {month.after}.
{month.month} is a month of {month.season}.
In {month.month} it is {month.season}, and the days are {weather1}.
The opposite of {opp.a} is {opp.b}.
Something <that is {opp.a}> is not {opp.b}.
It was not {opp.a}, it was {opp.b}.
A ripe {hue.name} is {hue.colour}.
The colour of a~ {hue.name} is {hue.colour}.
A~ {sort.name} is a~ {sort.kind}.
A~ {sort.name} is a~ {sort.kind}, but a~ {sort.wrong} is not.
In {Land.town} and in {Land.capital} people speak {Land.lang}.
{p} lives in {Land.city}, so {p.he} lives in {Land.country}.
Not every {Beast.kind} can {Beast.v/base}, but the {Beast.name} can.
A~ {Beast.name} does not eat {beast.feed}, it eats {Beast.feed}.
If you need {Trade.jthing}, ask a~ {Trade.job}.
The {Trade.work} is the place of the {Trade.job}.
A~ {Sort.name} is a~ {Sort.kind}, and so is a~ {Sort.twin}.
Is a~ {Sort.name} a~ {Sort.wrong}? No, it is a~ {Sort.kind}.
"""

SCENE = """
The {object1|n1} {prep1} the {furniture1} {be/n1} {adj1}.
The {animal1|n1} {prep1} the {place1} {be/n1} {degree1} {adj1}.
The {human1|n1} <who {live/n1} {prep1} the {place1}> {liking1/n1} {edible1|pl}.
The {animal1|n1} <that the {human1|pl} {chase/past}> {have/n1} {num1} {size1} {edible1|pl}.
The {human1|n1} {prep1} the {outdoor1|pl} {act.v/n1} {act.o|a} every {day.day}.
The {object1} of the {human1|pl} {be/s} {colour1}, and the {object2|pl} of the {human2} are {colour2}.
There were {num1} {animal1|pl} and {num2} {animal2|pl} {outdoor1|at}.
There were {count.a} {animal1|pl} and {count.b} {animal2|pl}, {count.sum} animals in all.
There was a~ {material1} {object1} {prep1} the {adj1} {object2}.
A~ {colour1} {object1} and a~ {colour2} {object2} lay on the {furniture1}.
It was a~ {weather1} {day.day} in {month.month}, and the {place1} was {adj1}.
It was {weather1} and {weather2}, so nobody {act.v/past} {act.o|a}.
In {month.month}, <when it was {weather1}>, the {human1|pl} {act.v/past} {act.o|a}.
The {group1} {motion1/past} through the {outdoor1} to the {building1}.
The {weather1} wind blew over the {outdoor1}, and the {tree1|pl} were {adj1}.
The {sky1} was {colour1} above the {outdoor1}.
The {ordinal1} {human1} had a~ {object1}, the {ordinal2} had a~ {object2}.
The {human1} <who had a~ {adj1} {clothes1}> {giving1/past} the {human2} {num1} {edible1|pl}.
In the {room1} there was a~ {furniture1}, and on the {furniture1} stood a~ {container1}.
A~ {flower1} grew {prep1} the {tree1}, and {num1} {flower2|pl} grew {prep2} the {building1}.
The {human1} bought {edible1|pl}, {edible2|pl} and {edible3|pl} at the market.
The {trade.job} and the {trade2.job} {act.v/past} {act.o|a} {building1|at}.
Not every {human1} {liking1/s} {edible1|pl}.
No {animal1} has ever {motion1/pp} to the {place1}.
The {container1} was full of {edible1|pl}, but the {container2} was empty.
{tens1} {human1|pl} {motion1/past} to {land.city} to see the {adj1} {building1}.
The {size1} {animal1} was {adj1}, and the {size2} {animal2} was {adj2}.
The {human1} {manner1} {act.v/past} {act.o|a}, then {motion1/past} {manner2} to the {place1}.
The {beast.name} {beast.v/past}, and the {beast2.name} {beast2.v/past} {manner1}.
The {treasure1} cost {tens1} coins, and the {treasure2} cost only {num1}.
The {human1|n1} near the {animal1|pl} {be/n1} {comp1} than the {human2}.
The {super1} {human1} of the {group1} {act.v/past} {act.o|a}.
Of all the {human1|pl}, the {trait1} {human1} was the {super1}.
The {building1} was built by a~ {trade.job} from {land.city}.
If the {weather1} weather does not change, the {flower1|pl} will not grow.
The {human1} <whose {act.o} was {act.v/pp} by the {human2}> was {bad1}.
In spring the {tree1|pl} are green, in autumn they are {colour1}.
Every {human1} has a~ {object1}, but only one {human1} has a~ {material1} {object1}.
"""

GROUPS: dict[str, tuple[str, ...]] = {
    name: tuple(line for line in text.strip().splitlines())
    for name, text in (
        ("open", OPEN), ("about", ABOUT), ("pair", PAIR), ("talk", TALK), ("recall", RECALL), ("world", WORLD),
        ("scene", SCENE),
    )
}  # fmt: skip

# What a tale is made of: the group of its first sentence, then the weights of the groups of the others.
PLANS: tuple[tuple[float, str, dict[str, float]], ...] = (
    (0.36, "open", {"about": 5, "recall": 4, "scene": 1.5, "pair": 1}),
    (0.22, "open", {"pair": 4, "talk": 3, "recall": 2, "about": 2}),
    (0.14, "open", {"talk": 5, "recall": 2, "pair": 1.5, "about": 1}),
    (0.18, "world", {"world": 6, "recall": 3, "scene": 1}),
    (0.10, "scene", {"scene": 5, "about": 2, "recall": 1.5, "world": 1}),
)
