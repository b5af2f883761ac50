"""Canvases: which pixels of an image are painted over, at which size, and how they come back into it.

    extended and padded   pixels that are not there yet repeat those at the edge
    cut out and enlarged  a part of the image, painted at the base's own size
    pasted                painted pixels blend in over `feather` px inside the mask; outside it no byte moves

Masks are (H, W) bool arrays: True is painted.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from minikin.errors import BadPhoto, reason
from minikin.models.regions import Box

LANCZOS = Image.Resampling.LANCZOS
Margins = tuple[int, int, int, int]  # left, right, up, down
Corners = tuple[int, int, int, int]  # left, top, right, bottom
MaskLike = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class Canvas:
    """An image, the part of it that is painted, and where in it.

    image  RGB, extended
    mask     (H, W) of the image; None for all of it
    part     the corners of what is painted
    size     (width, height) it is painted at, before padding
    grid     what sides are padded to multiples of
    offset   padding at the left and the top, so that what is added there ends with a latent position
    """

    picture: Image.Image
    mask: np.ndarray | None
    part: Corners
    size: tuple[int, int]
    grid: int
    offset: tuple[int, int] = (0, 0)

    @property
    def padded(self) -> tuple[int, int]:
        """(width, height) of what the model paints."""
        sides = zip(self.size, self.offset, strict=True)
        width, height = (-(-(side + more) // self.grid) * self.grid for side, more in sides)
        return width, height

    @property
    def _padding(self) -> Margins:
        (x, y), (across, down), (w, h) = self.offset, self.padded, self.size
        return x, across - w - x, y, down - h - y

    @property
    def view(self) -> Box:
        """What the model paints, in shares of the image; padding lies beyond it."""
        left, top, right, bottom = self.part
        (w, h), (across, down) = self.picture.size, self.padded
        wide, high = (right - left) / self.size[0], (bottom - top) / self.size[1]  # pixels of the image
        x, y = left - self.offset[0] * wide, top - self.offset[1] * high
        return Box(x / w, y / h, (x + across * wide) / w, (y + down * high) / h)

    def ground(self) -> Image.Image:
        """The part to be painted, of the padded size."""
        shown = self.picture.crop(self.part)
        shown = shown if shown.size == self.size else shown.resize(self.size, LANCZOS)
        return _repeated(shown, self._padding)

    def ground_mask(self) -> np.ndarray | None:
        """The mask of that part, of the padded size."""
        if self.mask is None:
            return None
        shown = Image.fromarray(self.mask.astype(np.uint8) * 255).crop(self.part)
        bigger = np.asarray(shown.resize(self.size, Image.Resampling.NEAREST)) > 127
        left, right, up, down = self._padding
        return np.pad(bigger, ((up, down), (left, right)), mode="edge")

    def finished(self, painted: Image.Image, feather: int) -> Image.Image:
        """The image with what was painted in its place."""
        (x, y), (w, h) = self.offset, self.size
        inner = painted.crop((x, y, x + w, y + h))
        left, top, right, bottom = self.part
        inner = inner if inner.size == (right - left, bottom - top) else inner.resize(
            (right - left, bottom - top), LANCZOS
        )  # fmt: skip
        whole = self.picture.copy()
        whole.paste(inner, (left, top))
        if self.mask is None:
            return whole
        opacity = Image.fromarray(faded(self.mask, feather))
        return Image.composite(whole, self.picture, opacity)


def refining(picture: Image.Image, size: tuple[int, int], grid: int) -> Canvas:
    """All of an image, at another size."""
    resized = picture if picture.size == size else picture.resize(size, LANCZOS)
    return Canvas(resized, None, (0, 0, *size), size, grid)


def inpainting(
    picture: Image.Image, mask: np.ndarray | None, margins: Margins, grid: int, factor: int = 1,
    around: int | None = None, side: int = 0,
) -> Canvas:  # fmt: skip
    """What is under the mask and in the margins.

    factor  pixels of a latent position
    around  paint nothing but the mask with so many pixels around it, enlarged to `side`; None for all
    Raises BadPhoto when there is nothing to paint.
    """
    left, right, up, down = margins
    known = np.zeros((picture.height, picture.width), bool) if mask is None else mask
    whole = np.pad(known, ((up, down), (left, right)), constant_values=True)
    if not whole.any():
        raise BadPhoto("The mask is black everywhere, so nothing would be painted. White (or transparent) is.")
    bigger = _repeated(picture, margins)
    if around is None:
        offset = (-left % factor, -up % factor)
        return Canvas(bigger, whole, (0, 0, *bigger.size), bigger.size, grid, offset)
    part = _surroundings(whole, around)
    width, height = part[2] - part[0], part[3] - part[1]
    times = max(1.0, side / max(width, height))  # never smaller: that would lose what is there
    return Canvas(bigger, whole, part, (round(width * times), round(height * times)), grid)


def _surroundings(mask: np.ndarray, around: int) -> Corners:
    """The mask's corners with pixels around them, as near to a square as the image allows."""
    spans = []
    for axis in (0, 1):  # columns, then rows
        at = np.flatnonzero(mask.any(axis))
        spans.append((int(at[0]) - around, int(at[-1]) + 1 + around))
    longest = max(b - a for a, b in spans)
    (left, right), (top, bottom) = (
        _within(a, b, min(longest, most), most)
        for (a, b), most in zip(spans, (mask.shape[1], mask.shape[0]), strict=True)
    )
    return left, top, right, bottom


