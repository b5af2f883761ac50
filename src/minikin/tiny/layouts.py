"""Layouts of the sticker world: which things a scene has, and where they are."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from minikin.tiny import vocabulary as words
from minikin.tiny.scene import Look, Rng, Thing, pick

if TYPE_CHECKING:
    from collections.abc import Callable

    from minikin.tiny.world import World

    Accept = Callable[[words.Category], bool]

DRAWING = 96  # px: side of a drawing
PERIODS = {"stripes": 15.6, "dots": 20.0, "checker": 24.0, "patches": 60.0}  # px of a drawing
MIN_PERIOD = 18.0  # px of an image, of the rich world's patterns, which latents have to carry


class Layouts:
    """Samples the things of one scene: one method for each layout, which returns (things, size, count)."""

    TINY = (30, 38)  # px: sizes of a tiny thing
    TWO, THREE = ((48, 56), (36, 92)), ((36, 41), (22, 64, 106))  # px: sizes and centres of equal things
    JITTER = 3  # px: of these centres

    def __init__(
        self,
        world: World,
        rng: Rng,
        art: str | None,
        floating: bool,
        category: str | None,
        identity: str | None,
        look: Look | None,
    ) -> None:
        self.world, self.rng, self.art, self.floating = world, rng, art, floating
        self.identity = words.IDENTITIES[identity] if identity else None
        self.look = look
        self.category = self.identity.category if self.identity else category

    @property
    def style(self) -> str:
        """Art set of the scene."""
        self.art = self.art or pick(self.rng, self.world.spec.art)
        return self.art

    def _single(self, size: str | None) -> tuple[tuple[Thing, ...], str | None, int]:
        rng = self.rng
        if size is None and not self.identity:
            size = {0: "tiny", 1: "huge"}.get(int(rng.random() * 12))
        if size == "tiny":
            side, spread = rng.uniform(*self.TINY), rng.uniform(-20, 20)
        elif size == "huge":
            side, spread = rng.uniform(104, 116), 0.0
        else:
            side, spread = rng.uniform(72, 84), 0.0
        centre = 64 + float(np.clip(rng.normal(0, 6), -12, 12)) + spread
        bottom = 64 + side / 2 + rng.uniform(-4, 4) if size == "huge" else self._ground(side)
        return (self._thing(self._subject(), centre, bottom, side),), size, 1

    def _pair(self, size: str | None) -> tuple[tuple[Thing, ...], None, int]:
        rng = self.rng
        first = self._subject()
        second = self._any(lambda c: c.name != first)
        sides, ground = rng.uniform(50, 58, 2), self._ground(54)
        left = self._thing(first, 34 + rng.uniform(-3, 3), ground + rng.uniform(-2, 2), sides[0])
        right = self._thing(
            second, 94 + rng.uniform(-3, 3), ground + rng.uniform(-2, 2), sides[1], subject=False
        )
        if rng.random() < 0.5:
            left, right = replace(right, centre_x=left.centre_x), replace(left, centre_x=right.centre_x)
        return (left, right), None, 1

    def _hat(self, size: str | None) -> tuple[tuple[Thing, ...], None, int]:
        rng, spec = self.rng, self.world.spec
        head = self._subject(lambda c: bool(c.hat_codes))
        side = rng.uniform(68, 78)
        codes = words.CATEGORIES[head].hat_codes or None
        body = self._thing(head, 64 + rng.normal(0, 4), 117 + rng.uniform(-4, 3), side, codes=codes)
        left, top, right, _ = self.world.box_of(body)
        name = self._any(lambda c: c.name in spec.hats, hats=True)
        width = min(right - left, side) * (0.62 if name == "straw hat" else 0.55)
        hat = self._thing(name, (left + right) / 2, top + 0.2 * width, width, subject=False, shadow=False)
        return (body, hat), None, 1

    def _top(self, size: str | None) -> tuple[tuple[Thing, ...], None, int]:
        rng = self.rng
        base = self._any(lambda c: c.is_support and c.name != self.category)
        rider = self.category or self._any(lambda c: c.kind in ("animal", "toy") and c.name != base)
        below = self._thing(
            base, 64 + rng.normal(0, 4), 120 + rng.uniform(-4, 2), rng.uniform(58, 68), subject=False
        )
        left, top, right, bottom = self.world.box_of(below)
        depth = 0.5 if base in ("chair", "sofa") else 0.1
        above = self._thing(
            rider, (left + right) / 2, top + depth * (bottom - top), rng.uniform(44, 52), shadow=False
        )
        return (below, above), None, 1

    def _hold(self, size: str | None) -> tuple[tuple[Thing, ...], None, int]:
        rng = self.rng
        spec = self.world.spec
        holder = self.category or self._any(lambda c: c.can_hold)
        held = self._any(lambda c: c.name in spec.holdables and c.name != holder)
        side, hand = rng.uniform(66, 76), 1 if rng.random() < 0.5 else -1
        body = self._thing(holder, 64 - hand * 10 + rng.normal(0, 3), self._ground(side), side)
        left, _, right, bottom = self.world.box_of(body)
        x = (right - 4 if hand > 0 else left + 4) + hand * 6
        item = self._thing(held, x, bottom - 0.12 * side, side * 0.5, subject=False, shadow=False)
        return (body, item), None, 1

    def _count(self, size: str | None) -> tuple[tuple[Thing, ...], None, int]:
        rng = self.rng
        n = 2 if rng.random() < 0.65 else 3
        sides, centres = self.TWO if n == 2 else self.THREE
        side = rng.uniform(*sides)
        first = self._thing(self._subject(), 0, 0, side)
        ground = self._ground(side)
        things = tuple(
            replace(
                first,
                centre_x=x + rng.uniform(-self.JITTER, self.JITTER),
                bottom=ground + rng.uniform(-2, 2),
                flip=bool(rng.random() < 0.5),
            )
            for x in centres
        )
        return things, None, n

    def _empty(self, size: str | None) -> tuple[tuple[Thing, ...], None, int]:
        return (), None, 1

    def _subject(self, accept: Accept = lambda c: True) -> str:
        """The given category, or a random one that `accept` accepts."""
        return self.category or self._any(accept)

    def _any(self, accept: Accept, hats: bool = False) -> str:
        """A random category of this world that has a drawing in this style and that `accept` accepts."""
        spec, art = self.world.spec, self.world.art
        pool = [
            name
            for name in (spec.hats if hats else spec.objects)
            if accept(words.CATEGORIES[name]) and art.has(name, self.style)
        ]
        return pick(self.rng, pool)

    def _ground(self, side: float) -> float:
        rng = self.rng
        if self.floating:
            return 64 + side / 2 + rng.uniform(-6, 6)
        return 112 + rng.uniform(-6, 4)

    def _thing(
        self,
        category: str,
        centre: float,
        bottom: float,
        side: float,
        *,
        subject: bool = True,
        shadow: bool = True,
        codes: tuple[str, ...] | None = None,
    ) -> Thing:
        rng = self.rng
        flip, shadow = bool(rng.random() < 0.5), shadow and not self.floating
        if subject and self.identity:
            identity = self.identity
            return Thing(
                category, identity.art, identity.code, Look(), centre, bottom, side, flip, shadow, identity.name
            )
        look = self.look if subject and self.look else self._look(category)
        code = self.world.art.pick(rng, category, self.style, codes)
        return Thing(category, self.style, code, look, centre, bottom, side, flip, shadow)

    def _look(self, category: str) -> Look:
        rng, spec = self.rng, self.world.spec
        roll = rng.random()
        is_hat = words.CATEGORIES[category].kind == "hat"
        if roll < spec.colour_share:
            return Look(colour=pick(rng, spec.colours))
        if roll < spec.colour_share + spec.pattern_share and not is_hat:
            pattern = pick(rng, tuple(words.PATTERNS))
            if rng.random() < 0.5:  # two colours that have names
                a, b = rng.choice(len(spec.colours), 2, replace=False)
                names = (spec.colours[a], spec.colours[b])
                return Look(None, pattern, tuple(words.COLOURS[n] for n in names), names)
            return Look(None, pattern, (any_rgb(rng), any_rgb(rng)))
        return Look()


class RichLayouts(Layouts):
    """Layouts of the rich world: larger things, more relations, coarse patterns.

    The first category brings the art set, and all its drawings are equally likely. In a relation the given
    subject takes either place.
    """

    TINY = (32, 40)
    TWO, THREE = ((56, 60), (34, 94)), ((40, 44), (22, 64, 106))
    JITTER = 2

    def _pair(self, size: str | None) -> tuple[tuple[Thing, ...], None, int]:
        ground, sides = self._ground(58), self.rng.uniform(56, 62, 2)
        return self._row((33, 95), sides, ground, spread=2), None, 1

    def _trio(self, size: str | None) -> tuple[tuple[Thing, ...], None, int]:
        ground, sides = self._ground(45), self.rng.uniform(43, 48, 3)
        return self._row((22, 64, 106), sides, ground, spread=1), None, 1

    def _row(
        self, centres: tuple[int, ...], sides: np.ndarray, ground: float, spread: float
    ) -> tuple[Thing, ...]:
        """Different things from left to right, the subject anywhere among them."""
        rng, names = self.rng, [self._subject()]
        while len(names) < len(centres):
            names.append(self._any(lambda c: c.name not in names))
        return tuple(
            self._thing(names[k], x + rng.uniform(-spread, spread), ground + rng.uniform(-2, 2), side)
            for k, x, side in zip(rng.permutation(len(names)), centres, sides, strict=True)
        )

    def _on(self, size: str | None) -> tuple[tuple[Thing, ...], None, int]:
        """One thing on another: (below, above)."""
        rng = self.rng
        rider, base = self._two(_is_alive, lambda c: c.is_support)
        below = self._thing(base, 64 + rng.normal(0, 4), 121 + rng.uniform(-3, 2), rng.uniform(60, 68))
        left, top, right, bottom = self.world.box_of(below)
        rest = top + (0.5 if base in ("chair", "sofa") else 0.1) * (bottom - top)
        above = self._thing(rider, (left + right) / 2, rest, min(rng.uniform(54, 60), rest - 2), shadow=False)
        return (below, above), None, 1

    def _front(self, size: str | None) -> tuple[tuple[Thing, ...], None, int]:
        """One thing in front of another and hiding a part of it: (behind, in front)."""
        rng = self.rng
        first, second = self._two(lambda c: True, lambda c: True)
        side, ground = (1 if rng.random() < 0.5 else -1), self._ground(66)
        back = self._thing(second, 64 - side * rng.uniform(15, 19), ground - 10, rng.uniform(66, 72))
        front = self._thing(first, 64 + side * rng.uniform(18, 22), min(ground + 6, 122), rng.uniform(56, 62))
        return (back, front), None, 1

    def _hold(self, size: str | None) -> tuple[tuple[Thing, ...], None, int]:
        rng, spec = self.rng, self.world.spec
        holder, item = self._two(lambda c: c.can_hold, lambda c: c.name in spec.holdables)
        side, hand = rng.uniform(68, 76), 1 if rng.random() < 0.5 else -1
        body = self._thing(holder, 64 - hand * 14 + rng.normal(0, 2), self._ground(side), side)
        left, _, right, bottom = self.world.box_of(body)
        x = (right - 4 if hand > 0 else left + 4) + hand * 8
        return (body, self._thing(item, x, bottom - 0.12 * side, side * 0.58, shadow=False)), None, 1

    def _in(self, size: str | None) -> tuple[tuple[Thing, ...], None, int]:
        """One thing that looks out of another: (inner, outer)."""
        rng, spec = self.rng, self.world.spec
        inner, outer = self._two(_is_alive, lambda c: c.name in spec.containers, hats=True)
        box = self._thing(outer, 64 + rng.normal(0, 4), 120 + rng.uniform(-4, 2), rng.uniform(64, 72))
        left, top, right, bottom = self.world.box_of(box)
        rim = top + 0.32 * (bottom - top)
        return (self._thing(inner, (left + right) / 2, rim, rng.uniform(56, 62), shadow=False), box), None, 1

    def _subject(self, accept: Accept = lambda c: True) -> str:
        self.category = self.category or self._any(accept)
        if self.art is None and not self.identity:
            arts = self.world.spec.art
            counts = np.array([len(self.world.art.drawings.get((self.category, a), ())) for a in arts])
            self.art = str(self.rng.choice(arts, p=counts / counts.sum()))
        return self.category

    def _two(self, first: Accept, second: Accept, *, hats: bool = False) -> tuple[str, str]:
        """Two different categories, accepted by `first` and `second`; the subject is one of them if it can."""
        subject = words.CATEGORIES[self.category] if self.category else None
        if subject and second(subject) and (self.rng.random() < 0.5 or not first(subject)):
            name = self._subject()  # before the other, since it brings the art set
            return self._any(lambda c: first(c) and c.name != name), name
        name = self._subject(first)
        return name, self._any(lambda c: second(c) and c.name != name, hats)

    def _any(self, accept: Accept, hats: bool = False) -> str:
        """The same, in any style until the scene has one; `hats` adds hats to the objects."""
        spec, pack = self.world.spec, self.world.art
        arts = (self.style,) if self.art or self.identity else spec.art
        pool = [
            name
            for name in (spec.categories if hats else spec.objects)
            if accept(words.CATEGORIES[name]) and any(pack.has(name, a) for a in arts)
        ]
        return pick(self.rng, pool)

    def _thing(
        self,
        category: str,
        centre: float,
        bottom: float,
        side: float,
        *,
        subject: bool = True,
        shadow: bool = True,
        codes: tuple[str, ...] | None = None,
    ) -> Thing:
        subject = subject and category == self.category
        thing = super()._thing(category, centre, bottom, side, subject=subject, shadow=shadow, codes=codes)
        pattern = thing.look.pattern
        if not pattern:
            return thing
        scale = max(1.0, round(MIN_PERIOD * DRAWING / (PERIODS[pattern] * side), 1))
        return replace(thing, look=replace(thing.look, scale=scale))

    def _look(self, category: str) -> Look:
        look = super()._look(category)
        return replace(look, direction=int(self.rng.integers(3))) if look.pattern == "stripes" else look


def any_rgb(rng: Rng) -> tuple[int, int, int]:
    import colorsys

    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.15, 0.9), rng.uniform(0.45, 1.0))
    r, g, b = (int(255 * v) for v in rgb)
    return r, g, b


def _is_alive(category: words.Category) -> bool:
    return category.kind in ("animal", "toy")
