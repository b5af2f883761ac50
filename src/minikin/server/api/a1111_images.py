"""The images of A1111's /img2img: how they are resized, masked and filled before they are generated from."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps

from minikin.images.pixels import on_white

LANCZOS = Image.Resampling.LANCZOS
CROP, FILL = 1, 2  # `resize_mode`; 0 and 3 stretch
FILL_SIDE = 512  # at which the fill is computed: it has no detail
BLURS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))  # radius in pixels, how often it is laid over


def flat(image: Image.Image) -> Image.Image:
    """RGB; a transparent image lies on white, as A1111's default background. What it records stays."""
    if image.mode == "RGB":
        return image
    opaque = on_white(image)
    opaque.info = dict(image.info)
    return opaque


def resized(image: Image.Image, size: tuple[int, int], mode: int) -> Image.Image:
    """The image at this size: stretched, cropped to it, or within it with its edges continued."""
    if image.size == size or mode not in (CROP, FILL):
        return image
    if mode == CROP:
        result = ImageOps.fit(image, size, LANCZOS)
    else:
        inner = ImageOps.contain(image, size, LANCZOS)
        left, up = (size[0] - inner.width) // 2, (size[1] - inner.height) // 2
        right, down = size[0] - inner.width - left, size[1] - inner.height - up
        result = Image.fromarray(np.pad(np.asarray(inner), ((up, down), (left, right), (0, 0)), mode="edge"))
    result.info = dict(image.info)
    return result


def mask_of(mask: Image.Image, size: tuple[int, int], *, invert: bool) -> Image.Image:
    """The mask as grey, white where to generate. Of one that is not opaque everywhere, alpha is the mask."""
    has_alpha = "A" in mask.getbands() and mask.getchannel("A").getextrema() != (255, 255)
    grey = mask.getchannel("A") if has_alpha else mask.convert("L")
    grey = grey if grey.size == size else grey.resize(size, Image.Resampling.BILINEAR)
    return ImageChops.invert(grey) if invert else grey


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image with the masked part filled by its surroundings, blurred the more the farther away they are.

    As A1111's `inpainting_fill` 0, computed on a small copy.
    """
    small = ImageOps.contain(image, (FILL_SIDE, FILL_SIDE)) if max(image.size) > FILL_SIDE else image
    outside = ImageChops.invert(mask.resize(small.size)).point(lambda v: 255 if v > 127 else 0)
    if outside.getextrema()[1] == 0:  # nothing is left to fill it with
        return image
    visible = Image.new("RGBa", small.size)
    visible.paste(small.convert("RGBA").convert("RGBa"), mask=outside)
    fill = Image.new("RGBA", small.size)
    for radius, times in BLURS:
        layer = visible.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            fill.alpha_composite(layer)
    result = Image.composite(fill.convert("RGB").resize(image.size, LANCZOS), image, mask.point(_is_masked))
    result.info = dict(image.info)
    return result


def _is_masked(value: int) -> int:
    return 255 if value > 127 else 0
