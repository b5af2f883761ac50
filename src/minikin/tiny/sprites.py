"""Pixels of the sticker world: the art pack, repainting, and pasting a drawing into a scene."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from lzma import LZMAError
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from minikin.errors import AssetError
from minikin.tiny import vocabulary as words

if TYPE_CHECKING:
    from minikin.tiny.scene import Look, Rng, Thing

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass
class ArtPack:
    """All drawings, by (category, art set): {code point: RGBA (96, 96, 4) uint8}."""

    drawings: dict[tuple[str, str], dict[str, np.ndarray]]
    identities: dict[tuple[str, str], np.ndarray]  # (art set, code) of the personal identities
    _cache: dict[object, Image.Image] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | None = None) -> ArtPack:
        """Read the pack; raises AssetError when it is missing, damaged or incomplete."""
        source = path or Path(str(resources.files("minikin.tiny") / "art" / "sprites.npz"))
        try:
            with np.load(source, allow_pickle=False) as z:
                names, rgba = [str(n) for n in z["names"]], z["rgba"]
                held_names, held = [str(n) for n in z["held_names"]], z["held"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, LZMAError) as e:
            raise AssetError(
                f"The art pack {source} cannot be read ({type(e).__name__}: {e}). Expected an .npz with "
                "names, rgba, held_names and held. Reinstall minikin, or rebuild the pack with "
                "`python -m tools.tiny_training.art`."
            ) from e
        drawings: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        identities: dict[tuple[str, str], np.ndarray] = {}
        for name, a in zip(names, rgba, strict=True):
            category, art, code = name.split("|")
            if (art, code) in words.WITHHELD:
                identities[art, code] = a
            else:
                drawings.setdefault((category, art), {})[code] = a
        for name, a in zip(held_names, held, strict=True):
            if name in words.IDENTITIES:
                identities[words.IDENTITIES[name].art, words.IDENTITIES[name].code] = a
        missing = [i.name for i in words.IDENTITIES.values() if (i.art, i.code) not in identities]
        if missing:
            raise AssetError(f"The art pack {source} lacks the drawings of {', '.join(missing)}.")
        return cls(drawings, identities)

    def has(self, category: str, art: str) -> bool:
        return (category, art) in self.drawings

    def pick(self, rng: Rng, category: str, art: str, codes: tuple[str, ...] | None = None) -> str:
        """A code point that draws this category in this style (only `codes`, if some exist)."""
        pool = sorted(self.drawings.get((category, art), ()))
        if not pool:
            raise AssetError(f"The art pack has no drawing of '{category}' in style '{art}'.")
        pool = [c for c in pool if codes and c in codes] or pool
        return pool[int(rng.integers(len(pool)))]

    def rgba(self, thing: Thing) -> np.ndarray:
        if thing.identity:
            return self.identities[thing.art, thing.code]
        return self.drawings[thing.category, thing.art][thing.code]

    def extent(self, art: str, code: str) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the opaque part, as fractions of the side."""
        return self._extents[art, code]

    @cached_property
    def _extents(self) -> dict[tuple[str, str], tuple[float, float, float, float]]:
        every = {(art, code): a for (_, art), d in self.drawings.items() for code, a in d.items()}
        out = {}
        for key, a in {**every, **self.identities}.items():
            ys, xs = np.nonzero(a[..., 3] > 12)
            n = a.shape[0]
            out[key] = (xs.min() / n, ys.min() / n, (xs.max() + 1) / n, (ys.max() + 1) / n)
        return out

    def sprite(self, thing: Thing, identity: words.Identity | None = None) -> Image.Image:
        """The repainted drawing, premultiplied RGBa, full size."""
        key = (thing.category, thing.art, thing.code, thing.identity, thing.look)
        sprite_image = self._cache.get(key)
        if sprite_image is None:
            rgba = self.rgba(thing)
            if identity:
                rgba = repaint_pattern(rgba, identity.pattern, *identity.colours)
            else:
                rgba = repaint(rgba, thing.look)
            sprite_image = Image.fromarray(rgba).convert("RGBa")
            is_rare = thing.look.scale != 1 or thing.look.direction or not thing.look.colour_names
            if not thing.look.pattern or not is_rare:  # endless patterns are not worth keeping
                self._cache[key] = sprite_image
        return sprite_image


def repaint(rgba: np.ndarray, look: Look) -> np.ndarray:
    """The drawing (H, W, 4) in this look."""
    if look.colour:
        return repaint_colour(rgba, words.COLOURS[look.colour])
    if look.pattern:
        return repaint_pattern(rgba, look.pattern, *look.rgb, direction=look.direction, scale=look.scale)
    return rgba


