"""Random patterns of many kinds, angles, widths and colours over drawings, to train the autoencoder on.

The world has four patterns, and an autoencoder that is trained on those alone does not generalise: it decodes
the stripes of a new thing as brown.
"""

from __future__ import annotations

import colorsys

import numpy as np

from minikin.tiny.sprites import blend, luminance_of

Rng = np.random.Generator
KINDS = ("stripes", "checker", "dots", "patches", "zigzag", "rings", "bands", "blocks", "gradient", "plain")
SHARES = (0.15, 0.15, 0.15, 0.15, 0.07, 0.07, 0.07, 0.07, 0.07, 0.05)
PERIODS = (8.0, 44.0)  # px


def repaint(rng: Rng, rgba: np.ndarray) -> np.ndarray:
    """The drawing (H, W, 4) repainted in a random pattern; shading, dark lines and eyes stay."""
    colours = paint(rng, *rgba.shape[:2])
    rgb, alpha, lum, mid = luminance_of(rgba)
    light = np.clip(lum / max(mid, 0.15), 0, 1.6)[..., None]
    depth = rng.uniform(0.4, 0.8)
    shaded = np.where(
        light < 1, colours * (1 - depth + depth * light), colours + (1 - colours) * (light - 1) * 0.6
    )
    unchanged = np.clip((0.16 - lum) / 0.06, 0, 1)[..., None]
    if rng.random() < 0.15:  # only the parts near the median luminance
        unchanged = np.maximum(unchanged, (np.abs(lum - mid) > 0.2)[..., None])
    return blend(rgb, np.clip(shaded, 0, 1), unchanged, alpha)


def paint(rng: Rng, height: int, width: int, periods: tuple[float, float] = PERIODS) -> np.ndarray:
    """A pattern of two or three colours, (height, width, 3) in [0, 1]."""
    period = float(np.exp(rng.uniform(*np.log(periods))))
    out = _colour(rng) * np.ones((height, width, 3), np.float32)
    for _ in range(1 + (rng.random() < 0.25)):
        kind = str(rng.choice(KINDS, p=SHARES))
        share = second_colour(rng, kind, height, width, period)[..., None]
        out = out * (1 - share) + _colour(rng) * share
        period *= rng.uniform(0.6, 1.6)
    return out


def second_colour(rng: Rng, kind: str, height: int, width: int, period: float) -> np.ndarray:
    """Share of a pattern's second colour, (height, width) in [0, 1]; three in four have sharp edges."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.integers(4) * np.pi / 4 if rng.random() < 0.4 else rng.uniform(0, np.pi)
    u = x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, period)
    v = y * np.cos(angle) - x * np.sin(angle) + rng.uniform(0, period)
    share = rng.uniform(0.3, 0.7)  # of the first colour
    if kind == "stripes":
        d = _wave(u / period) - share
    elif kind == "zigzag":
        d = _wave(u / period + _wave(v / period) / 2) - share
    elif kind == "rings":
        d = _wave(np.hypot(x - rng.uniform(0, width), y - rng.uniform(0, height)) / period) - share
    elif kind == "checker":
        d = np.sin(np.pi * u / period * 1.4) * np.sin(np.pi * v / period * 1.4)
    elif kind == "dots":
        shift = period / 2 * (np.floor(v / period) % 2) * rng.integers(2)
        distance = np.hypot((u + shift) % period - period / 2, v % period - period / 2)
        d = (rng.uniform(0.22, 0.42) * period - distance) / period * 4
    elif kind == "patches":
        d = np.full_like(x, -rng.uniform(0, 0.8))
        for _ in range(int(rng.integers(2, 5))):
            turn, length = rng.uniform(0, 2 * np.pi), period * rng.uniform(0.8, 2)
            along = (x * np.cos(turn) + y * np.sin(turn)) * 2 * np.pi / length
            d += np.sin(along + rng.uniform(0, 2 * np.pi) + np.sin(y / length * 3))
    elif kind == "bands":
        d = (u - u.min() - rng.uniform(0.2, 0.8) * np.ptp(u)) / period
    elif kind == "blocks":
        n = max(2, int(max(height, width) / period * 2))
        rows, columns = (y / height * n).astype(int), (x / width * n).astype(int)
        d = rng.random((n, n)).astype(np.float32)[rows, columns] - share
    elif kind == "gradient":
        return np.asarray((u - u.min()) / np.ptp(u))
    else:
        return np.zeros_like(x)
    soft = 0.02 if rng.random() < 0.75 else rng.uniform(0.05, 0.5)
    return np.asarray(np.clip(d / soft / 2 + 0.5, 0, 1))


def _wave(x: np.ndarray) -> np.ndarray:
    """A triangle wave of period 1 between 0 and 1."""
    return np.abs(x % 1 - 0.5) * 2


def _colour(rng: Rng) -> np.ndarray:
    """A random colour: 15 % grey, 25 % uniform in RGB, the rest by hue."""
    roll = rng.random()
    if roll < 0.15:
        return np.full(3, rng.uniform(0.05, 1), np.float32)
    if roll < 0.4:
        return rng.random(3).astype(np.float32)
    return np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.1, 0.95), rng.uniform(0.3, 1)), np.float32)
