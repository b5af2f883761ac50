"""Snow, beach, forest, desert, meadow, sea floor, mountains, volcano."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from minikin.tiny.backgrounds.brushes import Rng, cloud, fir, fractal, grad, hills, jit, tex


def snow(r: Rng) -> Image.Image:
    im = grad(jit(r, (165, 200, 235)), jit(r, (225, 238, 250)), y1=0.55)
    d = ImageDraw.Draw(im)
    for _ in range(int(r.integers(3, 8))):
        fir(d, r.random() * 320, r.uniform(175, 195), r.uniform(50, 95), jit(r, (70, 115, 110)))
    hills(r, d, 0.56, 0.03, jit(r, (222, 232, 245), 6))
    hills(r, d, 0.70, 0.03, jit(r, (243, 247, 253), 4))
    for _ in range(60):
        x, y, q = r.random() * 320, r.random() * 320, r.uniform(1.5, 3.5)
        d.ellipse([x - q, y - q, x + q, y + q], fill=(255, 255, 255))
    return im


def beach(r: Rng) -> Image.Image:
    im = grad(jit(r, (105, 185, 240)), jit(r, (195, 230, 250)), y1=0.45)
    d = ImageDraw.Draw(im)
    for _ in range(int(r.integers(0, 3))):
        cloud(r, d, r.random() * 320, r.uniform(20, 80), 34, (248, 251, 255))
    h = int(r.uniform(125, 150))
    d.rectangle([0, h, 320, 320], fill=jit(r, (35, 140, 195)))
    for _ in range(10):
        y = r.uniform(h + 4, 195)
        x = r.random() * 320
        d.line([x, y, x + r.uniform(20, 60), y], fill=(120, 200, 230), width=2)
    y = hills(r, d, 0.63, 0.02, (240, 250, 252))
    n = 320
    d.polygon(
        [(0, n)] + [(i, float(v) + 6) for i, v in enumerate(y)] + [(n, n)], fill=jit(r, (240, 215, 160), 10)
    )
    return tex(im, fractal(r, 24, 2), 0.04)


def forest(r: Rng) -> Image.Image:
    im = grad(jit(r, (150, 200, 150)), jit(r, (95, 150, 95)), y1=0.7)
    d = ImageDraw.Draw(im)
    for layer, c in ((0, (95, 150, 105)), (1, (60, 115, 75)), (2, (40, 88, 55))):
        for _ in range(9):
            fir(d, r.random() * 320, 205 + layer * 14 + r.normal(0, 5), r.uniform(110, 175), jit(r, c, 12))
    hills(r, d, 0.70, 0.02, jit(r, (70, 120, 55)))
    hills(r, d, 0.82, 0.02, jit(r, (85, 140, 60)))
    return tex(im, fractal(r, 16, 3), 0.08)


def desert(r: Rng) -> Image.Image:
    im = grad(jit(r, (110, 180, 235)), jit(r, (250, 225, 180)), y1=0.55)
    d = ImageDraw.Draw(im)
    x, y = r.uniform(30, 290), r.uniform(30, 75)
    d.ellipse([x - 20, y - 20, x + 20, y + 20], fill=(255, 245, 190))
    for b, c in ((0.52, (225, 170, 100)), (0.64, (236, 185, 112)), (0.77, (244, 199, 128))):
        hills(r, d, b, 0.05, jit(r, c, 8), 2)
    return tex(im, fractal(r, 10, 3, 2.0), 0.05)


def meadow(r: Rng) -> Image.Image:
    im = grad(jit(r, (110, 190, 245)), jit(r, (205, 235, 250)), y1=0.55)
    d = ImageDraw.Draw(im)
    for _ in range(int(r.integers(1, 4))):
        cloud(r, d, r.random() * 320, r.uniform(20, 90), 36, (250, 252, 255))
    hills(r, d, 0.52, 0.05, jit(r, (120, 190, 95)))
    hills(r, d, 0.64, 0.03, jit(r, (100, 178, 75)))
    cols = [(250, 240, 100), (250, 250, 250), (240, 120, 150), (180, 130, 230)]
    for _ in range(45):
        x, y = r.random() * 320, r.uniform(215, 318)
        q = 2 + (y - 215) / 45
        d.ellipse([x - q, y - q, x + q, y + q], fill=cols[int(r.integers(4))])
    return im


def underwater(r: Rng) -> Image.Image:
    im = grad(jit(r, (70, 185, 220)), jit(r, (10, 70, 130)))
    n = 320
    ray = Image.new("L", (n, n))
    dr = ImageDraw.Draw(ray)
    for _ in range(5):
        x = r.random() * n
        w = r.uniform(10, 30)
        s = r.uniform(-60, 60)
        dr.polygon([(x, 0), (x + w, 0), (x + w * 2.4 + s, n * 0.8), (x - w + s, n * 0.8)], fill=60)
    im.paste((190, 240, 250), mask=ray.filter(ImageFilter.GaussianBlur(8)))
    d = ImageDraw.Draw(im)
    hills(r, d, 0.86, 0.02, jit(r, (200, 185, 135)))
    for _ in range(int(r.integers(4, 8))):
        x = r.random() * n
        h = r.uniform(40, 110)
        c = jit(r, (40, 140, 80), 24)
        ph = r.random() * 6
        pts = [(x + 7 * np.sin(k / 3 + ph), 292 - h * k / 12) for k in range(13)]
        d.line(pts, fill=c, width=int(r.integers(5, 10)), joint="curve")
    for _ in range(25):
        x, y, q = r.random() * n, r.random() * 250, r.uniform(2, 6)
        d.ellipse([x - q, y - q, x + q, y + q], outline=(205, 240, 250), width=2)
    return im


def mountains(r: Rng) -> Image.Image:
    im = grad(jit(r, (120, 180, 235)), jit(r, (225, 235, 245)), y1=0.6)
    d = ImageDraw.Draw(im)
    for c0, lo, hi, cnt in (((150, 165, 195), 30, 80, 3), ((105, 120, 150), 60, 120, 3)):
        for _ in range(cnt):
            x, t, w = r.random() * 320, r.uniform(lo, hi), r.uniform(90, 150)
            c = jit(r, c0, 12)
            d.polygon([(x, t), (x - w, 240), (x + w, 240)], fill=c)
            d.polygon([(x, t), (x + w, 240), (x + w * 0.25, 240)], fill=tuple(int(v * 0.86) for v in c))
            s = 0.28
            d.polygon(
                [
                    (x, t),
                    (x - w * s, t + (240 - t) * s),
                    (x - w * 0.1, t + (240 - t) * s * 0.75),
                    (x + w * 0.05, t + (240 - t) * s),
                    (x + w * s, t + (240 - t) * s),
                ],
                fill=(247, 250, 253),
            )
    hills(r, d, 0.66, 0.03, jit(r, (95, 150, 85)))
    hills(r, d, 0.78, 0.02, jit(r, (115, 170, 90)))
    return im


def volcano(r: Rng) -> Image.Image:
    im = grad(jit(r, (70, 40, 60)), jit(r, (225, 110, 60)), y1=0.7)
    d = ImageDraw.Draw(im)
    x = r.uniform(110, 210)
    t = r.uniform(60, 85)
    for _ in range(6):
        cloud(r, d, x + r.normal(0, 22), t - 28 - r.random() * 25, 22, jit(r, (110, 95, 100), 14))
    d.polygon([(x - 24, t), (x + 24, t), (x + 150, 245), (x - 150, 245)], fill=jit(r, (85, 60, 62), 8))
    d.polygon(
        [(x - 24, t), (x + 24, t), (x + 13, t + 62), (x + 2, t + 34), (x - 9, t + 86)], fill=(255, 130, 40)
    )
    d.ellipse([x - 24, t - 8, x + 24, t + 8], fill=(255, 190, 70))
    hills(r, d, 0.74, 0.03, jit(r, (62, 46, 50), 6))
    return im
