"""What the painters share: gradients, noise, hills, stars, clouds and trees."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

STORED = 160  # px; scenes show random 128 px crops
SIDE = 2 * STORED  # px painted, before averaging down

Colour = Any  # three numbers, as a tuple or an array
Rng = np.random.Generator
Draw = ImageDraw.ImageDraw


def mix(a: Colour, b: Colour, t: float) -> Any:
    return np.asarray(a, float) * (1 - t) + np.asarray(b, float) * t


def jit(rng: Rng, c: Colour, d: float = 14) -> Any:
    """The colour, moved a little: each channel alone and all together."""
    moved = np.asarray(c, float) + rng.normal(0, d / 2, 3) + rng.normal(0, d / 2)
    return tuple(int(v) for v in np.clip(moved, 0, 255))


def grad(top: Colour, bot: Colour, n: int = SIDE, y0: float = 0.0, y1: float = 1.0) -> Image.Image:
    t = np.clip((np.linspace(0, 1, n) - y0) / (y1 - y0), 0, 1)[:, None, None]
    a = np.asarray(top, float) * (1 - t) + np.asarray(bot, float) * t
    return Image.fromarray(np.broadcast_to(a, (n, n, 3)).astype(np.uint8).copy())


def noise(rng: Rng, cells: int, n: int = SIDE, aspect: float = 1.0) -> Any:
    g = rng.random((max(2, int(cells * aspect)), cells)).astype(np.float32)
    return np.asarray(Image.fromarray(g).resize((n, n), Image.Resampling.BICUBIC))


def fractal(rng: Rng, cells: int = 4, octaves: int = 4, aspect: float = 1.0) -> Any:
    out, amp, tot = np.float32(0), 1.0, 0.0
    for o in range(octaves):
        out = out + amp * noise(rng, cells * 2**o, aspect=aspect)
        tot += amp
        amp *= 0.5
    return out / tot


def tex(im: Image.Image, f: Any, amount: float) -> Image.Image:
    a = np.asarray(im, dtype=np.float32) * (1 + amount * (f[..., None] - 0.5) * 2)
    return Image.fromarray(np.clip(a, 0, 255).astype(np.uint8))


def hills(rng: Rng, d: Draw, base: float, amp: float, colour: Colour, waves: int = 3) -> Any:
    n = SIDE
    x = np.arange(n + 1)
    y = np.full(n + 1, base * n)
    for k in range(1, waves + 1):
        y += amp * n / k * np.sin(2 * np.pi * (x / n * (0.5 + 0.7 * k) + rng.random()))
    d.polygon([(0, n)] + list(zip(x.tolist(), y.tolist(), strict=True)) + [(n, n)], fill=colour)
    return y


def star_field(rng: Rng, d: Draw, count: int, ymax: float = 1.0) -> None:
    n = SIDE
    for _ in range(count):
        x, y = rng.random() * n, rng.random() * n * ymax
        r = rng.choice([1.0, 1.5, 2.5])
        v = int(rng.integers(190, 256))
        d.ellipse([x - r, y - r, x + r, y + r], fill=(v, v, min(255, v + 10)))


def cloud(rng: Rng, d: Draw, cx: float, cy: float, s: float, c: Colour) -> None:
    for _ in range(6):
        x, y, r = (cx + rng.normal(0, s * 0.6), cy + rng.normal(0, s * 0.15), s * rng.uniform(0.3, 0.55))
        d.ellipse([x - r, y - r * 0.75, x + r, y + r * 0.75], fill=c)


def fir(d: Draw, x: float, y: float, h: float, c: Colour) -> None:
    for k in range(3):
        w = h * (0.22 + 0.13 * k)
        t = y - h + k * h * 0.27
        d.polygon([(x, t), (x - w, t + h * 0.42), (x + w, t + h * 0.42)], fill=c)
    d.rectangle([x - h * 0.04, y - h * 0.06, x + h * 0.04, y], fill=(90, 60, 40))
