"""The sticker world: random scenes with complete labels, rendered from drawings.

A scene is sampled first (`World.decide`: things, positions, colours; pure data) and rendered second
(`World.draw`), so its labels are exact. A scene depends on (seed, index) alone and is the same on every
machine.

Some scenes are held out: about a tenth of the (object, background) and (object, object) combinations,
chosen by a hash, and all drawings of the personal identities never appear in the "train" split. The "test"
split has only scenes with such a combination.
Captions are in captions.py, painted backgrounds in backgrounds.py, pixels in sprites.py.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from minikin.tiny import vocabulary as words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from PIL import Image

RESOLUTION = 128
HELD_OUT_SHARE = 0.10
FLOATING = frozenset({"space", "sky", "underwater"})  # no ground to stand on, no shadow

Split = Literal["train", "test"]
Rng = np.random.Generator


@dataclass(frozen=True)
class Look:
    """Colours of one object: as drawn, in one named colour, or in a two-colour pattern."""

    colour: str | None = None
    pattern: str | None = None
    rgb: tuple[tuple[int, int, int], ...] = ()  # the colours of the pattern
    colour_names: tuple[str, str] | None = None  # of both colours of the pattern, if they have names


@dataclass(frozen=True)
class Thing:
    """One object of a scene: category, drawing, look and position in pixels of a 128 px image."""

    category: str
    art: str
    code: str
    look: Look
    centre_x: float
    bottom: float  # y of the lowest visible pixel
    size: float  # side of the square drawing
    flip: bool = False
    shadow: bool = True
    identity: str | None = None


@dataclass(frozen=True)
class Scene:
    """Complete description of one image."""

    seed: int
    index: int
    layout: str  # single, pair, hat, top, hold, count, empty
    background: str  # a painted background, or "plain_COLOUR"
    art: str
    things: tuple[Thing, ...]
    size: str | None = None  # tiny, huge or None; of a single subject
    count: int = 1
    sticker: bool = False
    treatment: str | None = None
    backdrop: tuple[int, int, int, bool] = field(default=(0, 0, 0, False))  # which, x, y, flip

    @property
    def is_plain(self) -> bool:
        return self.background.startswith("plain_")

    @property
    def objects(self) -> tuple[str, ...]:
        """The categories in the image, each once, in drawing order."""
        return tuple(dict.fromkeys(t.category for t in self.things))


def _held(*parts: str) -> bool:
    return zlib.crc32("|".join(parts).encode()) % 1000 < 1000 * HELD_OUT_SHARE


def is_held_out(scene: Scene) -> bool:
    """True when the scene is held out of training: a reserved combination, or an identity."""
    if any(t.identity for t in scene.things):
        return True
    subjects = scene.objects if scene.layout != "hat" else scene.objects[:1]
    if any(_held(c, scene.background) for c in subjects):
        return True
    return scene.layout in ("pair", "top", "hold") and _held(*sorted(scene.objects))


def reserved(spec: words.WorldSpec, category: str) -> tuple[str, ...]:
    """Backgrounds that are held out for a category; for some categories there are none."""
    every = (*spec.backgrounds, *(f"plain_{p}" for p in spec.plain))
    return tuple(b for b in every if _held(category, b))


class World:
    """Random scenes of the small or the wide world.

    spec          `vocabulary.SMALL` or `WIDE`, or its name
    backdrops     variants of every background
    Raises AssetError when the art pack is missing or damaged.
    """

    def __init__(
        self, spec: words.WorldSpec | str = "small", backdrops: int = 40, art: Path | None = None
    ) -> None:
        from minikin.tiny.sprites import ArtPack

        self.spec = words.WORLDS[spec] if isinstance(spec, str) else spec
        self.art = ArtPack.load(art)
        self.backdrops = backdrops
        self._bank: dict[str, list[np.ndarray]] = {}

    # ---- sampling ----------------------------------------------------------------------------

    def scenes(self, seed: int, start: int = 0, split: Split = "train") -> Iterator[Scene]:
        """Scenes `start`, `start + 1`, ... of a seed."""
        index = start
        while True:
            yield self.scene(seed, index, split)
            index += 1

    def scene(self, seed: int, index: int, split: Split = "train") -> Scene:
        """Scene `index` of a seed, by rejection sampling for the split."""
        rng = np.random.default_rng((seed, index, split == "test"))
        while True:
            scene = self.decide(rng, seed, index)
            if is_held_out(scene) == (split == "test"):
                return scene

    def decide(
        self,
        rng: Rng,
        seed: int = 0,
        index: int = 0,
        *,
        layout: str | None = None,
        background: str | None = None,
        category: str | None = None,
        identity: str | None = None,
        look: Look | None = None,
        size: str | None = None,
        art: str | None = None,
    ) -> Scene:
        """Sample one scene; keyword arguments fix a part of it."""
        spec = self.spec
        if layout is None:
            names, shares = zip(*spec.layouts, strict=True)
            layout = str(rng.choice(names, p=np.asarray(shares) / sum(shares)))
        if background is None:
            plain = rng.random() > 0.74
            background = f"plain_{_pick(rng, spec.plain)}" if plain else _pick(rng, spec.backgrounds)
        art = art or _pick(rng, spec.art)
        floating = background in FLOATING or background.startswith("plain_")
        plan = _Plan(self, rng, art, floating, category, identity, look)
        things, scale, count = getattr(plan, f"_{layout}")(size)
        from minikin.tiny.backgrounds import STORED

        slack = STORED - RESOLUTION
        low = 0 if background in FLOATING else slack // 2  # keep the ground in view
        backdrop = (
            int(rng.integers(self.backdrops)),
            int(rng.integers(slack + 1)),
            int(rng.integers(low, slack + 1)),
            bool(rng.random() < 0.5),
        )
        return Scene(
            seed,
            index,
            layout,
            background,
            art,
            things,
            scale,
            count,
            sticker=bool(rng.random() < spec.sticker_share) and identity is None,
            treatment=_pick(rng, tuple(words.TREATMENTS))
            if rng.random() < spec.treatment_share and identity is None
            else None,
            backdrop=backdrop,
        )

    # ---- rendering ---------------------------------------------------------------------------

    def draw(self, scene: Scene) -> tuple[Image.Image, list[np.ndarray]]:
        """Render a scene: the image (128 px RGB) and a boolean mask (128, 128) of each thing's visible part."""
        from minikin.tiny import sprites

        image = self._backdrop(scene)
        masks: list[np.ndarray] = []
        for thing in scene.things:
            sprite = self.art.sprite(thing, self.identity_of(thing))
            image, mask = sprites.paste(image, sprite, thing, sticker=scene.sticker)
            masks = [m & ~mask for m in masks] + [mask]
        return sprites.treat(image, scene.treatment), masks

    def identity_of(self, thing: Thing) -> words.Identity | None:
        return words.IDENTITIES[thing.identity] if thing.identity else None

    def box_of(self, thing: Thing) -> tuple[float, float, float, float]:
        """Visible left, top, right, bottom of a thing, in pixels."""
        left, top, right, bottom = self.art.extent(thing.art, thing.code)
        if thing.flip:
            left, right = 1 - right, 1 - left
        x0, y0 = thing.centre_x - thing.size / 2, thing.bottom - bottom * thing.size
        s = thing.size
        return x0 + left * s, y0 + top * s, x0 + right * s, thing.bottom

    def _backdrop(self, scene: Scene) -> Image.Image:
        from PIL import Image

        from minikin.tiny import backgrounds

        which, x, y, flip = scene.backdrop
        bank = self._bank.setdefault(scene.background, [])
        while len(bank) <= which:
            bank.append(backgrounds.paint(scene.background, len(bank)))
        crop = bank[which][y : y + RESOLUTION, x : x + RESOLUTION]
        return Image.fromarray(np.ascontiguousarray(crop[:, ::-1] if flip else crop))


