"""Options of the commands refine (img2img) and inpaint."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, model_validator

from minikin.errors import BadRecipe
from minikin.recipes.base import MAX_SIDE, check_spans
from minikin.recipes.paint import Paint, with_sides

SIDES = ("left", "right", "up", "down")
_TIMES = re.compile(r"(\d+(?:\.\d+)?)x")
# Options that belong to a preset: those of an image are dropped when another preset or base is chosen.
PRESET_OPTIONS = ("preset", "steps", "guidance", "scheduler", "schedule", "interval", "points", "force")


class Img2Img(Paint):
    """Options of img2img that refine and inpaint share."""

    strength: float = Field(
        0.4, gt=0, le=1, description="denoising strength: 0.4 keeps most of the image, 1 keeps nothing"
    )
    tile: int | None = Field(
        None, ge=0, le=MAX_SIDE,
        description="tiled diffusion: side of the overlapping tiles in pixels; the base's size, 0 is off",
    )  # fmt: skip

    @model_validator(mode="after")
    def _multiples_of_8(self) -> Img2Img:
        """Accept any size: images are padded for sampling."""
        if self.interval:
            check_spans((self.interval,))
        return self


class Refine(Img2Img):
    """Refine an image: more steps, another base, a larger size."""

    prompt: str = Field("", description="the prompt; the one the image carries by default")
    size: str | None = Field(None, description="2x, 1.5x, 512 or 512x768; the image's by default")
    times: float | None = Field(None, gt=0, le=8, description="factor of the size")

    @model_validator(mode="before")
    @classmethod
    def _size(cls, values: Any) -> Any:
        """size="2x" sets `times`; another text sets width and height."""
        if isinstance(values, dict) and (factor := _TIMES.fullmatch(str(values.get("size") or "").strip())):
            return {**values, "size": None, "times": float(factor[1])}
        return with_sides(values)

    def with_size(self, image_size: tuple[int, int]) -> Refine:
        """The recipe with the width and height of the new image. Raises BadRecipe when they are too large."""
        times = self.times or 1.0
        width, height = self.width, self.height
        if width and not height:
            height = round(image_size[1] * width / image_size[0])
        elif height and not width:
            width = round(image_size[0] * height / image_size[1])
        width, height = width or round(image_size[0] * times), height or round(image_size[1] * times)
        if max(width, height) > MAX_SIDE or min(width, height) < 8:
            raise BadRecipe(
                f"The refined image would be {width}x{height}; sides of 8 to {MAX_SIDE} pixels are possible. "
                "Choose another --size."
            )
        return self.model_copy(update={"times": None, "width": width, "height": height})


class Inpaint(Img2Img):
    """Inpaint the part of an image under a mask; the rest stays identical, to the byte."""

    strength: float = Field(1.0, gt=0, le=1, description="denoising strength under the mask: 1 keeps nothing")
    feather: int | None = Field(
        None, ge=0, le=512, description="width of the blend inside the mask in pixels; 1/32 of the base's size"
    )
    only_masked: bool = Field(
        False, description="generate only the masked area, enlarged to the base's size, for detail"
    )
    padding: int = Field(32, ge=0, le=1024, description="with only-masked: context around the mask in pixels")
    extend: str | None = Field(
        None, description="outpainting: pixels to add at each side, left=64,right=64,up=0,down=32"
    )

    @model_validator(mode="after")
    def _keeps_its_size(self) -> Inpaint:
        if self.width or self.height:
            raise ValueError("an inpainted image keeps its size; extend=right=64 adds to it")
        _margins(self.extend or "")
        return self

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """Pixels to add at the left, right, top and bottom."""
        return _margins(self.extend or "")


def _margins(text: str) -> tuple[int, int, int, int]:
    margins = dict.fromkeys(SIDES, 0)
    for part in text.replace(" ", "").split(","):
        side, _, pixels = part.partition("=")
        if not part:
            continue
        if side not in SIDES or not pixels.isdigit() or int(pixels) > MAX_SIDE:
            raise ValueError(
                f"extend expects sides and pixels, like left=64,right=64,up=0,down=32, not '{part}'"
            )
        margins[side] = int(pixels)
    return margins["left"], margins["right"], margins["up"], margins["down"]
