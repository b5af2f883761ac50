"""What painting over an image was asked for: all of it (refine), or the part under a mask (inpaint)."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, model_validator

from minikin.errors import BadRecipe
from minikin.recipes.base import MAX_SIDE, check_spans
from minikin.recipes.paint import Paint, with_sides

SIDES = ("left", "right", "up", "down")
_TIMES = re.compile(r"(\d+(?:\.\d+)?)x")
# of a Paint's fields: those that belong to its preset, and go when another preset or base is asked for
OF_PRESET = ("preset", "steps", "guidance", "scheduler", "interval", "points", "force")


class Rework(Paint):
    """Paint over an image: fields that refining and inpainting share."""

    strength: float = Field(
        0.4, gt=0, le=1, description="noise to begin with, as a share: 0.4 keeps most of the image, 1 nothing"
    )
    tile: int | None = Field(
        None, ge=0, le=MAX_SIDE,
        description="side of overlapping tiles for large images, pixels; the base's own by default, 0: none",
    )  # fmt: skip

    @model_validator(mode="after")
    def _multiples_of_8(self) -> Rework:
        """Any size will do: it is padded while it is painted."""
        if self.interval:
            check_spans((self.interval,))
        return self


class Refine(Rework):
    """Paint an image again from itself: more steps, another base, larger."""

    prompt: str = Field("", description="what it shows; the image's own prompt by default")
    size: str | None = Field(None, description="2x, 1.5x, 512 or 512x768; the image's own by default")
    times: float | None = Field(None, gt=0, le=8, description="how many times larger the image becomes")

    @model_validator(mode="before")
    @classmethod
    def _size(cls, values: Any) -> Any:
        """size="2x" sets times, anything else width and height."""
        if isinstance(values, dict) and (found := _TIMES.fullmatch(str(values.get("size") or "").strip())):
            return {**values, "size": None, "times": float(found[1])}
        return with_sides(values)

    def sized(self, picture: tuple[int, int]) -> Refine:
        """The same with the new image's size written into it; raises BadRecipe when it is too large."""
        times = self.times or 1.0
        width, height = self.width, self.height
        if width and not height:
            height = round(picture[1] * width / picture[0])
        elif height and not width:
            width = round(picture[0] * height / picture[1])
        width, height = width or round(picture[0] * times), height or round(picture[1] * times)
        if max(width, height) > MAX_SIDE or min(width, height) < 8:
            raise BadRecipe(
                f"The refined image would be {width}x{height}; sides of 8 to {MAX_SIDE} pixels are possible. "
                "Choose another --size."
            )
        return self.model_copy(update={"times": None, "width": width, "height": height})


class Inpaint(Rework):
    """Paint the part of an image that is under a mask; the rest stays as it is, to the byte."""

    strength: float = Field(
        1.0, gt=0, le=1, description="noise to begin with under the mask: 1 paints anew, less keeps something"
    )
    feather: int | None = Field(
        None, ge=0, le=512, description="width of the blend inside the mask, pixels; a 32nd of the base's size"
    )
    only_masked: bool = Field(
        False, description="paint the mask's surroundings alone, enlarged to the base's size, for detail"
    )
    padding: int = Field(32, ge=0, le=1024, description="with only-masked: pixels around the mask to look at")
    extend: str | None = Field(
        None, description="pixels to add at the sides and paint: left=64,right=64,up=0,down=32"
    )

    @model_validator(mode="after")
    def _own_size(self) -> Inpaint:
        if self.width or self.height:
            raise ValueError("an inpainted image keeps its size; extend=right=64 adds to it")
        _margins(self.extend or "")
        return self

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """Pixels to add: left, right, up, down."""
        return _margins(self.extend or "")


def _margins(text: str) -> tuple[int, int, int, int]:
    told = dict.fromkeys(SIDES, 0)
    for part in text.replace(" ", "").split(","):
        side, _, pixels = part.partition("=")
        if not part:
            continue
        if side not in SIDES or not pixels.isdigit() or int(pixels) > MAX_SIDE:
            raise ValueError(
                f"extend names sides and pixels, as left=64,right=64,up=0,down=32 does, not '{part}'"
            )
        told[side] = int(pixels)
    return told["left"], told["right"], told["up"], told["down"]
