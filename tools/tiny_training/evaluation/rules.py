"""Rules for a correct image, by the classifier's most probable answers.

    object      one-object prompts: the first thing is of the asked category (answers: every category,
                and "none")
    background  every prompt that names it: the asked one, of all painted and plain ones
    colour      one-object and count prompts that name one colour or two: the thing is in that colour;
                or it is patterned and the two most probable paints are the two asked for
    pattern     one-object and count prompts that name one: that pattern
    both        pairs: the two things are of the two asked categories, on whichever side
    relation    prompts that say left or right: the left one and the right one are as asked
    three       three things: they are of the three asked categories, in any order
    interaction one thing on, in, in front of or held by another: that layout, both things in their places
    hat         the first thing is the wearer and the second the hat
    count       count prompts: as many things as asked, and of the asked category
    style       prompts that name the art: that art
    size        prompts that say tiny or huge: that size

Every rule is a forced choice, so chance is above zero: about 1 in 20 for objects, 1 in 13 for backgrounds,
1 in 4 for styles (small world). The shares of the world's images of the same scenes are the upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tools.tiny_training.evaluation.prompts import PromptSpec, ThingSpec

from minikin.tiny.encoders.classifier import Predictions
from minikin.tiny.encoders.fields import PATTERN, SLOTS

INTERACTIONS = ("on", "front", "hold", "in")
BARS = (
    "object",
    "background",
    "colour",
    "pattern",
    "both",
    "relation",
    "three",
    "interaction",
    "hat",
    "count",
    "style",
    "size",
)


@dataclass(frozen=True)
class Answers:
    """The classifier's most probable answers for one image."""

    background: str
    art: str
    size: str
    count: str
    layout: str
    objects: tuple[str, ...]  # of the slots
    colour: str  # of the first thing, as the two below
    pattern: str
    paints: frozenset[str]  # the two most probable


def answers_of(predictions: Predictions) -> list[Answers]:
    """The most probable answers for every image."""
    columns = [predictions.best(f) for f in ("background", "art", "size", "count", "layout")]
    slots = [f for f in (f"{slot}_object" for slot in SLOTS) if f in predictions.fields]
    objects = zip(*(predictions.best(f) for f in slots), strict=True)
    colours = predictions.fields["first_paints"].answers
    paints = [
        frozenset(colours[int(k)] for k in row.argsort()[-2:])
        for row in predictions.probability("first_paints")
    ]
    looks = (predictions.best("first_colour"), predictions.best("first_pattern"))
    return [Answers(*row) for row in zip(*columns, objects, *looks, paints, strict=True)]


def score(spec: PromptSpec, answers: Answers) -> dict[str, bool]:
    """Result of every rule that applies to this prompt."""
    first = spec.things[0] if spec.things else None
    out: dict[str, bool] = {}
    if spec.background:
        out["background"] = answers.background == spec.background
    if spec.art:
        out["style"] = answers.art == spec.art
    if spec.size:
        out["size"] = answers.size == spec.size
    if first is None:
        return out
    categories = tuple(t.category for t in spec.things)
    if spec.layout == "single":
        out["object"] = answers.objects[0] == first.category
    if spec.layout == "count":
        out["count"] = answers.objects[0] == first.category and answers.count == str(spec.count)
    objects = answers.objects[: len(categories)]
    if spec.layout == "pair":
        out["both"] = sorted(objects) == sorted(categories)
        if spec.has_sides:
            out["relation"] = objects == categories
    if spec.layout == "trio":
        out["three"] = sorted(objects) == sorted(categories)
    if spec.layout == "hat":
        out["hat"] = objects == categories
    if spec.layout in INTERACTIONS:
        out["interaction"] = answers.layout == spec.layout and objects == categories
    if spec.layout in ("single", "count"):
        out |= _paint(first, answers)
    return out


def score_all(specs: Sequence[PromptSpec], predictions: Predictions) -> list[dict[str, bool]]:
    return [score(a, s) for a, s in zip(specs, answers_of(predictions), strict=True)]


def _paint(thing: ThingSpec, answers: Answers) -> dict[str, bool]:
    out: dict[str, bool] = {}
    if thing.colour:
        out["colour"] = answers.colour == thing.colour
    elif thing.paints:
        out["colour"] = answers.colour == PATTERN and answers.paints == frozenset(thing.paints)
    if thing.pattern:
        out["pattern"] = answers.pattern == thing.pattern
    return out
