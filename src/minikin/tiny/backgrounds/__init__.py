"""Painted backgrounds: `paint(kind, variant)` gives one image, larger than a scene.

A scene shows a random 128 px crop of a stored 160 px painting. Everything is drawn with Pillow at
twice the size and follows from (kind, variant) alone. No outside art.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from PIL import Image

from minikin.tiny.backgrounds import land, skies, town
from minikin.tiny.backgrounds.brushes import STORED, Rng, grad, jit, mix
from minikin.tiny.vocabulary import COLOURS

__all__ = ["STORED", "paint"]


def paint(kind: str, variant: int) -> np.ndarray:
    """Variant number `variant` of a background ("beach", "plain_red"): uint8 (160, 160, 3)."""
    rng = np.random.default_rng((zlib.crc32(kind.encode()), variant))
    big = plain(rng, kind[6:]) if kind.startswith("plain_") else PAINTERS[kind](rng)
    small = big.convert("RGB").resize((STORED, STORED), Image.Resampling.BOX)
    return np.asarray(small)


def plain(rng: Rng, colour: str) -> Image.Image:
    c: Any = np.asarray(COLOURS[colour], float)
    if colour not in ("black", "white"):
        c = mix(c, (255, 255, 255), rng.uniform(0.05, 0.3))
    c = jit(rng, c, 10)
    k = rng.random()
    if k < 0.5:
        return Image.new("RGB", (320, 320), c)
    if k < 0.75:
        return grad(c, jit(rng, np.asarray(c) * 0.86, 6))
    y, x = np.mgrid[0:320, 0:320] / 320 - 0.5
    a = np.asarray(c)[None, None] * (1.06 - 0.5 * (x * x + y * y)[..., None])
    return Image.fromarray(a.clip(0, 255).astype(np.uint8))


PAINTERS = {
    f.__name__: f
    for f in (
        land.snow,
        land.beach,
        land.forest,
        skies.night,
        town.city,
        land.desert,
        land.meadow,
        land.underwater,
        town.table,
        town.brick,
        land.mountains,
        skies.space,
        skies.sunset,
        town.room,
        skies.sky,
        skies.rain,
        town.stage,
        land.volcano,
    )
}
