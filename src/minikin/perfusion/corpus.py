"""The caption corpus behind C: sentences of our own making, as varied as picture captions are.

    python -m minikin.perfusion.corpus 20000 > captions.txt

Grammar and words are below; the same number gives the same caption everywhere, so the corpus ships
as this file (20,000 captions are made in a third of a second). What matters for C is that the
encodings spread over all directions that prompts use: many nouns, places, styles and lengths
(docs/measurements.md).
"""

from __future__ import annotations

import random
import sys

PEOPLE = """
man woman boy girl child baby person couple family crowd soldier farmer chef dancer doctor nurse
teacher student painter musician singer cyclist runner surfer skier hiker fisherman sailor pilot
astronaut king queen knight wizard pirate clown monk bride groom grandmother grandfather teenager
photographer carpenter firefighter police officer tourist merchant athlete goalkeeper referee waiter
cowboy ninja samurai princess witch robot mermaid giant dwarf elf
""".split()
ANIMALS = """
cat dog kitten puppy horse pony cow bull sheep lamb goat pig chicken rooster duck goose swan turkey
rabbit hare squirrel hedgehog fox wolf bear panda koala kangaroo lion tiger leopard cheetah elephant
rhino hippo giraffe zebra camel llama deer moose monkey gorilla parrot owl eagle hawk pigeon crow
sparrow penguin flamingo peacock frog toad turtle tortoise snake lizard crocodile dinosaur dragon
unicorn fish shark whale dolphin octopus crab lobster jellyfish seal snail butterfly bee ladybug
spider ant dragonfly beaver otter raccoon skunk mouse hamster donkey ostrich bat
""".split()
THINGS = """
chair table sofa bed desk lamp candle mirror clock window door carpet curtain pillow blanket vase
bowl plate cup mug teapot kettle bottle glass jar spoon fork knife pan basket box suitcase backpack
bag umbrella hat cap crown scarf glove coat jacket shirt dress shoe boot sock necklace ring watch
camera phone computer laptop keyboard television radio guitar piano violin drum trumpet flute book
newspaper map letter pencil pen brush painting statue sculpture toy doll kite balloon ball bicycle
motorcycle car truck bus train tram tractor boat ship canoe sailboat submarine airplane helicopter
rocket spaceship bridge tower castle palace church temple house cottage barn hut tent windmill
lighthouse fountain bench fence gate wall roof chimney staircase ladder hammer saw axe shovel wheel
engine gear anchor rope chain bell flag sign lantern mask sword shield arrow cannon telescope
microscope globe chess trophy gift cake snowman teddy robot puppet puzzle skateboard surfboard sled
tree flower rose tulip sunflower daisy cactus mushroom pumpkin leaf bush grass vine acorn pinecone
shell feather stone crystal diamond coin key lock
""".split()
FOOD = """
apple banana orange lemon lime pear peach cherry strawberry raspberry blueberry grape melon
watermelon pineapple coconut mango kiwi tomato potato carrot onion garlic pepper cucumber lettuce
corn broccoli bread sandwich burger pizza pasta rice soup salad cheese egg bacon sausage steak fish
sushi taco pancake waffle donut cookie cupcake pie chocolate candy ice cream coffee tea juice wine
beer milk honey croissant pretzel noodles curry
""".split()
ADJECTIVES = """
red orange yellow green blue purple pink brown black white gray golden silver teal crimson turquoise
beige striped dotted checkered colorful pale dark bright shiny matte glossy rusty dusty dirty clean
wet dry old new ancient modern antique young small tiny little big large huge giant tall short long
thin thick round square flat curved broken cracked wooden metal plastic glass paper leather woolen
silk cotton marble stone concrete ceramic fluffy furry smooth rough soft hard heavy light happy sad
angry sleepy tired lonely proud shy brave curious playful elegant beautiful ugly cute funny strange
mysterious magical famous ordinary simple complex cheap expensive fresh rotten frozen burning
glowing transparent floating sleeping empty full open closed abandoned crowded quiet noisy
""".split()
ACTIONS = """
sitting standing running walking jumping sleeping eating drinking reading writing painting playing
dancing singing swimming flying climbing riding driving fishing cooking working resting waiting
laughing crying smiling looking fighting hiding falling skating skiing surfing
""".split()
PLACES = """on the beach|in the forest|in the snow|in a meadow|on a mountain|by the river|at the lake|in
the desert|in the jungle|in a cave|on an island|in the city|on a busy street|in a village|in a park|in
a garden|on a farm|in the kitchen|in the living room|in a bedroom|in the bathroom|in an office|in a
classroom|in a library|in a museum|at the market|in a shop|in a restaurant|in a cafe|at a train
station|at the airport|in a hospital|in a factory|in a church|in front of a castle|on a bridge|on the
roof|under a tree|under the sea|in the sky|among the clouds|in outer space|on the moon|on a wooden
table|on a chair|on the grass|on a rock|in a box|in a field of flowers|next to a window|near a wall|in
front of a brick wall|on a stage|in the rain|in the fog|at night|at sunset|at sunrise|in the morning|in
winter|in summer|in autumn|under the stars|on a plain background|on a white background|on a blue
background|against a black background""".replace("\n", " ").split("|")
STYLES = """a photo of|a photograph of|a picture of|an image of|a painting of|an oil painting of|a
watercolor of|a drawing of|a pencil sketch of|an illustration of|a cartoon of|a 3d render of|a close up
of|a closeup photo of|a portrait of|a black and white photo of|a poster of|a sculpture of|a statue of|a
sticker of|pixel art of|a vintage photo of|an aerial view of|a macro shot of|a digital painting of|a
child's drawing of|the photo of|a blurry photo of|a good photo of|concept art of""".replace("\n", " ").split(
    "|"
)
ENDINGS = """high quality|highly detailed|sharp focus|soft light|dramatic lighting|cinematic|bokeh|studio
lighting|35mm film|in the style of van gogh|in the style of monet|minimalist|by a famous
artist|trending|masterpiece|warm colors|pastel colors|long exposure|golden hour|wide angle|isometric|flat
design|vector art|watercolor on paper""".replace("\n", " ").split("|")
RELATIONS = """next to|and|with|on top of|behind|in front of|under|near|holding|beside|to the left of|to
the right of|above|inside|looking at""".replace("\n", " ").split("|")
NUMBERS = """
two three four five several many some
""".split()


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _noun(r: random.Random) -> tuple[str, bool]:
    """A noun, and whether it is alive."""
    pool = r.choices((PEOPLE, ANIMALS, THINGS, FOOD), (2, 3, 4, 1.5))[0]
    return r.choice(pool), pool in (PEOPLE, ANIMALS)


