"""Pixel geometry of img2img and inpainting: which pixels are generated, at which size, and the paste back.

    extend and pad    pixels that do not exist yet repeat those at the edge
    crop and enlarge  a part of the image, generated at the base's training size
    paste back        generated pixels blend in over `feather` px inside the mask; outside it no byte changes

Masks are (H, W) bool arrays: True is generated.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from minikin.errors import BadPhoto
from minikin.images import pixels
from minikin.images.photos import grey_of_mask, read_image
from minikin.images.pixels import in_srgb
from minikin.models.regions import Box

LANCZOS = Image.Resampling.LANCZOS
Margins = tuple[int, int, int, int]  # left, right, up, down
Corners = tuple[int, int, int, int]  # left, top, right, bottom
MaskLike = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class Canvas:
    """An image and the part of it that is generated.

    image   RGB, extended
    mask    (H, W) of the image; None for all of it
    part    the corners of the part that the model sees
    size    (width, height) at which the part is generated, before padding
    grid    sides are padded to multiples of this, pixels
    offset  padding at the left and the top, so that extensions there end with a latent position
    """

    image: Image.Image
    mask: np.ndarray | None
    part: Corners
    size: tuple[int, int]
    grid: int
    offset: tuple[int, int] = (0, 0)

    @property
    def padded(self) -> tuple[int, int]:
        """(width, height) that the model generates."""
        sides = zip(self.size, self.offset, strict=True)
        width, height = (-(-(side + more) // self.grid) * self.grid for side, more in sides)
        return width, height

    @property
    def _padding(self) -> Margins:
        (x, y), (across, down), (w, h) = self.offset, self.padded, self.size
        return x, across - w - x, y, down - h - y

    @property
    def view(self) -> Box:
        """The part with its padding, in shares of the image; padding at its edges lies beyond 0 or 1."""
        left, top, right, bottom = self.part
        (w, h), (across, down) = self.image.size, self.padded
        wide, high = (right - left) / self.size[0], (bottom - top) / self.size[1]  # pixels of the image
        x, y = left - self.offset[0] * wide, top - self.offset[1] * high
        return Box(x / w, y / h, (x + across * wide) / w, (y + down * high) / h)

    def init_image(self) -> Image.Image:
        """The pixels of the part, at the padded size."""
        part = self.image.crop(self.part)
        part = part if part.size == self.size else part.resize(self.size, LANCZOS)
        return _extend(part, self._padding)

    def init_mask(self) -> np.ndarray | None:
        """The mask of the part, at the padded size."""
        if self.mask is None:
            return None
        part = Image.fromarray(self.mask.astype(np.uint8) * 255).crop(self.part)
        resized = np.asarray(part.resize(self.size, Image.Resampling.NEAREST)) > 127
        left, right, up, down = self._padding
        return np.pad(resized, ((up, down), (left, right)), mode="edge")

    def paste_back(self, generated: Image.Image, feather: int) -> Image.Image:
        """The whole image, with the generated part (of the padded size) in its place."""
        (x, y), (w, h) = self.offset, self.size
        part = generated.crop((x, y, x + w, y + h))
        left, top, right, bottom = self.part
        size = (right - left, bottom - top)
        part = part if part.size == size else part.resize(size, LANCZOS)
        whole = self.image.copy()
        whole.paste(part, (left, top))
        if self.mask is None:
            return whole
        return Image.composite(whole, self.image, Image.fromarray(blend_opacity(self.mask, feather)))


def resize_canvas(image: Image.Image, size: tuple[int, int], grid: int) -> Canvas:
    """The canvas of img2img: all of an image, at another size (width, height)."""
    resized = image if image.size == size else image.resize(size, LANCZOS)
    return Canvas(resized, None, (0, 0, *size), size, grid)


def inpaint_canvas(
    image: Image.Image,
    mask: np.ndarray | None,
    margins: Margins,
    grid: int,
    factor: int = 1,
    around: int | None = None,
    side: int = 0,
) -> Canvas:
    """The canvas of inpainting: pixels under the mask and in the margins are generated.

    factor  pixels of a latent position
    around  let the model see only the mask with so many pixels around it, enlarged to `side`; None for all
    Raises BadPhoto when nothing is left to generate.
    """
    left, right, up, down = margins
    inner = np.zeros((image.height, image.width), bool) if mask is None else mask
    whole = np.pad(inner, ((up, down), (left, right)), constant_values=True)
    if not whole.any():
        raise BadPhoto("The mask is black everywhere, so nothing would be painted. White (or transparent) is.")
    extended = _extend(image, margins)
    if around is None:
        offset = (-left % factor, -up % factor)
        return Canvas(extended, whole, (0, 0, *extended.size), extended.size, grid, offset)
    part = _surroundings(whole, around)
    width, height = part[2] - part[0], part[3] - part[1]
    scale = max(1.0, side / max(width, height))  # never smaller: that would lose detail
    return Canvas(extended, whole, part, (round(width * scale), round(height * scale)), grid)


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


def _extend(image: Image.Image, margins: Margins) -> Image.Image:
    """The image with margins that repeat the pixels at its edges."""
    left, right, up, down = margins
    if not any(margins):
        return image
    return Image.fromarray(np.pad(np.asarray(image), ((up, down), (left, right), (0, 0)), mode="edge"))


def erode(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask (H, W) bool without the pixels nearer than this to its border; the frame is no border.

    Not by Pillow's MinFilter: 12.3 ends the whole process there (a division by zero) for some small images.
    """
    for axis in (0, 1):
        margins = [(pixels, pixels) if k == axis else (0, 0) for k in (0, 1)]
        padded = np.pad(mask, margins, mode="edge")
        mask = np.asarray(np.lib.stride_tricks.sliding_window_view(padded, 2 * pixels + 1, axis).all(-1))
    return mask


