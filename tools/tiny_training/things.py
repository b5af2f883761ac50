"""Images that the autoencoder is trained on: things of both worlds in random patterns, with masks.

Rows are (128, 128, 4) uint8: the image and, as a fourth channel, the mask of all its things. A third are
scenes of the recipe's world; the others are drawings of all styles in any size and place, on any background,
on patterns and, with a folder of photos, on pieces of those. They contain no identity.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from tools.tiny_training import patterns
from tools.tiny_training.images import world_of
from tools.tiny_training.shards import write

from minikin.tiny import sprites
from minikin.tiny.world import RESOLUTION, Rng, Scene, World

SCENES, PHOTOS = 0.35, 0.12  # shares of images: scenes of the recipe's world; photos, half of them with things
PATTERNED = 0.6  # share of the things in a random pattern
BACKGROUND_PERIODS = (12.0, 90.0)  # px


def render(
    path: Path,
    world: str,
    start: int,
    n: int,
    seed: int,
    backdrops: int,
    pack: Path | None,
    photos: Path | None,
) -> None:
    """Write the images from `start` to `start + n` to a file; runs in a worker. Raises StorageError."""
    narrow, wide = (world_of(name, backdrops, pack) for name in (world, "wide"))
    write(path, np.stack([row(narrow, wide, seed, i, photos) for i in range(start, start + n)]))


def row(narrow: World, wide: World, seed: int, index: int, photos: Path | None) -> np.ndarray:
    """Image and mask number `index` of a seed."""
    rng = np.random.default_rng((seed, index, 77))
    roll = rng.random()
    if roll < SCENES:
        return draw(narrow, narrow.scene(seed, index), rng)
    scene = wide.scene(seed, index)
    if scene.layout == "single":
        scene = _anywhere(scene, rng)
    backdrop = None
    if roll < SCENES + PHOTOS and photos:
        backdrop = _piece(photos, rng)
        if rng.random() < 0.5:
            return np.dstack([np.asarray(backdrop), np.full((RESOLUTION, RESOLUTION), 255, np.uint8)])
    elif rng.random() < 0.1:
        pixels = patterns.paint(rng, RESOLUTION, RESOLUTION, BACKGROUND_PERIODS)
        backdrop = Image.fromarray((pixels * 255).astype(np.uint8))
    return draw(wide, scene, rng, backdrop)


def draw(world: World, scene: Scene, rng: Rng | None = None, backdrop: Image.Image | None = None) -> np.ndarray:
    """Image and mask of a scene (128, 128, 4); with a generator, some things get random patterns."""
    empty, _ = world.draw(replace(scene, things=(), treatment=None))
    image, mask = backdrop or empty, np.zeros((RESOLUTION, RESOLUTION), bool)
    for thing in scene.things:
        if rng is not None and rng.random() < PATTERNED:
            sprite = Image.fromarray(patterns.repaint(rng, world.art.rgba(thing))).convert("RGBa")
        else:
            sprite = world.art.sprite(thing, world.identity_of(thing))
        image, visible = sprites.paste(image, sprite, thing, sticker=scene.sticker)
        mask |= visible
    return np.dstack([np.asarray(sprites.treat(image, scene.treatment)), mask * np.uint8(255)])


def _anywhere(scene: Scene, rng: Rng) -> Scene:
    """The scene of one thing with that thing in any size and place, also across the borders."""
    side = rng.uniform(44, 112)
    thing = replace(
        scene.things[0],
        size=side,
        centre_x=float(rng.uniform(side / 2 - 6, RESOLUTION + 6 - side / 2)),
        bottom=float(rng.uniform(side - 4, RESOLUTION)),
    )
    return replace(scene, things=(thing,), treatment=None)


def _piece(photos: Path, rng: Rng) -> Image.Image:
    """A random square of a random photo."""
    paths = _photos(photos)
    photo = _opened(paths[int(rng.integers(len(paths)))])
    side = int(np.exp(rng.uniform(np.log(RESOLUTION), np.log(min(photo.size)))))
    x, y = (int(rng.integers(0, s - side + 1)) for s in photo.size)
    piece = photo.crop((x, y, x + side, y + side))
    return piece.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)


@lru_cache(maxsize=2)
def _photos(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))


@lru_cache(maxsize=64)
def _opened(path: Path) -> Image.Image:
    photo = Image.open(path).convert("RGB")
    scale = max(RESOLUTION / min(photo.size), 640 / max(photo.size))
    return photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
