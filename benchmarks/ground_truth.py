"""Counting right images on tiny's world, where what is right is known.

    truth = Truth.open()
    asked = questions(truth.world, "my_dog", 40, seed=1)
    images = ...                       paint every q.prompt ("<my_dog> to the left of a cat ...")
    truth.count(asked, images)         share of right ones by bar: object, background, relation, identity, ...
    truth.ceiling(asked)                 the same on the world's own drawings of these questions

Bars are those of tiny's evaluation (`tools.tiny_training.evaluation.rules`), and two more: *identity*, it is
this very thing (identities.py), and *all*, every bar the prompt asks for. The classifier that decides
is not always right; the ceiling is its own accuracy on scenes it never saw and belongs beside
every count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tools.tiny_training.evaluation.prompts import Asked, AskedThing
from tools.tiny_training.evaluation.rules import BARS, Answers, answers_of, judge

from benchmarks.identities import Change, Identities, Side
from minikin.errors import BadRecipe, UnknownName
from minikin.evaluation.intervals import Measured, share
from minikin.tiny import vocabulary as words
from minikin.tiny.encoders.classifier import Classifier
from minikin.tiny.encoders.fields import slots_of
from minikin.tiny.world import Scene, Thing, World

OWN = ("identity", "all")  # bars beyond tiny's
STREAM = 404  # of question scenes, apart from all streams of training
PAIRS = 2  # every second question is about a pair


@dataclass(frozen=True)
class Question:
    """A prompt about an identity, and what it asks for.

    prompt  with <name> where the identity stands; `asked.prompt` has its category there
    side    the half of the image in which it must be, or all of it
    """

    prompt: str
    identity: str
    side: Side
    asked: Asked


@dataclass(frozen=True)
class Counted:
    """For each image the bars it was asked and whether it was right, and their shares."""

    rights: Sequence[Mapping[str, bool]]

    @property
    def shares(self) -> dict[str, Measured]:
        """Share of right images by bar, with Wilson's interval, over those that were asked."""
        out = {}
        for bar in (*BARS, *OWN):
            asked = [r[bar] for r in self.rights if bar in r]
            if asked:
                out[bar] = share(sum(asked), len(asked))
        return out


def questions(world: World, identity: str, n: int, seed: int = 0) -> list[Question]:
    """n questions about one identity: alone, and in a pair with its side given, by turns.

    Backgrounds go round, so each is asked about as often as any other. Raises UnknownName.
    """
    if identity not in words.IDENTITIES:
        raise UnknownName("identity", identity, words.IDENTITIES)
    places = [*world.spec.backgrounds, *(f"plain_{c}" for c in world.spec.plain)]
    number = list(words.IDENTITIES).index(identity)
    order = np.random.default_rng((STREAM, seed, number)).permutation(len(places))
    out = []
    for i in range(n):
        rng = np.random.default_rng((STREAM, seed, number, i))
        where = places[int(order[i // PAIRS % len(places)])]
        layout = "pair" if i % PAIRS else "single"
        scene = world.decide(rng, seed, i, layout=layout, background=where, identity=identity)
        out.append(_question(scene, identity))
    return out


class Truth:
    """The world, its classifier, and how it knows identities."""

    def __init__(self, world: World, classifier: Classifier, identities: Identities) -> None:
        self.world, self.classifier, self.identities = world, classifier, identities

    @classmethod
    def open(
        cls, names: Sequence[str] = tuple(words.IDENTITIES), *, world: str = "small",
        weights: Path | None = None, change: Change | None = None,
    ) -> Truth:  # fmt: skip
        """Open the embedded classifier, or one from a file, and show it these identities.

        names   everything that is to be told apart
        change  what happens to a drawing before it is judged (an autoencoder's round trip, say)
        Raises AssetError when the classifier is missing or damaged, UnknownName.
        """
        drawer, classifier = World(world), Classifier.open(weights)
        return cls(drawer, classifier, Identities.learn(drawer, classifier, names, change))

    def count(self, asked: Sequence[Question], pictures: Sequence[Image.Image] | np.ndarray) -> Counted:
        """Judge one image for each question. Raises BadRecipe when they are not as many."""
        if len(asked) != len(pictures):
            raise BadRecipe(f"{len(asked)} questions but {len(pictures)} images: paint one for each.")
        batch = np.stack([np.asarray(p if isinstance(p, np.ndarray) else p.convert("RGB")) for p in pictures])
        seen = answers_of(self.classifier.look(batch))
        is_it = self.identities.recognise(batch, [q.identity for q in asked], [q.side for q in asked])
        out = []
        for question, answers, same in zip(asked, seen, is_it, strict=True):
            bars = judge(question.asked, _knowing(answers, question) if same else answers)
            bars["identity"] = bool(same)
            out.append({**bars, "all": all(bars.values())})
        return Counted(out)

    def ceiling(self, asked: Sequence[Question], change: Change | None = None) -> Counted:
        """The same for the world's own drawings of the questions: the judges' own accuracy."""
        drawn = np.stack([np.asarray(self.world.draw(q.asked.scene)[0]) for q in asked])
        return self.count(asked, change(drawn) if change else drawn)


def _knowing(seen: Answers, question: Question) -> Answers:
    """The answers once the identity is recognised: then its category, in its slot, is no question.

    The classifier's own answer is about drawings of its world, to which no identity belongs: it names the
    category of a drawn identity right in 4 of 10 images only.
    """
    first, second = seen.objects
    category = words.IDENTITIES[question.identity].category
    return replace(seen, objects=(first, category) if question.side == "right" else (category, second))


def _question(scene: Scene, identity: str) -> Question:
    where = _where(scene)
    things = [t for t in slots_of(scene) if t is not None]
    own, plain = (_sentence(things, where, name) for name in (identity, None))
    side: Side = "all"
    if len(things) > 1:
        side = "left" if things[0].identity else "right"
    asked = Asked(
        plain, scene, scene.layout, tuple(AskedThing(t.category) for t in things), scene.background,
        art=None, size=None, count=None, has_sides=len(things) > 1,
    )  # fmt: skip
    return Question(own, identity, side, asked)


def _sentence(things: Sequence[Thing], where: str, identity: str | None) -> str:
    nouns = [f"<{identity}>" if t.identity and identity else _article(t.category) for t in things]
    if len(nouns) == 1:
        return f"a photo of {nouns[0]} {where}"
    # sides are told from the identity's point of view, as people do
    if things[0].identity:
        return f"{nouns[0]} to the left of {nouns[1]} {where}"
    return f"{nouns[1]} to the right of {nouns[0]} {where}"


def _where(scene: Scene) -> str:
    if scene.is_plain:
        return f"on {_article(scene.background[6:])} background"
    return words.BACKGROUNDS[scene.background][0]


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
