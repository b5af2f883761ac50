"""Labels of sticker-world images: questions with named answers, and the true answers of a scene.

A *field* is one question with named answers ("background": snow, beach, ...). Its label is the index of
the answer, -1 where the question makes no sense; for a field with several true answers ("objects") it is
a 0 or 1 for each answer. Dual encoder and classifier are trained on these labels.

Up to three things of a scene have fields of their own, prefixed `first_`, `second_` and, in worlds with three
different things, `third_`: things side by side from left to right; head and hat; below and above; behind and in
front; holder and held; inside and outside. Other layouts have a first thing alone. So a relation is right
when its things and the layout are right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import zip_longest

import numpy as np

from minikin.tiny import vocabulary as words
from minikin.tiny.world import RESOLUTION, Scene, Thing

NONE = "none"  # no such thing in the image
AS_DRAWN = "as drawn"  # not repainted
PATTERN = "pattern"  # repainted in two colours
UNKNOWN = -1  # the question makes no sense, or the world has no name for the answer
SLOTS = ("first", "second", "third")
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
    for slot in slots_in(spec):
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


def slots_in(spec: words.WorldSpec) -> tuple[str, ...]:
    """Names of the slots that the scenes of a world can fill."""
    return SLOTS if "trio" in dict(spec.layouts) else SLOTS[:2]


def slots_of(scene: Scene) -> tuple[Thing, ...]:
    """The things of a scene in the order of the slots; of equal things the first alone."""
    if scene.layout == "count":
        return scene.things[:1]
    if scene.layout in ("pair", "trio"):
        return tuple(sorted(scene.things, key=lambda t: t.centre_x))
    return scene.things


def places(scene: Scene, spec: words.WorldSpec) -> np.ndarray:
    """Position of each slot's thing on the feature map, (slots,) int64: 0..63 by rows, -1 for none."""
    out = np.full(len(slots_in(spec)), UNKNOWN, np.int64)
    for k, thing in enumerate(slots_of(scene)):
        middle = np.array([thing.bottom - thing.size / 2, thing.centre_x])
        row, column = np.clip(middle * GRID // RESOLUTION, 0, GRID - 1).astype(int)
        out[k] = row * GRID + column
    return out


def truth(scene: Scene, spec: words.WorldSpec) -> dict[str, np.ndarray]:
    """Labels by field: int64 of shape (), or (answers,) for a field with several true answers."""
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
    for slot, thing in zip_longest(SLOTS, slots_of(scene)):
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
