"""The images of OpenAI's edits: their mask, and the size they are generated at."""

from __future__ import annotations

import re
from collections.abc import Mapping

from PIL import Image, ImageOps

from minikin.server.errors import invalid_field
from minikin.server.limits import Limits

LANCZOS = Image.Resampling.LANCZOS
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


def of_size(
    images: Mapping[str, Image.Image], size: str | None, side: int, limits: Limits
) -> tuple[dict[str, Image.Image], str]:
    """The image and its mask at the size that was asked for, and a sentence where that is another one.

    size  "WxH"; None or "auto" for the image's own, or twice the base's where that is beyond the limits
    side  native size of the base, pixels
    Raises RequestRejected.
    """
    image = images["image"]
    target = _requested(size, side, limits) or _within(image.size, side, limits)
    if target == image.size:
        return dict(images), ""
    fitted = {name: ImageOps.fit(source, target, LANCZOS) for name, source in images.items()}
    for name, result in fitted.items():
        result.info = dict(images[name].info)
    ratio = abs(image.width * target[1] - image.height * target[0]) > max(*image.size, *target)
    how = "scaled and cropped" if ratio else "scaled"
    before = f"{image.width}x{image.height}"
    return fitted, f"The image of {before} was {how} to {target[0]}x{target[1]}."


def _requested(size: str | None, side: int, limits: Limits) -> tuple[int, int] | None:
    if not size or size == "auto":
        return None
    match = _SIZE.fullmatch(size.strip().lower())
    least, most = min(limits.least_side, side), limits.most_side
    if match is None or not all(least <= int(pixels) <= most for pixels in match.groups()):
        why = f"size: write it as 512x768 (width x height), with sides of {least} to {most} pixels, or auto."
        raise invalid_field("size", why, code="bad_recipe")
    return int(match[1]), int(match[2])


def _within(size: tuple[int, int], side: int, limits: Limits) -> tuple[int, int]:
    """The size, or where it is beyond the limits one of that shape, its longer side twice the base's."""
    if max(size) <= limits.most_side:
        return size
    scale = min(2 * side, limits.most_side) / max(size)
    least = min(limits.least_side, side)
    return max(least, round(size[0] * scale)), max(least, round(size[1] * scale))


def mask_from_alpha(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """OpenAI's mask (transparent where to paint) as ours: white there, black elsewhere."""
    if "A" not in image.getbands():
        raise invalid_field(
            "mask", "mask has no transparency; it is transparent where to paint.", code="invalid_mask"
        )
    if image.size != size:
        message = (
            f"mask has {image.width}x{image.height} pixels and image {size[0]}x{size[1]}; they must be equal."
        )
        raise invalid_field("mask", message, code="invalid_mask")
    return image.getchannel("A").point(lambda a: 255 - a)


def is_transparent(image: Image.Image) -> bool:
    """Whether some of an image is wholly transparent."""
    return "A" in image.getbands() and image.getchannel("A").getextrema()[0] == 0