def _within(a: int, b: int, length: int, most: int) -> tuple[int, int]:
    """A span of this length around the middle of [a, b), moved into [0, most)."""
    begin = min(max(0, (a + b - length) // 2), most - length)
    return begin, begin + length


def _repeated(picture: Image.Image, margins: Margins) -> Image.Image:
    left, right, up, down = margins
    if not any(margins):
        return picture
    return Image.fromarray(np.pad(np.asarray(picture), ((up, down), (left, right), (0, 0)), mode="edge"))


def eroded(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask (H, W) bool without what is nearer than so many pixels to its border; the frame is no border.

    Not by Pillow's MinFilter: 12.3 ends the whole process there (a division by zero) for some small images.
    """
    for axis in (0, 1):
        margins = [(pixels, pixels) if k == axis else (0, 0) for k in (0, 1)]
        padded = np.pad(mask, margins, mode="edge")
        mask = np.asarray(np.lib.stride_tricks.sliding_window_view(padded, 2 * pixels + 1, axis).all(-1))
    return mask


def faded(mask: np.ndarray, feather: int) -> np.ndarray:
    """How much of what was painted is seen (H, W) uint8: 0 outside, rising inside over `feather` pixels.

    Where a mask is too thin for that, the blend is narrower.
    """
    smaller, width = mask, feather
    while width > 1:  # half the blend inwards, then both ways from there
        smaller = eroded(mask, width // 2)
        if smaller.any():
            break
        width //= 2
    inside = Image.fromarray(mask.astype(np.uint8) * 255)
    if width > 1:
        core = Image.fromarray(smaller.astype(np.uint8) * 255)
        inside = ImageChops.multiply(core.filter(ImageFilter.GaussianBlur(width / 4)), inside)
    opacity: np.ndarray = np.asarray(inside)
    return opacity


# ---- masks in files -------------------------------------------------------------------------------


def read_mask(mask: MaskLike, size: tuple[int, int]) -> np.ndarray:
    """A mask of an image of this size; raises BadPhoto.

    White is painted. Of a mask with an alpha channel that is not opaque everywhere, what is
    transparent is painted, as in OpenAI's interface.
    """
    if isinstance(mask, str | Path):
        try:
            with Image.open(mask, formats=("PNG", "JPEG", "WEBP", "BMP", "GIF")) as opened:
                opened.load()
                image: Image.Image = opened
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise BadPhoto(f"The mask {mask} cannot be read as an image: {reason(e)}.") from e
    elif isinstance(mask, np.ndarray):
        image = Image.fromarray((mask > 0).astype(np.uint8) * 255 if mask.dtype == bool else mask)
    else:
        image = mask
    if image.size != size:
        raise BadPhoto(
            f"The mask is {image.width}x{image.height}, but the image {size[0]}x{size[1]}. They must be of "
            "one size."
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            return _lit(ImageChops.invert(alpha))
    return _lit(image.convert("L"))


def _lit(grey: Image.Image) -> np.ndarray:
    lit: np.ndarray = np.asarray(grey) > 127
    return lit


def mask_text(mask: np.ndarray) -> str:
    """A mask as the base64 of a 1-bit PNG: a few hundred characters for a box, some thousands for a brush."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).convert("1").save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def mask_of_text(text: Any, size: tuple[int, int]) -> np.ndarray:
    """The inverse of `mask_text`; raises BadPhoto."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) as image:
            return read_mask(image.convert("L"), size)
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as e:
        raise BadPhoto(f"The mask inside the image's recipe cannot be read: {e}.") from e
