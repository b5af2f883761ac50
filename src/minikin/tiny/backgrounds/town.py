"""Streets and rooms."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from minikin.tiny.backgrounds.brushes import Rng, fractal, grad, jit, mix, tex


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


def room(r: Rng) -> Image.Image:
    w = jit(r, [(245, 225, 190), (195, 220, 225), (225, 200, 215), (210, 225, 195)][int(r.integers(4))], 10)
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


def table(r: Rng) -> Image.Image:
    wall = jit(r, [(225, 205, 180), (190, 210, 215), (235, 225, 205), (205, 190, 205)][int(r.integers(4))], 10)
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
