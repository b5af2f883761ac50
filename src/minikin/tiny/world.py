"""The sticker world: random scenes with complete labels, rendered from drawings.

A scene is sampled first (`World.decide`: things, positions, colours; pure data) and rendered second
(`World.draw`), so its labels are exact. A scene depends on (seed, index) alone and is the same on every
machine.

Some scenes are held out: about a tenth of the (object, background) and (object, object) combinations,
chosen by a hash, and all drawings of the personal identities never appear in the "train" split. The "test"
split has only scenes with such a combination.
A scene as data is in scene.py, layouts are in layouts.py, captions in captions.py, painted backgrounds in
backgrounds.py, pixels in sprites.py.
"""

from __future__ import annotations

import zlib
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from minikin.tiny import vocabulary as words
from minikin.tiny.layouts import Layouts, RichLayouts, any_rgb
from minikin.tiny.scene import RESOLUTION, Look, Rng, Scene, Thing, pick

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

__all__ = ["RESOLUTION", "Look", "Rng", "Scene", "Thing", "World", "any_rgb", "pick"]

HELD_OUT_SHARE = 0.10
RELATIONS = frozenset(
    {"pair", "trio", "top", "on", "front", "hold", "in"}
)  # whose things are reserved together
FLOATING = frozenset({"space", "sky", "underwater"})  # no ground to stand on, no shadow

Split = Literal["train", "test"]


def _held(*parts: str) -> bool:
    return zlib.crc32("|".join(parts).encode()) % 1000 < 1000 * HELD_OUT_SHARE


def is_held_out(scene: Scene) -> bool:
    """True when the scene is held out of training: a reserved combination, or an identity."""
    if any(t.identity for t in scene.things):
        return True
    subjects = scene.objects if scene.layout != "hat" else scene.objects[:1]
    if any(_held(c, scene.background) for c in subjects):
        return True
    return scene.layout in RELATIONS and any(_held(*two) for two in combinations(sorted(scene.objects), 2))


def reserved(spec: words.WorldSpec, category: str) -> tuple[str, ...]:
    """Backgrounds that are held out for a category; for some categories there are none."""
    every = (*spec.backgrounds, *(f"plain_{p}" for p in spec.plain))
    return tuple(b for b in every if _held(category, b))


class World:
    """Random scenes of a world.

    spec          `vocabulary.SMALL`, `RICH` or `WIDE`, or its name
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
            background = f"plain_{pick(rng, spec.plain)}" if plain else pick(rng, spec.backgrounds)
        if not spec.is_rich:
            art = art or pick(rng, spec.art)
        floating = background in FLOATING or background.startswith("plain_")
        plan = (RichLayouts if spec.is_rich else Layouts)(self, rng, art, floating, category, identity, look)
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
            plan.style,
            things,
            scale,
            count,
            sticker=bool(rng.random() < spec.sticker_share) and identity is None,
            treatment=pick(rng, tuple(words.TREATMENTS))
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
