"""Accuracy of generated images on tiny's world, where the right answer is known.

    truth = Truth.open()
    cases = questions(truth.world, "my_dog", 40, seed=1)
    images = ...                  generate every q.prompt ("<my_dog> to the left of a cat ...")
    truth.score(cases, images)    share of right images by criterion: object, background, relation, ...
    truth.ceiling(cases)          the same on the world's own drawings of these questions

Criteria are those of tiny's evaluation (`tools.tiny_training.evaluation.rules`), and two more: *identity*, the
image shows this very thing (identities.py), and *all*, every criterion of the prompt. The classifier makes
mistakes; the ceiling is its own accuracy on held-out scenes and belongs beside every result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tools.tiny_training.evaluation.prompts import PromptSpec, ThingSpec
from tools.tiny_training.evaluation.rules import BARS, Answers, answers_of, score

from benchmarks.identities import Change, Identities, Side
from minikin.errors import BadRecipe, UnknownName
from minikin.evaluation.intervals import Estimate, wilson_share
from minikin.tiny import vocabulary as words
from minikin.tiny.encoders.classifier import Classifier
from minikin.tiny.encoders.fields import slots_of
from minikin.tiny.world import Scene, Thing, World

EXTRA = ("identity", "all")  # criteria beyond tiny's
STREAM = 404  # of question scenes, apart from all streams of training
PAIRS = 2  # every second question is about a pair


@dataclass(frozen=True)
class Question:
    """A prompt about an identity, with the right answers.

    prompt  with <name> in place of the identity; `spec.prompt` has its category there
    side    the half of the image in which it must be, or all of it
    """

    prompt: str
    identity: str
    side: Side
    spec: PromptSpec


@dataclass(frozen=True)
class Accuracy:
    """For each image, whether it meets the criteria of its prompt."""

    images: Sequence[Mapping[str, bool]]

    @property
    def shares(self) -> dict[str, Estimate]:
        """Share of right images by criterion, with Wilson's interval, over the images that have it."""
        shares = {}
        for criterion in (*BARS, *EXTRA):
            right = [image[criterion] for image in self.images if criterion in image]
            if right:
                shares[criterion] = wilson_share(sum(right), len(right))
        return shares


def questions(world: World, identity: str, n: int, seed: int = 0) -> list[Question]:
    """n questions about one identity, alternately alone and in a pair with its side given.

    Every background occurs equally often. Raises UnknownName.
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
    """The world, its classifier, and the identities it recognises."""

    def __init__(self, world: World, classifier: Classifier, identities: Identities) -> None:
        self.world, self.classifier, self.identities = world, classifier, identities

    @classmethod
    def open(
        cls, names: Sequence[str] = tuple(words.IDENTITIES), *, world: str = "small",
        weights: Path | None = None, change: Change | None = None,
    ) -> Truth:  # fmt: skip
        """Open the embedded classifier, or one from a file, and learn these identities.

        names   all identities that are told apart
        change  is applied to drawings before they are classified, for example an autoencoder's round trip
        Raises AssetError when the classifier is missing or damaged, UnknownName.
        """
        drawings, classifier = World(world), Classifier.open(weights)
        return cls(drawings, classifier, Identities.learn(drawings, classifier, names, change))

    def score(self, cases: Sequence[Question], images: Sequence[Image.Image] | np.ndarray) -> Accuracy:
        """Classify one image for each question. Raises BadRecipe when they are not as many."""
        if len(cases) != len(images):
            raise BadRecipe(f"{len(cases)} questions but {len(images)} images: generate one for each.")
        batch = np.stack([np.asarray(i if isinstance(i, np.ndarray) else i.convert("RGB")) for i in images])
        answers = answers_of(self.classifier.predict(batch))
        same = self.identities.recognise(batch, [q.identity for q in cases], [q.side for q in cases])
        results = []
        for question, answer, is_same in zip(cases, answers, same, strict=True):
            criteria = score(question.spec, _with_identity(answer, question) if is_same else answer)
            criteria["identity"] = bool(is_same)
            results.append({**criteria, "all": all(criteria.values())})
        return Accuracy(results)

    def ceiling(self, cases: Sequence[Question], change: Change | None = None) -> Accuracy:
        """Accuracy of the classifier on the world's own drawings of the questions."""
        drawings = np.stack([np.asarray(self.world.draw(q.spec.scene)[0]) for q in cases])
        return self.score(cases, change(drawings) if change else drawings)


def _with_identity(answers: Answers, question: Question) -> Answers:
    """The answers with the category of the recognised identity in its slot.

    The classifier was trained on other drawings: it names the category of an identity right in 4 of 10
    images only.
    """
    first, second, *third = answers.objects
    category = words.IDENTITIES[question.identity].category
    pair = (first, category) if question.side == "right" else (category, second)
    return replace(answers, objects=(*pair, *third))


def _question(scene: Scene, identity: str) -> Question:
    where = _where(scene)
    things = slots_of(scene)
    with_name, plain = (_sentence(things, where, name) for name in (identity, None))
    side: Side = "all"
    if len(things) > 1:
        side = "left" if things[0].identity else "right"
    spec = PromptSpec(
        plain, scene, scene.layout, tuple(ThingSpec(t.category) for t in things), scene.background,
        art=None, size=None, count=None, has_sides=len(things) > 1,
    )  # fmt: skip
    return Question(with_name, identity, side, spec)


def _sentence(things: Sequence[Thing], where: str, identity: str | None) -> str:
    nouns = [f"<{identity}>" if t.identity and identity else _article(t.category) for t in things]
    if len(nouns) == 1:
        return f"a photo of {nouns[0]} {where}"
    # sides are given from the identity's point of view
    if things[0].identity:
        return f"{nouns[0]} to the left of {nouns[1]} {where}"
    return f"{nouns[1]} to the right of {nouns[0]} {where}"


def _where(scene: Scene) -> str:
    if scene.is_plain:
        return f"on {_article(scene.background[6:])} background"
    return words.BACKGROUNDS[scene.background][0]


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