def repaint_colour(rgba: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Push a drawing towards one colour; shading, pupils, outlines and white highlights stay."""
    c = np.asarray(colour, np.float32) / 255
    rgb, alpha, lum, mid = luminance_of(rgba)
    t = np.clip(lum / max(mid, 0.15), 0, 2)[..., None]
    repainted = np.where(t < 1, c * np.minimum(t, 1), c + (1 - c) * np.clip(t - 1, 0, 1) * 0.75)
    unchanged = np.clip((0.14 - lum) / 0.08, 0, 1)[..., None]
    saturation = (rgb.max(-1) - rgb.min(-1))[..., None]
    highlight = np.clip((lum[..., None] - 0.9) / 0.08, 0, 1) * (saturation < 0.12) * (mid < 0.8)
    return blend(rgb, repainted, np.maximum(unchanged, highlight), alpha)


def repaint_pattern(
    rgba: np.ndarray,
    pattern: str,
    first: tuple[int, int, int],
    second: tuple[int, int, int],
    *,
    direction: int = 0,
    scale: float = 1.0,
) -> np.ndarray:
    """Repaint a drawing in a two-colour pattern; dark lines and eyes stay. direction, scale: as in Look."""
    h, w = rgba.shape[:2]
    y, x = np.mgrid[0:h, 0:w] / scale
    if pattern == "stripes":
        on = ((x + y, 2**0.5 * x, 2**0.5 * y)[direction] // 11) % 2 == 1
    elif pattern == "dots":
        on = ((x % 20) - 10) ** 2 + ((y % 20) - 10) ** 2 < 36
    elif pattern == "checker":
        on = ((x // 12) + (y // 12)) % 2 == 1
    else:
        on = np.sin(x / 11.0) + np.sin(y / 9.0 + x / 23.0) > 0.5
    rgb, alpha, lum, mid = luminance_of(rgba)
    t = np.clip(lum / max(mid, 0.15), 0, 1.6)[..., None]
    c = np.where(on[..., None], np.array(second, np.float32), np.array(first, np.float32)) / 255
    repainted = np.where(t < 1, c * (0.35 + 0.65 * t), c + (1 - c) * (t - 1) * 0.6)
    unchanged = np.clip((0.16 - lum) / 0.06, 0, 1)[..., None]
    return blend(rgb, np.clip(repainted, 0, 1), unchanged, alpha)


def luminance_of(rgba: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Colours (H, W, 3), alpha (H, W, 1) and luminance (H, W) in [0, 1], and the median luminance."""
    a = rgba.astype(np.float32) / 255
    lum = a[..., :3] @ _LUMA
    opaque = a[..., 3] > 0.5
    return a[..., :3], a[..., 3:], lum, float(np.median(lum[opaque])) if opaque.any() else 0.5


def blend(rgb: np.ndarray, repainted: np.ndarray, unchanged: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The drawing (H, W, 4) uint8: `rgb` where `unchanged` is 1, `repainted` where it is 0."""
    out = np.concatenate([np.clip(rgb * unchanged + repainted * (1 - unchanged), 0, 1), alpha], -1)
    return (out * 255).astype(np.uint8)


def paste(
    image: Image.Image, sprite: Image.Image, thing: Thing, *, sticker: bool = False
) -> tuple[Image.Image, np.ndarray]:
    """Draw `sprite` into `image` (in place); also the boolean mask of where it is."""
    side = max(8, round(thing.size))
    small = sprite.resize((side, side), Image.Resampling.BILINEAR).convert("RGBA")
    if thing.flip:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    alpha = small.getchannel("A")
    box = alpha.getbbox() or (0, 0, side, side)
    x0, y0 = round(thing.centre_x - side / 2), round(thing.bottom - box[3])
    if thing.shadow:
        half, middle = (box[2] - box[0]) * 0.46, x0 + (box[0] + box[2]) / 2
        shade = Image.new("L", image.size)
        oval = (middle - half, thing.bottom - side * 0.06, middle + half, thing.bottom + side * 0.05)
        ImageDraw.Draw(shade).ellipse(oval, fill=80)
        image.paste((20, 20, 30), (0, 0), shade)
    if sticker:
        rim = Image.new("L", (side + 8, side + 8))
        rim.paste(alpha, (4, 4))
        image.paste((255, 255, 255), (x0 - 4, y0 - 4), rim.filter(ImageFilter.MaxFilter(5)))
    image.paste(small, (x0, y0), small)
    mask = Image.new("L", image.size)
    mask.paste(255, (x0, y0), alpha)
    return image, np.asarray(mask) > 127


def treat(image: Image.Image, treatment: str | None) -> Image.Image:
    """A whole-image treatment: pixel art, black and white, or a pencil sketch."""
    if treatment == "pixel":
        small = image.resize((32, 32), Image.Resampling.BOX)
        return small.resize(image.size, Image.Resampling.NEAREST)
    if treatment == "bw":
        return image.convert("L").convert("RGB")
    if treatment == "sketch":
        grey = np.asarray(image.convert("L").filter(ImageFilter.GaussianBlur(0.6)), np.float32)
        edges = sum(np.abs(g) for g in np.gradient(grey))
        paper = np.clip(245 - edges * 6, 30, 245)[..., None] * np.array([1, 0.99, 0.96])
        return Image.fromarray(np.clip(paper, 0, 255).astype(np.uint8))
    return image
