"""When an image is right: one rule a bar, by the classifier's most probable answers.

    object      one-object prompts: the first thing is of the asked category (answers: every category,
                and "none")
    background  every prompt that names it: the asked one, of all painted and plain ones
    colour      one-object and count prompts that name one colour or two: the thing is in that colour;
                or it is patterned and the two most probable paints are the two asked for
    pattern     one-object and count prompts that name one: that pattern
    both        pairs: the two things are of the two asked categories, on whichever side
    relation    prompts that say left or right: the left one and the right one are as asked
    hat         the first thing is the wearer and the second the hat
    count       count prompts: as many things as asked, and of the asked category
    style       prompts that name the art: that art
    size        prompts that say tiny or huge: that size

Every rule is a forced choice, so the share that chance would get right is not zero: about 1 in 20 for
objects, 1 in 13 for backgrounds, 1 in 4 for styles (small world). How often the rules are right on
scenes that the world itself draws for the same prompts is measured beside them: the ceiling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tools.tiny_training.evaluation.prompts import Asked, AskedThing

from minikin.tiny.encoders.classifier import Verdicts
from minikin.tiny.encoders.fields import PATTERN

BARS = (
    "object", "background", "colour", "pattern", "both", "relation", "hat", "count", "style", "size",
)  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """What the classifier sees in one image."""

    background: str
    art: str
    size: str
    count: str
    objects: tuple[str, str]  # of the two slots
    colour: str  # of the first thing, as the two below
    pattern: str
    paints: frozenset[str]  # the two most probable


def answers_of(verdicts: Verdicts) -> list[Answers]:
    """The most probable answers for every image."""
    columns = [verdicts.best(f) for f in ("background", "art", "size", "count")]
    objects = zip(verdicts.best("first_object"), verdicts.best("second_object"), strict=True)
    named = verdicts.fields["first_paints"].answers
    paints = [
        frozenset(named[int(k)] for k in row.argsort()[-2:]) for row in verdicts.probability("first_paints")
    ]
    looks = (verdicts.best("first_colour"), verdicts.best("first_pattern"))
    return [Answers(*row) for row in zip(*columns, objects, *looks, paints, strict=True)]


def judge(asked: Asked, seen: Answers) -> dict[str, bool]:
    """Right or wrong for every bar that this prompt is a question of."""
    first = asked.things[0] if asked.things else None
    second = asked.things[1] if len(asked.things) > 1 else None
    out: dict[str, bool] = {}
    if asked.background:
        out["background"] = seen.background == asked.background
    if asked.art:
        out["style"] = seen.art == asked.art
    if asked.size:
        out["size"] = seen.size == asked.size
    if first is None:
        return out
    categories = tuple(t.category for t in asked.things)
    if asked.layout == "single":
        out["object"] = seen.objects[0] == first.category
    if asked.layout == "count":
        out["count"] = seen.objects[0] == first.category and seen.count == str(asked.count)
    if asked.layout == "pair" and second:
        out["both"] = sorted(seen.objects) == sorted(categories)
        if asked.has_sides:
            out["relation"] = seen.objects == categories
    if asked.layout == "hat":
        out["hat"] = seen.objects == categories
    if asked.layout in ("single", "count"):
        out |= _paint(first, seen)
    return out


def judge_all(asked: Sequence[Asked], verdicts: Verdicts) -> list[dict[str, bool]]:
    return [judge(a, s) for a, s in zip(asked, answers_of(verdicts), strict=True)]


def _paint(thing: AskedThing, seen: Answers) -> dict[str, bool]:
    out: dict[str, bool] = {}
    if thing.colour:
        out["colour"] = seen.colour == thing.colour
    elif thing.paints:
        out["colour"] = seen.colour == PATTERN and seen.paints == frozenset(thing.paints)
    if thing.pattern:
        out["pattern"] = seen.pattern == thing.pattern
    return out