def blend_opacity(mask: np.ndarray, feather: int) -> np.ndarray:
    """Opacity (H, W) uint8 of generated pixels: 0 outside the mask, rising inside over `feather` pixels.

    Where a mask is too thin for that, the blend is narrower.
    """
    smaller, width = mask, feather
    while width > 1:  # half the blend inwards, then both ways from there
        smaller = erode(mask, width // 2)
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

    White is generated. Of a mask with an alpha channel that is not opaque everywhere, transparent pixels
    are, as in OpenAI's interface.
    """
    if isinstance(mask, str | Path):
        image = read_image(Path(mask), f"The mask {mask}").image
    elif isinstance(mask, np.ndarray):
        image = Image.fromarray((mask > 0).astype(np.uint8) * 255 if mask.dtype == bool else mask)
    else:
        image = mask
    if image.size != size:
        raise BadPhoto(
            f"The mask is {image.width}x{image.height}, but the image {size[0]}x{size[1]}. They must be of "
            "one size."
        )
    image = in_srgb(image)
    if "A" in image.getbands():
        alpha = image.getchannel("A")
        if alpha.getextrema() != (255, 255):
            return _is_white(ImageChops.invert(alpha))
    return _is_white(grey_of_mask(image))


def _is_white(grey: Image.Image) -> np.ndarray:
    white: np.ndarray = np.asarray(grey) > 127
    return white


def mask_text(mask: np.ndarray) -> str:
    """A mask as the base64 of a 1-bit PNG: a few hundred characters for a box, some thousands for a brush."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).convert("1").save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def mask_of_text(text: Any, size: tuple[int, int]) -> np.ndarray:
    """The inverse of `mask_text`; raises BadPhoto."""
    try:
        data = base64.b64decode(text, validate=True)
        return read_mask(pixels.decode(data, size[0] * size[1], kinds=("PNG",)).image, size)
    except pixels.Refused as e:
        raise BadPhoto(f"The mask inside the image's recipe cannot be read: {e.code} {e.detail}".strip()) from e
    except (ValueError, TypeError) as e:
        raise BadPhoto(f"The mask inside the image's recipe cannot be read: {e}.") from e
