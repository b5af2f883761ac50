"""The words of the sticker world: what exists in it and what it is called.

Pure data, no drawing. A *drawing* is named by (art set, Unicode code point); a *category* owns
several drawings. Two sizes of one world are defined at the end: `SMALL` can be learned well on two
processor cores, `WIDE` is for training on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Category:
    """One kind of object: the code points that draw it and the words that name it."""

    name: str
    codes: tuple[str, ...]
    kind: str  # animal, toy, vehicle, food, furniture, instrument, hat, ball, thing, plant, building
    plural: str
    synonyms: tuple[str, ...] = ()
    hat_codes: tuple[str, ...] = ()  # drawings that carry a hat well
    is_support: bool = False  # others can stand on it
    can_hold: bool = False  # can carry a small thing


@dataclass(frozen=True)
class ArtSet:
    """One drawing style: where it comes from and the words a caption may use for it."""

    package: str
    licence: str
    credit: str
    words: tuple[str, ...]


ART_SETS = {
    "f3d": ArtSet(
        "@lobehub/fluent-emoji-3d", "MIT", "Fluent Emoji, (c) Microsoft Corporation",
        ("3d render", "3d rendering", "glossy 3d model"),
    ),
    "flat": ArtSet(
        "@iconify-json/fluent-emoji-flat", "MIT", "Fluent Emoji (flat), (c) Microsoft Corporation",
        ("flat illustration", "flat vector drawing", "minimal flat illustration"),
    ),
    "noto": ArtSet(
        "@iconify-json/noto", "Apache-2.0", "Noto Emoji, (c) Google LLC",
        ("cartoon", "cartoon drawing", "cartoon illustration"),
    ),
    "twe": ArtSet(
        "@iconify-json/twemoji", "CC-BY-4.0", "Twemoji, (c) Twitter, Inc and other contributors",
        ("simple icon", "clip art", "clipart drawing"),
    ),
}  # fmt: skip

# name | code points | kind | plural | synonyms | code points that carry a hat | support, hold
_TABLE = """
cat        | 1f408 1f431 | animal | cats | kitty, kitten | 1f431 | hold
dog        | 1f415 1f436 | animal | dogs | puppy | 1f436 | hold
rabbit     | 1f407 1f430 | animal | rabbits | bunny | 1f430 | hold
bear       | 1f43b | animal | bears | | 1f43b | hold
panda      | 1f43c | animal | pandas | | 1f43c | hold
fox        | 1f98a | animal | foxes | | 1f98a |
lion       | 1f981 | animal | lions | | 1f981 |
tiger      | 1f405 1f42f | animal | tigers | | 1f42f |
cow        | 1f404 1f42e | animal | cows | | 1f42e | support
pig        | 1f416 1f437 | animal | pigs | | 1f437 | support
horse      | 1f40e 1f434 | animal | horses | pony | |
elephant   | 1f418 | animal | elephants | | | support
giraffe    | 1f992 | animal | giraffes | | |
monkey     | 1f412 1f435 | animal | monkeys | | 1f435 | hold
penguin    | 1f427 | animal | penguins | | 1f427 | hold
owl        | 1f989 | animal | owls | | 1f989 |
duck       | 1f986 | animal | ducks | | |
chick      | 1f425 1f424 | animal | chicks | baby chick | 1f425 1f424 |
parrot     | 1f99c | animal | parrots | | |
frog       | 1f438 | animal | frogs | | 1f438 | hold
turtle     | 1f422 | animal | turtles | tortoise | | support
fish       | 1f41f 1f420 | animal | fish | | |
whale      | 1f433 1f40b | animal | whales | | | support
octopus    | 1f419 | animal | octopuses | | 1f419 |
crab       | 1f980 | animal | crabs | | |
butterfly  | 1f98b | animal | butterflies | | |
snail      | 1f40c | animal | snails | | |
dinosaur   | 1f995 1f996 | animal | dinosaurs | | |
unicorn    | 1f984 | animal | unicorns | | |
teddy bear | 1f9f8 | toy | teddy bears | teddy, plush teddy bear, stuffed bear | 1f9f8 | hold
robot      | 1f916 | toy | robots | | 1f916 | hold
ghost      | 1f47b | toy | ghosts | | 1f47b | hold
snowman    | 26c4 | toy | snowmen | | |
car        | 1f697 1f699 | vehicle | cars | automobile | | support
bus        | 1f68c | vehicle | buses | | | support
truck      | 1f69a | vehicle | trucks | lorry | | support
tractor    | 1f69c | vehicle | tractors | | |
bicycle    | 1f6b2 | vehicle | bicycles | bike | |
train      | 1f682 | vehicle | trains | steam train | | support
airplane   | 2708 1f6e9 | vehicle | airplanes | plane, aeroplane | |
helicopter | 1f681 | vehicle | helicopters | | |
rocket     | 1f680 | vehicle | rockets | spaceship | |
sailboat   | 26f5 | vehicle | sailboats | boat, sailing boat | |
apple      | 1f34e | food | apples | | |
banana     | 1f34c | food | bananas | | |
strawberry | 1f353 | food | strawberries | | |
pineapple  | 1f34d | food | pineapples | | |
watermelon | 1f349 | food | watermelons | | |
carrot     | 1f955 | food | carrots | | |
pizza      | 1f355 | food | pizzas | slice of pizza | |
hamburger  | 1f354 | food | hamburgers | burger | | support
donut      | 1f369 | food | donuts | doughnut | |
cake       | 1f382 | food | cakes | birthday cake | | support
cupcake    | 1f9c1 | food | cupcakes | | |
ice cream  | 1f366 1f368 | food | ice creams | | |
chair      | 1fa91 | furniture | chairs | | | support
sofa       | 1f6cb | furniture | sofas | couch | | support
teapot     | 1fad6 | thing | teapots | tea pot | |
cup        | 2615 | thing | cups | cup of coffee, coffee cup, mug | |
guitar     | 1f3b8 | instrument | guitars | | |
trumpet    | 1f3ba | instrument | trumpets | | |
drum       | 1f941 | instrument | drums | | | support
top hat    | 1f3a9 | hat | top hats | | |
crown      | 1f451 | hat | crowns | | |
straw hat  | 1f452 | hat | straw hats | sun hat | |
soccer ball | 26bd | ball | soccer balls | football | | support
basketball | 1f3c0 | ball | basketballs | | | support
book       | 1f4d5 | thing | books | | |
umbrella   | 2602 | thing | umbrellas | | |
backpack   | 1f392 | thing | backpacks | rucksack | |
shoe       | 1f45f | thing | shoes | sneaker | |
camera     | 1f4f7 | thing | cameras | | |
alarm clock | 23f0 | thing | alarm clocks | clock | |
gift       | 1f381 | thing | gifts | present, gift box | | support
balloon    | 1f388 | thing | balloons | | |
house      | 1f3e0 | building | houses | | | support
tent       | 26fa | building | tents | | |
castle     | 1f3f0 | building | castles | | |
tree       | 1f333 | plant | trees | | |
palm tree  | 1f334 | plant | palm trees | | |
cactus     | 1f335 | plant | cacti | | |
mushroom   | 1f344 | plant | mushrooms | | | support
sunflower  | 1f33b | plant | sunflowers | | |
rose       | 1f339 | plant | roses | | |
pumpkin    | 1f383 | plant | pumpkins | jack-o-lantern | | support
"""


def _parse(line: str) -> Category:
    name, codes, kind, plural, synonyms, hats, *flags = (part.strip() for part in line.split("|"))
    return Category(
        name, tuple(codes.split()), kind, plural,
        tuple(s.strip() for s in synonyms.split(",") if s.strip()), tuple(hats.split()),
        is_support="support" in flags, can_hold="hold" in flags,
    )  # fmt: skip


CATEGORIES = {c.name: c for c in map(_parse, _TABLE.strip().splitlines())}

COLOURS = {
    "red": (220, 40, 45), "orange": (245, 135, 35), "yellow": (250, 210, 50), "green": (60, 170, 75),
    "blue": (50, 110, 225), "purple": (140, 70, 200), "pink": (250, 130, 185), "brown": (135, 85, 50),
    "black": (55, 55, 62), "white": (235, 235, 238), "teal": (30, 165, 165),
}  # fmt: skip

# pattern -> adjectives; a patterned object shows two colours
PATTERNS = {
    "stripes": ("striped",),
    "dots": ("dotted", "polka dot"),
    "checker": ("checkered",),
    "patches": ("patchy", "spotted"),
}

# background -> phrases that can follow the subject
BACKGROUNDS = {
    "snow": ("in the snow", "in a snowy field", "on the snow", "in a winter landscape"),
    "beach": ("on the beach", "at the beach", "on a sandy beach", "by the sea"),
    "forest": ("in the forest", "in a forest", "in the woods", "in a green forest"),
    "night": ("at night", "under the night sky", "under the stars", "under a starry sky"),
    "city": ("in the city", "on a city street", "in front of city buildings", "on the street"),
    "desert": ("in the desert", "in a sandy desert", "on desert dunes"),
    "meadow": ("in a meadow", "on the grass", "in a field of flowers", "on a grassy hill"),
    "underwater": ("underwater", "under the sea", "in the ocean", "under water"),
    "table": ("on a wooden table", "on a table", "on wooden planks"),
    "brick": ("in front of a brick wall", "against a brick wall", "near a brick wall"),
    "mountains": ("in the mountains", "in front of mountains", "with mountains in the background"),
    "space": ("in space", "in outer space", "floating in space", "among the planets"),
    "sunset": ("at sunset", "in front of a sunset", "during sunset"),
    "room": ("in a room", "in the living room", "indoors", "inside a house"),
    "sky": ("in the sky", "among the clouds", "in the blue sky", "in the clouds"),
    "rain": ("in the rain", "on a rainy day", "in rainy weather"),
    "stage": ("on a stage", "in the spotlight", "on stage"),
    "volcano": ("near a volcano", "in front of a volcano", "by a volcano"),
}

SIZES = {"tiny": ("tiny", "very small", "little"), "huge": ("huge", "giant", "very big")}

# treatments of the whole image, in the wide world
TREATMENTS = {
    "pixel": ("pixel art", "pixelated", "8-bit"),
    "bw": ("black and white", "monochrome"),
    "sketch": ("pencil sketch", "line drawing", "sketch"),
}

GENERIC = (
    "a photo of", "a photo of", "a photo of", "a picture of",  # word: caption
    "an image of", "a drawing of",
    "an illustration of", "a photograph of", "a view of",
)  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """One personal thing, held out of training: a drawing repainted in a pattern."""

    name: str
    category: str
    art: str
    code: str
    pattern: str
    colours: tuple[tuple[int, int, int], tuple[int, int, int]]


@dataclass(frozen=True)
class WorldSpec:
    """Contents of a world and their frequencies."""

    name: str
    categories: tuple[str, ...]
    art: tuple[str, ...]
    backgrounds: tuple[str, ...]
    plain: tuple[str, ...]
    colours: tuple[str, ...]
    hats: tuple[str, ...]
    holdables: tuple[str, ...]
    layouts: tuple[tuple[str, float], ...]  # (layout, share); shares add up to 1
    sticker_share: float = 0.0
    treatment_share: float = 0.0
    colour_share: float = 0.22
    pattern_share: float = 0.14
    containers: tuple[str, ...] = ()  # that another thing can look out of
    is_rich: bool = False  # layouts.RichLayouts

    @property
    def objects(self) -> tuple[str, ...]:
        """The categories that can be the subject of an image; hats cannot."""
        return tuple(c for c in self.categories if CATEGORIES[c].kind != "hat")


SMALL = WorldSpec(
    name="small",
    categories=(
        "cat", "dog", "rabbit", "penguin", "duck", "teddy bear", "robot", "car", "rocket", "sailboat",
        "chair", "teapot", "guitar", "backpack", "soccer ball", "mushroom", "cactus", "apple", "top hat",
    ),
    art=("f3d", "flat"),
    backgrounds=("snow", "beach", "forest", "night", "city", "meadow", "room", "desert"),
    plain=("white", "blue", "pink", "yellow", "green"),
    colours=("red", "yellow", "green", "blue", "purple"),
    hats=("top hat",),
    holdables=(),
    layouts=(("single", 0.66), ("pair", 0.20), ("hat", 0.08), ("count", 0.06)),
)  # fmt: skip

WIDE = WorldSpec(
    name="wide",
    categories=tuple(CATEGORIES),
    art=tuple(ART_SETS),
    backgrounds=tuple(BACKGROUNDS),
    plain=("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white", "teal"),
    colours=("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white"),
    hats=("top hat", "crown", "straw hat"),
    holdables=(
        "balloon", "apple", "banana", "rose", "guitar", "cup", "ice cream", "donut", "umbrella", "gift",
        "sunflower", "trumpet", "carrot", "book", "soccer ball", "camera",
    ),
    layouts=(("single", 0.56), ("pair", 0.18), ("hat", 0.08), ("top", 0.06), ("hold", 0.05),
             ("count", 0.05), ("empty", 0.02)),
    sticker_share=0.10,
    treatment_share=0.075,
)  # fmt: skip

# The small world's objects in more styles, colours, patterns, backgrounds and relations.
RICH = replace(
    SMALL,
    name="rich",
    art=tuple(ART_SETS),
    backgrounds=(*SMALL.backgrounds, "table", "space", "sunset", "underwater", "brick", "mountains"),
    colours=WIDE.colours,
    holdables=("apple", "guitar", "soccer ball", "mushroom", "cactus"),
    containers=("backpack", "car", "teapot", "top hat"),
    layouts=(("single", 0.42), ("pair", 0.18), ("trio", 0.07), ("hat", 0.06), ("on", 0.07), ("front", 0.06),
             ("hold", 0.05), ("in", 0.04), ("count", 0.04), ("empty", 0.01)),
    pattern_share=0.32,
    is_rich=True,
)  # fmt: skip

WORLDS = {w.name: w for w in (SMALL, RICH, WIDE)}
LAYOUTS = tuple(dict.fromkeys(name for w in WORLDS.values() for name, _ in w.layouts))

_IDENTITIES = """
my_cat      | cat        | noto | 1f408 | stripes | 128,70,200 | 255,214,70
my_cat2     | cat        | noto | 1f408 | dots    | 128,70,200 | 255,214,70
my_dog      | dog        | f3d  | 1f9ae | patches | 90,150,235 | 250,245,230
my_teddy    | teddy bear | twe  | 1f9f8 | dots    | 70,190,160 | 255,130,180
my_robot    | robot      | noto | 1f916 | checker | 240,90,70  | 250,235,190
my_chair    | chair      | noto | 1fa91 | checker | 20,150,160 | 245,240,225
my_teapot   | teapot     | twe  | 1fad6 | stripes | 240,120,40 | 40,80,190
my_guitar   | guitar     | twe  | 1f3b8 | stripes | 45,170,90  | 250,220,120
my_car      | car        | twe  | 1f699 | dots    | 235,80,140 | 255,250,235
my_backpack | backpack   | noto | 1f392 | patches | 60,70,150  | 250,170,60
"""


def _identity(line: str) -> Identity:
    name, category, art, code, pattern, a, b = (part.strip() for part in line.split("|"))
    return Identity(name, category, art, code, pattern, (_rgb(a), _rgb(b)))


def _rgb(text: str) -> tuple[int, int, int]:
    red, green, blue = map(int, text.split(","))
    return red, green, blue


# The personal things of the examples and tests. my_cat and my_cat2 differ only in pattern.
IDENTITIES = {i.name: i for i in map(_identity, _IDENTITIES.strip().splitlines())}

# No drawing of an identity is ever drawn in training, in any colour.
WITHHELD = frozenset((i.art, i.code) for i in IDENTITIES.values())
