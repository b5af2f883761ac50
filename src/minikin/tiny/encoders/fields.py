"""Labels of sticker-world images: questions with named answers, and the true answers of a scene.

A *field* is one question with named answers ("background": snow, beach, ...). Its label is the index of
the answer, -1 where the question makes no sense; for a field with several true answers ("objects") it is
a 0 or 1 for each answer. Dual encoder and classifier are trained on these labels.

Up to two things of a scene have fields of their own, prefixed `first_` and `second_`: the left and the
right thing of a pair; head and hat; below and above; holder and held. Other layouts have no second thing.
So a relation is right when both are right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from minikin.tiny import vocabulary as words
from minikin.tiny.world import RESOLUTION, Scene, Thing

NONE = "none"  # no such thing in the image
AS_DRAWN = "as drawn"  # not repainted
PATTERN = "pattern"  # repainted in two colours
UNKNOWN = -1  # the question makes no sense, or the world has no name for the answer
SLOTS = ("first", "second")
GRID = 8  # positions of a side of the image encoder's feature map


@dataclass(frozen=True)
class Field:
    """One question: its answers, and whether several of them can be true at once."""

    name: str
    answers: tuple[str, ...]
    is_multiple: bool = False


@cache
def fields_of(spec: words.WorldSpec) -> tuple[Field, ...]:
    """The questions that images of this world can answer, in a fixed order."""
    out = [
        Field("layout", tuple(name for name, _ in spec.layouts)),
        Field("background", (*spec.backgrounds, *(f"plain_{c}" for c in spec.plain))),
        Field("art", tuple(words.ART_SETS)),
        Field("size", ("normal", *words.SIZES)),
        Field("count", ("0", "1", "2", "3")),
        Field("objects", spec.categories, is_multiple=True),
    ]
    for slot in SLOTS:
        out += [
            Field(f"{slot}_object", (NONE, *spec.categories)),
            Field(f"{slot}_colour", (AS_DRAWN, PATTERN, *spec.colours)),
            Field(f"{slot}_pattern", (AS_DRAWN, *words.PATTERNS)),
            Field(f"{slot}_paints", spec.colours, is_multiple=True),
        ]
    if spec.sticker_share:
        out.append(Field("sticker", ("no", "yes")))
    if spec.treatment_share:
        out.append(Field("treatment", (NONE, *words.TREATMENTS)))
    return tuple(out)


def slots_of(scene: Scene) -> tuple[Thing | None, Thing | None]:
    """The first and the second thing of a scene, as the fields number them."""
    things = scene.things
    if not things or scene.layout == "count":
        return (things[0] if things else None), None
    if scene.layout == "pair":
        left, right = sorted(things, key=lambda t: t.centre_x)
        return left, right
    return things[0], things[1] if len(things) > 1 else None


def places(scene: Scene) -> np.ndarray:
    """Position of each slot's thing on the feature map, (2,) int64: 0..63 by rows, -1 for none."""
    out = []
    for thing in slots_of(scene):
        if thing is None:
            out.append(UNKNOWN)
            continue
        middle = np.array([thing.bottom - thing.size / 2, thing.centre_x])
        row, column = np.clip(middle * GRID // RESOLUTION, 0, GRID - 1).astype(int)
        out.append(int(row * GRID + column))
    return np.array(out, np.int64)


def truth(scene: Scene, spec: words.WorldSpec) -> dict[str, np.ndarray]:
    """Labels by field: int64 of shape (), or (answers,) for a field with several true answers."""
    first, second = slots_of(scene)
    answers: dict[str, str | tuple[str, ...] | None] = {
        "layout": scene.layout,
        "background": scene.background,
        "art": scene.things[0].art if scene.things else None,
        "size": (scene.size or "normal") if scene.layout == "single" else None,
        "count": str(len(scene.things)),
        "objects": scene.objects,
        "sticker": "yes" if scene.sticker else "no",
        "treatment": scene.treatment or NONE,
    }
    for slot, thing in zip(SLOTS, (first, second), strict=True):
        answers |= _about(slot, thing)
    if scene.treatment in ("bw", "sketch"):  # nobody can see colours there
        answers |= {f"{slot}_{q}": None for slot in SLOTS for q in ("colour", "paints")}
    return {f.name: _encode(f, answers[f.name]) for f in fields_of(spec)}


def _about(slot: str, thing: Thing | None) -> dict[str, str | tuple[str, ...] | None]:
    if thing is None:
        questions = ("colour", "pattern", "paints")
        return {f"{slot}_object": NONE, **{f"{slot}_{q}": None for q in questions}}
    look = thing.look
    identity = words.IDENTITIES[thing.identity] if thing.identity else None
    pattern = identity.pattern if identity else look.pattern
    paints: tuple[str, ...] | None = (look.colour,) if look.colour else look.colour_names or ()
    return {
        f"{slot}_object": thing.category,
        f"{slot}_colour": PATTERN if pattern else look.colour or AS_DRAWN,
        f"{slot}_pattern": pattern or AS_DRAWN,
        # the colours of a nameless pattern may lie anywhere between the names
        f"{slot}_paints": None if pattern and not look.colour_names else paints,
    }


def _encode(field: Field, answer: str | tuple[str, ...] | None) -> np.ndarray:
    if field.is_multiple:
        if answer is None:
            return np.full(len(field.answers), UNKNOWN, np.int64)
        return np.array([a in answer for a in field.answers], np.int64)
    is_answer = isinstance(answer, str) and answer in field.answers
    return np.array(field.answers.index(str(answer)) if is_answer else UNKNOWN, np.int64)
