"""The words and the sentence patterns that `tasks.py` builds facts and filler from. Written for this package."""

COLOURS = (
    "red", "blue", "green", "white", "black", "grey", "brown", "golden", "silver", "amber", "scarlet", "purple",
    "pale", "dark", "bright", "old", "young", "little", "great", "broken", "hidden", "silent", "wooden", "iron",
    "stone", "round", "heavy", "gentle", "lonely", "proud", "quiet", "wild", "clever", "distant", "empty",
    "frozen", "hollow", "narrow", "painted", "rusty", "simple", "sleepy", "velvet", "windy", "ancient", "bitter",
    "crooked", "faded", "lazy", "marble",
)  # fmt: skip
THINGS = (
    "falcon", "horse", "river", "garden", "tower", "lantern", "bridge", "forest", "island", "castle", "ship",
    "bell", "clock", "mirror", "window", "door", "table", "chair", "letter", "book", "sword", "crown", "ring",
    "coat", "hat", "glove", "boot", "wagon", "wheel", "mill", "barn", "church", "school", "market", "street",
    "valley", "mountain", "lake", "ocean", "harbour", "beach", "desert", "meadow", "orchard", "apple", "pear",
    "cherry", "rose", "lily", "oak", "pine", "willow", "fox", "wolf", "bear", "deer", "rabbit", "sparrow",
    "eagle", "owl", "raven", "swan", "goose", "duck", "trout", "whale", "tiger", "lion", "camel", "donkey",
    "spider", "beetle", "candle", "kettle", "basket", "bottle", "hammer", "ladder", "needle", "ribbon", "carpet",
    "curtain", "blanket", "pillow", "violin", "drum", "trumpet", "flute", "piano", "soldier", "sailor", "doctor",
    "teacher", "baker", "farmer", "hunter", "painter", "singer", "stranger", "widow",
)  # fmt: skip
NAMES = (
    "Nadia", "Omar", "Tamar", "Felix", "Greta", "Hugo", "Ingrid", "Jonas", "Katrin", "Leon", "Mirela", "Nils",
    "Olga", "Pavel", "Quentin", "Rosa", "Selim", "Tilda", "Ulrich", "Vera", "Walter", "Xenia", "Yusuf", "Zora",
    "Agnes", "Bruno", "Clara", "Dmitri", "Elena", "Fatima", "Gustav", "Helga", "Ivan", "Judith", "Karim", "Laura",
    "Marcus", "Nora", "Oscar", "Petra", "Rafael", "Sofia", "Tobias", "Ursula", "Viktor", "Wanda", "Yara", "Anton",
    "Beatrix", "Cyril", "Daphne", "Emil", "Flora", "Gideon", "Hanna", "Isaac", "Jasper", "Kira", "Lydia",
    "Magnus", "Naomi", "Otto", "Paula", "Ramon", "Sabina", "Thea", "Urban", "Violet", "Wilma", "Adrian", "Bertha",
    "Caspar", "Diana", "Edgar", "Frida", "Gregor", "Hector", "Irene", "Jacob", "Kasimir", "Leila", "Martin",
    "Noel", "Ophelia", "Piotr", "Regina", "Stefan", "Teresa", "Vincent", "Wendel", "Yvonne", "Alma", "Boris",
    "Carmen", "David", "Esther",
)  # fmt: skip
SECRETS = (
    "password", "secret number", "ticket number", "lucky number", "key number", "house number", "seat number",
    "pin",
)  # fmt: skip
WHO = (
    "the captain", "the gardener", "my uncle", "her sister", "the innkeeper", "an old clerk", "the judge",
    "the miller", "the schoolmaster", "a tall woman", "the youngest boy", "the postman", "our neighbour",
    "the carpenter", "the cook", "a tired traveller", "the shepherd", "the librarian", "the tailor",
    "a small child", "the ferryman", "the watchman",
)  # fmt: skip
OTHER = (
    "the children", "a friend of the family", "the two brothers", "the new guests", "the priest",
    "a cousin from the north", "the whole village", "the merchants", "his wife", "her father", "the crew",
    "a lawyer from the city", "the servants", "the students", "some soldiers on leave",
    "an aunt nobody knew well", "the mayor", "the nurse", "the dogs",
)  # fmt: skip
PLACE = (
    "in the kitchen", "by the river", "under the old bridge", "at the edge of the wood", "near the station",
    "in the attic", "behind the church", "on the hill", "in the market square", "beside the well", "at the inn",
    "in the long corridor", "on the pier", "in the orchard", "at the foot of the stairs", "across the valley",
    "in the back room", "by the fire", "in the reading room", "at the corner of the street", "below the cliffs",
    "in the shade of the wall",
)  # fmt: skip
WAY = (
    "along the canal", "over the fields", "through the gate", "down the narrow lane", "up the winding path",
    "past the mill", "across the frozen pond", "round the back of the house", "through the tall grass",
    "towards the harbour", "into the hills", "along the garden wall", "out to the islands", "back to the town",
    "through the silent streets",
)  # fmt: skip
OBJECT = (
    "a basket of pears", "an old newspaper", "a box of tools", "a letter without a stamp", "a pair of boots",
    "a map", "a bundle of firewood", "a bottle of ink", "a broken umbrella", "a loaf of bread", "a coil of rope",
    "a wooden spoon", "an empty birdcage", "a heavy trunk", "a jar of honey", "a faded photograph",
    "a set of brushes", "a string of beads", "a bowl of soup", "a torn coat", "a bunch of keys",
    "a lamp with a green shade", "a sack of flour", "a folded note",
)  # fmt: skip
KIND = (
    "patient", "cheerful", "careless", "stubborn", "curious", "polite", "nervous", "honest", "gloomy", "generous",
    "shy", "strict", "sleepy", "proud", "tender", "restless", "modest", "witty", "solemn", "practical", "vain",
    "hopeful",
)  # fmt: skip
WHEN = (
    "in the morning", "late that evening", "before the harvest", "after supper", "on the first day of spring",
    "towards midnight", "at noon", "during the storm", "when the guests had gone", "a week later",
    "all through the winter", "at the end of the summer", "on a Sunday", "just before dawn",
    "while the others slept", "for the second time that day", "once the snow had melted", "on the way home",
    "as the bells rang", "in the middle of the afternoon",
)  # fmt: skip
DID = (
    "waited", "told a long story", "laughed without a reason", "mended the fence", "said nothing at all",
    "sang an old song", "looked out of the window", "wrote a short letter", "sat down to rest",
    "argued about the weather", "lit the lamps", "swept the floor", "fell asleep", "played a game of chess",
    "made a pot of tea", "counted the boats", "fed the horses", "read aloud from a book", "closed the shutters",
    "talked about the harvest", "polished the brass", "went to bed early",
)  # fmt: skip
HOW = (
    "slowly", "without a word", "with great care", "in a hurry", "with a smile", "as usual", "against all advice",
    "with some regret", "half in jest", "very quietly", "with both hands", "as if nothing had happened",
    "out of habit", "for no good reason", "to everyone's surprise", "with a heavy heart",
    "as well as anyone could",
)  # fmt: skip
SKY = (
    "the rain had stopped", "a cold wind came from the sea", "the sun stood low over the roofs",
    "fog lay on the water", "the moon was nearly full", "the leaves had begun to fall", "the snow was still deep",
    "the clouds were breaking up", "the air smelled of hay", "the stars were out", "the tide was going out",
    "thunder rolled far away", "the frost had drawn ferns on the glass", "the road was white with dust",
    "the first swallows were back",
)  # fmt: skip
HEARD = (
    "the price of wool would rise", "the road to the coast was closed", "the old mill had been sold",
    "the theatre was full", "the ferry no longer ran at night", "the well had run dry",
    "a wedding was being planned", "the school needed a new roof", "the harvest had been a good one",
    "the river was too high to cross", "the bakery had changed hands", "nobody had seen the doctor for days",
    "the library would open again", "there was work at the harbour", "the bridge had to be mended",
    "the train was late again", "the apples were not yet ripe",
)  # fmt: skip
TEMPLATES = (
    "{when}, {who} {did}.",
    "{who} {did} {place}.",
    "{who} walked {way}.",
    "{when} {who} went {way} {how}.",
    "{who} carried {thing} {way}.",
    "{who} had left {thing} {place}.",
    "there was {thing} {place}, and nobody knew why.",
    "{who} was {kind}, but {other} did not mind.",
    "{who} and {other} {did} {when}.",
    "{other} had always thought that {who} was rather {kind}.",
    "{who} said that {heard}.",
    "people said that {heard}, though {who} did not believe it.",
    "{sky}, and {who} {did}.",
    "{when} {sky}.",
    "{sky}, so {other} stayed {place}.",
    "{who} gave {thing} to {other} {how}.",
    "{who} looked for {thing} {place}, but found only {thing}.",
    "nobody asked {who} why {heard}.",
    "{who} wanted to know whether {heard}.",
    "it was a {kind} answer, and {other} accepted it {how}.",
    "{place} {who} met {other}.",
    "{who} came {way} with {thing} and {did}.",
    "{how}, {who} put {thing} on the table.",
    "if {heard}, {who} would hear of it {when}.",
    "{other} had gone {way}, and {who} was left with {thing}.",
    "{who} {did}, while {other} looked for {thing}.",
    "a {kind} voice called from somewhere {place}.",
    "{when}, when {sky}, {who} {did} {how}.",
    "{who} remembered {thing} {place} and smiled.",
    "no one could say who had brought {thing}.",
    "{who} used to be {kind}; now {other} hardly spoke of it.",
    "they spoke of {other}, of {thing}, and of how {heard}.",
    "the house {place} belonged to {who}.",
    "{who} would rather have {thing} than a {kind} friend.",
    "{other} returned {way} {when}.",
    "some said {who} was {kind}, others that {heard}.",
    "{when} {other} sat {place} and {who} {did}.",
    "{who} hung {thing} on a nail {place}.",
    "it seemed to {who} that {sky}.",
    "{who} thanked {other} for {thing} {how}.",
)