def _pick(rng: Rng, items: tuple[str, ...] | list[str]) -> str:
    return items[int(rng.integers(len(items)))]


class _Plan:
    """Samples the things of one scene: one method for each layout, which returns (things, size, count)."""

    def __init__(
        self,
        world: World,
        rng: Rng,
        art: str,
        floating: bool,
        category: str | None,
        identity: str | None,
        look: Look | None,
    ) -> None:
        self.world, self.rng, self.art, self.floating = world, rng, art, floating
        self.identity = words.IDENTITIES[identity] if identity else None
        self.look = look
        self.category = self.identity.category if self.identity else category

    def _single(self, size: str | None) -> tuple[tuple[Thing, ...], str | None, int]:
        rng = self.rng
        if size is None and not self.identity:
            size = {0: "tiny", 1: "huge"}.get(int(rng.random() * 12))
        if size == "tiny":
            side, spread = rng.uniform(30, 38), rng.uniform(-20, 20)
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
            left, right = _swap(left, right)
        return (left, right), None, 1

    def _hat(self, size: str | None) -> tuple[tuple[Thing, ...], None, int]:
        rng, spec = self.rng, self.world.spec
        wearer = self.category or self._any(lambda c: bool(c.hat_codes))
        side = rng.uniform(68, 78)
        codes = words.CATEGORIES[wearer].hat_codes or None
        body = self._thing(wearer, 64 + rng.normal(0, 4), 117 + rng.uniform(-4, 3), side, codes=codes)
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
        side = rng.uniform(48, 56) if n == 2 else rng.uniform(36, 41)
        first = self._thing(self._subject(), 0, 0, side)
        ground = self._ground(side)
        things = tuple(
            Thing(
                first.category,
                first.art,
                first.code,
                first.look,
                x + rng.uniform(-3, 3),
                ground + rng.uniform(-2, 2),
                side,
                bool(rng.random() < 0.5),
                first.shadow,
                first.identity,
            )
            for x in ((36, 92) if n == 2 else (22, 64, 106))
        )
        return things, None, n

    def _empty(self, size: str | None) -> tuple[tuple[Thing, ...], None, int]:
        return (), None, 1

    def _subject(self) -> str:
        return self.category or self._any(lambda c: True)

    def _any(self, accept: Callable[[words.Category], bool], hats: bool = False) -> str:
        """A random category of this world that has a drawing in this style and that `accept` accepts."""
        spec, art = self.world.spec, self.world.art
        pool = [
            name
            for name in (spec.hats if hats else spec.objects)
            if accept(words.CATEGORIES[name]) and art.has(name, self.art)
        ]
        return _pick(self.rng, pool)

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
        code = self.world.art.pick(rng, category, self.art, codes)
        return Thing(category, self.art, code, look, centre, bottom, side, flip, shadow)

    def _look(self, category: str) -> Look:
        rng, spec = self.rng, self.world.spec
        roll = rng.random()
        is_hat = words.CATEGORIES[category].kind == "hat"
        if roll < spec.colour_share:
            return Look(colour=_pick(rng, spec.colours))
        if roll < spec.colour_share + spec.pattern_share and not is_hat:
            pattern = _pick(rng, tuple(words.PATTERNS))
            if rng.random() < 0.5:  # two colours that have names
                a, b = rng.choice(len(spec.colours), 2, replace=False)
                names = (spec.colours[a], spec.colours[b])
                return Look(None, pattern, tuple(words.COLOURS[n] for n in names), names)
            return Look(None, pattern, (any_rgb(rng), any_rgb(rng)))
        return Look()


def any_rgb(rng: Rng) -> tuple[int, int, int]:
    import colorsys

    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.15, 0.9), rng.uniform(0.45, 1.0))
    r, g, b = (int(255 * v) for v in rgb)
    return r, g, b


def _swap(left: Thing, right: Thing) -> tuple[Thing, Thing]:
    from dataclasses import replace

    return (replace(right, centre_x=left.centre_x), replace(left, centre_x=right.centre_x))
