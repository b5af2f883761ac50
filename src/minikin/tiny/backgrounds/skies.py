"""Night, space, sunset, sky and rain."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from minikin.tiny.backgrounds.brushes import Rng, cloud, fractal, grad, hills, jit, star_field


def night(r: Rng) -> Image.Image:
    im = grad(jit(r, (12, 16, 50), 8), jit(r, (45, 55, 110), 10), y1=0.8)
    d = ImageDraw.Draw(im)
    star_field(r, d, 70, 0.75)
    x, y, q = r.uniform(30, 290), r.uniform(25, 70), r.uniform(14, 24)
    d.ellipse([x - q, y - q, x + q, y + q], fill=(250, 243, 205))
    if r.random() < 0.5:
        d.ellipse([x - q * 0.45, y - q * 1.1, x + q * 1.4, y + q * 0.8], fill=(20, 25, 62))
    hills(r, d, 0.76, 0.03, jit(r, (25, 38, 55), 6))
    hills(r, d, 0.86, 0.02, jit(r, (18, 28, 40), 5))
    return im


def space(r: Rng) -> Image.Image:
    im = Image.fromarray(
        (
            np.asarray(grad((10, 8, 26), (16, 10, 36)), np.float32)
            + np.clip(fractal(r, 3, 3) - 0.45, 0, 1)[..., None] * np.array(jit(r, (170, 60, 190), 60)) * 0.8
        )
        .clip(0, 255)
        .astype(np.uint8)
    )
    d = ImageDraw.Draw(im)
    star_field(r, d, 110)
    for _ in range(int(r.integers(1, 3))):
        x, y, q = (r.random() * 320, r.choice([r.uniform(20, 90), r.uniform(240, 300)]), r.uniform(14, 34))
        c = jit(r, [(225, 150, 90), (110, 160, 225), (210, 110, 110), (190, 180, 130)][int(r.integers(4))], 20)
        d.ellipse([x - q, y - q, x + q, y + q], fill=c)
        if r.random() < 0.5:
            d.ellipse([x - q * 1.7, y - q * 0.45, x + q * 1.7, y + q * 0.45], outline=(235, 220, 180), width=3)
    return im


def sunset(r: Rng) -> Image.Image:
    im = grad(jit(r, (95, 60, 130)), jit(r, (255, 165, 85)), y1=0.62)
    d = ImageDraw.Draw(im)
    x = r.uniform(60, 260)
    y = r.uniform(150, 185)
    for q, c in ((48, (255, 190, 100)), (34, (255, 225, 140))):
        d.ellipse([x - q, y - q, x + q, y + q], fill=c)
    if r.random() < 0.5:
        d.rectangle([0, 200, 320, 320], fill=jit(r, (95, 65, 110), 10))
        for _ in range(14):
            yy = r.uniform(204, 316)
            d.line([x - r.uniform(5, 45), yy, x + r.uniform(5, 45), yy], fill=(250, 180, 110), width=3)
    else:
        hills(r, d, 0.64, 0.03, jit(r, (110, 60, 85), 10))
        hills(r, d, 0.76, 0.02, jit(r, (70, 40, 62), 8))
    return im


def sky(r: Rng) -> Image.Image:
    im = grad(jit(r, (80, 160, 240)), jit(r, (180, 220, 250)))
    d = ImageDraw.Draw(im)
    for _ in range(int(r.integers(4, 8))):
        cloud(r, d, r.random() * 320, r.random() * 320, r.uniform(30, 52), (250, 252, 255))
    return im


def rain(r: Rng) -> Image.Image:
    im = grad(jit(r, (90, 105, 125)), jit(r, (150, 160, 170)), y1=0.75)
    d = ImageDraw.Draw(im)
    for _ in range(4):
        cloud(r, d, r.random() * 320, r.uniform(5, 45), 50, jit(r, (115, 122, 135), 10))
    d.rectangle([0, 235, 320, 320], fill=jit(r, (95, 105, 112), 8))
    for _ in range(5):
        x, y, w = r.random() * 320, r.uniform(250, 310), r.uniform(25, 55)
        d.ellipse([x - w, y - 7, x + w, y + 7], fill=(140, 158, 175))
    for _ in range(80):
        x, y, l = r.random() * 330, r.random() * 320, r.uniform(12, 24)
        d.line([x, y, x - l * 0.3, y + l], fill=(195, 210, 228), width=2)
    return im
