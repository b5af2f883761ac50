"""Painted backgrounds: `paint(kind, variant)` gives one picture, larger than a scene.

A scene shows a random 128 px crop of a stored 160 px painting. Everything is drawn with Pillow at
twice the size and follows from (kind, variant) alone. No outside art.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from minikin.tiny.vocabulary import COLOURS

STORED = 160  # px; scenes show random 128 px crops
SIDE = 2 * STORED  # px painted, before averaging down

Colour = Any  # three numbers, as a tuple or an array
Rng = np.random.Generator
Draw = ImageDraw.ImageDraw


def paint(kind: str, variant: int) -> np.ndarray:
    """Variant number `variant` of a background ("beach", "plain_red"): uint8 (160, 160, 3)."""
    rng = np.random.default_rng((zlib.crc32(kind.encode()), variant))
    big = plain(rng, kind[6:]) if kind.startswith("plain_") else PAINTERS[kind](rng)
    small = big.convert("RGB").resize((STORED, STORED), Image.Resampling.BOX)
    return np.asarray(small)


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
        x, y, r = (
            cx + rng.normal(0, s * 0.6),
            cy + rng.normal(0, s * 0.15),
            s * rng.uniform(0.3, 0.55),
        )
        d.ellipse([x - r, y - r * 0.75, x + r, y + r * 0.75], fill=c)


def fir(d: Draw, x: float, y: float, h: float, c: Colour) -> None:
    for k in range(3):
        w = h * (0.22 + 0.13 * k)
        t = y - h + k * h * 0.27
        d.polygon([(x, t), (x - w, t + h * 0.42), (x + w, t + h * 0.42)], fill=c)
    d.rectangle([x - h * 0.04, y - h * 0.06, x + h * 0.04, y], fill=(90, 60, 40))


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
        [(0, n)] + [(i, float(v) + 6) for i, v in enumerate(y)] + [(n, n)],
        fill=jit(r, (240, 215, 160), 10),
    )
    return tex(im, fractal(r, 24, 2), 0.04)


def forest(r: Rng) -> Image.Image:
    im = grad(jit(r, (150, 200, 150)), jit(r, (95, 150, 95)), y1=0.7)
    d = ImageDraw.Draw(im)
    for layer, c in ((0, (95, 150, 105)), (1, (60, 115, 75)), (2, (40, 88, 55))):
        for _ in range(9):
            fir(
                d,
                r.random() * 320,
                205 + layer * 14 + r.normal(0, 5),
                r.uniform(110, 175),
                jit(r, c, 12),
            )
    hills(r, d, 0.70, 0.02, jit(r, (70, 120, 55)))
    hills(r, d, 0.82, 0.02, jit(r, (85, 140, 60)))
    return tex(im, fractal(r, 16, 3), 0.08)


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


def city(r: Rng) -> Image.Image:
    im = grad(jit(r, (150, 195, 230)), jit(r, (215, 225, 235)), y1=0.7)
    d = ImageDraw.Draw(im)
    for layer, base in ((0, (165, 175, 195)), (1, (120, 130, 155))):
        x = -20.0
        while x < 320:
            w = r.uniform(36, 66)
            t = r.uniform(30, 120) + layer * 40
            c = jit(r, base, 26)
            d.rectangle([x, t, x + w, 235], fill=c)
            wc = jit(r, (250, 235, 170), 10) if layer else tuple(int(v * 0.85) for v in c)
            for yy in np.arange(t + 10, 215, 22):
                for xx in np.arange(x + 7, x + w - 9, 16):
                    if r.random() < 0.8:
                        d.rectangle([xx, yy, xx + 8, yy + 11], fill=wc)
            x += w + 3
    d.rectangle([0, 222, 320, 250], fill=jit(r, (185, 185, 185), 8))
    d.rectangle([0, 250, 320, 320], fill=jit(r, (85, 88, 95), 8))
    o = r.uniform(0, 60)
    for left in range(-60, 320, 80):
        d.rectangle([left + o, 278, left + o + 42, 284], fill=(240, 225, 130))
    return im


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


def table(r: Rng) -> Image.Image:
    wall = jit(
        r,
        [(225, 205, 180), (190, 210, 215), (235, 225, 205), (205, 190, 205)][int(r.integers(4))],
        10,
    )
    im = grad(wall, mix(wall, (120, 110, 100), 0.2))
    d = ImageDraw.Draw(im)
    b = jit(r, (165, 105, 60), 18)
    h = int(r.uniform(150, 180))
    n = 320
    d.rectangle([0, h, n, n], fill=b)
    wood = fractal(r, 5, 3, 10.0)
    a = np.asarray(im, np.float32).copy()
    a[h:] *= 0.8 + 0.4 * wood[h:, :, None]
    im = Image.fromarray(np.clip(a, 0, 255).astype(np.uint8))
    d = ImageDraw.Draw(im)
    k = tuple(int(v * 0.62) for v in b)
    for t in (0, 0.17, 0.42, 0.74):
        d.line([0, h + t * (n - h), n, h + t * (n - h)], fill=k, width=3)
    return im


def brick(r: Rng) -> Image.Image:
    b = jit(r, (178, 85, 65), 22)
    im = Image.new("RGB", (320, 320), jit(r, (205, 195, 185), 10))
    d = ImageDraw.Draw(im)
    hh, ww = 22, 48
    o = r.uniform(0, 40)
    for i, y in enumerate(np.arange(-o % hh - hh, 320, hh)):
        for x in np.arange(-ww - (i % 2) * ww / 2 + o, 340, ww):
            d.rectangle([x, y, x + ww - 4, y + hh - 4], fill=jit(r, b, 14))
    g = int(r.uniform(262, 280))
    d.rectangle([0, g, 320, 320], fill=jit(r, (140, 138, 135), 10))
    return tex(im, fractal(r, 12, 3), 0.08)


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
        x, y, q = (
            r.random() * 320,
            r.choice([r.uniform(20, 90), r.uniform(240, 300)]),
            r.uniform(14, 34),
        )
        c = jit(
            r,
            [(225, 150, 90), (110, 160, 225), (210, 110, 110), (190, 180, 130)][int(r.integers(4))],
            20,
        )
        d.ellipse([x - q, y - q, x + q, y + q], fill=c)
        if r.random() < 0.5:
            d.ellipse(
                [x - q * 1.7, y - q * 0.45, x + q * 1.7, y + q * 0.45],
                outline=(235, 220, 180),
                width=3,
            )
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


def room(r: Rng) -> Image.Image:
    w = jit(
        r,
        [(245, 225, 190), (195, 220, 225), (225, 200, 215), (210, 225, 195)][int(r.integers(4))],
        10,
    )
    im = Image.new("RGB", (320, 320), w)
    d = ImageDraw.Draw(im)
    if r.random() < 0.5:
        for stripe in range(0, 320, 32):
            d.rectangle([stripe, 0, stripe + 16, 320], fill=tuple(int(v * 0.96) for v in w))
    x, y = (r.uniform(15, 60) if r.random() < 0.5 else r.uniform(190, 230)), r.uniform(25, 45)
    d.rectangle([x, y, x + 82, y + 96], fill=(250, 250, 248))
    d.rectangle([x + 6, y + 6, x + 76, y + 90], fill=jit(r, (160, 210, 240)))
    d.line([x + 41, y, x + 41, y + 96], fill=(250, 250, 248), width=5)
    d.line([x, y + 48, x + 82, y + 48], fill=(250, 250, 248), width=5)
    h = int(r.uniform(205, 225))
    d.rectangle([0, h, 320, 320], fill=jit(r, (190, 140, 95), 14))
    d.rectangle([0, h - 9, 320, h], fill=(250, 248, 244))
    c = jit(r, [(180, 70, 70), (70, 110, 160), (90, 140, 110)][int(r.integers(3))], 14)
    d.ellipse([40, h + 28, 280, 318], fill=c)
    d.ellipse([64, h + 40, 256, 306], outline=(245, 235, 215), width=4)
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


def stage(r: Rng) -> Image.Image:
    c = jit(r, (150, 25, 40), 16)
    across = np.linspace(0, 1, 320)
    f = 0.72 + 0.28 * np.sin(2 * np.pi * (across * r.uniform(7, 10) + r.random()))
    a = np.broadcast_to(np.asarray(c, float) * f[None, :, None], (320, 320, 3)).astype(np.uint8).copy()
    im = Image.fromarray(a)
    d = ImageDraw.Draw(im)
    d.rectangle([0, 232, 320, 320], fill=jit(r, (120, 75, 45), 12))
    m = Image.new("L", (320, 320))
    dm = ImageDraw.Draw(m)
    x = r.uniform(110, 210)
    dm.polygon([(x - 16, 0), (x + 16, 0), (160 + 105, 280), (160 - 105, 280)], fill=95)
    dm.ellipse([55, 245, 265, 312], fill=150)
    im.paste((255, 245, 200), mask=m.filter(ImageFilter.GaussianBlur(6)))
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
        [(x - 24, t), (x + 24, t), (x + 13, t + 62), (x + 2, t + 34), (x - 9, t + 86)],
        fill=(255, 130, 40),
    )
    d.ellipse([x - 24, t - 8, x + 24, t + 8], fill=(255, 190, 70))
    hills(r, d, 0.74, 0.03, jit(r, (62, 46, 50), 6))
    return im


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
        snow, beach, forest, night, city, desert, meadow, underwater, table, brick, mountains, space,
        sunset, room, sky, rain, stage, volcano,
    )
}  # fmt: skip