def _phrase(r: random.Random) -> str:
    noun, alive = _noun(r)
    words = [*r.sample(ADJECTIVES, r.choices((0, 1, 2), (4, 4, 1))[0]), noun]
    roll = r.random()
    if roll < 0.08:
        return f"{r.choice(NUMBERS)} {' '.join(words)}s"
    phrase = ("the " + " ".join(words)) if roll < 0.14 else _article(" ".join(words))
    if alive and r.random() < 0.35:
        phrase += f" {r.choice(ACTIONS)}"
    return phrase


def caption(number: int) -> str:
    """Caption number `number` of the corpus."""
    r = random.Random(number * 7919 + 17)
    text = _phrase(r)
    if r.random() < 0.30:
        text += f" {r.choice(RELATIONS)} {_phrase(r)}"
    if r.random() < 0.60:
        text += f" {r.choice(PLACES)}"
    if r.random() < 0.55:
        text = f"{r.choice(STYLES)} {text}"
    for ending in r.sample(ENDINGS, r.choices((0, 1, 2, 3), (6, 2, 1, 0.5))[0]):
        text += f", {ending}"
    return text


def captions(n: int) -> list[str]:
    """The first `n` captions that differ from each other."""
    found: dict[str, None] = {}
    number = 0
    while len(found) < n:
        found[caption(number)] = None
        number += 1
    return list(found)


if __name__ == "__main__":
    print("\n".join(captions(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)))
