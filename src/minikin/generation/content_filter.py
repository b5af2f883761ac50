"""Content filter: looks at generated images, and flags, blurs or blocks those it objects to.

    off     no filter; the default on one's own machine
    flag    the image stays as it is, its record and the answer carry the verdict
    blur    the image is given out without detail, and its record says so
    block   the image is not given out; a card with a sentence takes its place

A filter that fails fails the image; no image is given out unseen. One that is not on the machine is an error at
the start. It is a filter and no guarantee: `safety_checker` is easily misled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image, ImageDraw, ImageFont

from minikin.errors import Blocked, MinikinError
from minikin.generation.verdict import Verdict
from minikin.images import xmp
from minikin.images.sheet import wrapped
from minikin.recipes import FilterMode

if TYPE_CHECKING:
    from minikin.generation.image import GeneratedImage
    from minikin.models.base import Base

ACTIONS: dict[FilterMode, str] = {"flag": "flagged", "blur": "blurred", "block": "blocked"}
CARD = "Blocked by the content filter"
BLUR_PX = 8  # the longer side that a blurred image is reduced to


class ContentFilter(Protocol):
    """Looks at images; called from any thread."""

    name: str

    def __call__(self, images: Sequence[Image.Image]) -> Sequence[Verdict]:
        """One verdict an image, in their order."""


@dataclass(frozen=True)
class Filtering:
    """A filter and what happens to images it objects to."""

    filter: ContentFilter
    mode: FilterMode

    @property
    def hides(self) -> bool:
        """Whether images that the filter has not seen yet, previews among them, may not be shown."""
        return self.mode != "flag"

    def __call__(self, images: Sequence[GeneratedImage]) -> list[GeneratedImage]:
        """The same images; those the filter objects to have a `verdict` and are changed as the mode says."""
        verdicts = list(self.filter([generated.image for generated in images]))
        if len(verdicts) != len(images):
            raise MinikinError(
                f"The content filter {self.filter.name} gave {len(verdicts)} verdicts on {len(images)} images, "
                "so none is given out."
            )
        return [self._apply(generated, v) for generated, v in zip(images, verdicts, strict=True)]

    def _apply(self, generated: GeneratedImage, verdict: Verdict) -> GeneratedImage:
        if not verdict.objects:
            return generated
        entry = {"by": self.filter.name, "action": ACTIONS[self.mode], "labels": list(verdict.labels)}
        image = {"flag": lambda i: i, "blur": blurred, "block": card}[self.mode](generated.image)
        record = {**generated.record, "filter": entry} if generated.record else {}
        return replace(generated, image=image, verdict=entry, record=record)


def is_blocked(verdict: dict[str, Any] | None) -> bool:
    """Whether the image with this verdict was not given out."""
    return verdict is not None and verdict["action"] == ACTIONS["block"]


def without_blocked(images: Sequence[GeneratedImage], *, strict: bool = False) -> list[GeneratedImage]:
    """The images that are given out; raises Blocked when there is none, and if `strict` when one is missing."""
    allowed = [generated for generated in images if not is_blocked(generated.verdict)]
    if images and (not allowed or (strict and len(allowed) < len(images))):
        raise Blocked(refusal(len(images) - len(allowed), len(images)))
    return allowed


def refusal(blocked: int, of: int) -> str:
    """The message to somebody whose images were blocked."""
    what = "The image was" if of == 1 else f"{blocked} of {of} images were"
    return f"{what} blocked by the content filter. Try other words or another seed."


def blurred(image: Image.Image) -> Image.Image:
    """The image, reduced so far that no detail can be brought back."""
    scale = BLUR_PX / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    return small.resize(image.size, Image.Resampling.BICUBIC)


def card(image: Image.Image) -> Image.Image:
    """A card of the image's size that says in words that it was blocked; no model made it."""
    w, h = image.size
    font = ImageFont.load_default(size=max(10, w // 12))
    text = "\n".join(wrapped(CARD, int(0.9 * w), font))
    blank = Image.new("RGB", (w, h), (225, 225, 225))
    ImageDraw.Draw(blank).multiline_text((w / 2, h / 2), text, (60, 60, 60), font, "mm", align="center")
    return xmp.with_source_type(blank, xmp.NONE)


def open_filtering(mode: FilterMode | None, base: Base | None) -> Filtering | None:
    """Open the content filter on the base's device (without a base, the CPU); None for mode None.

    Raises NoNetwork, BadModelFile.
    """
    if mode is None:
        return None
    from minikin.generation.safety_checker import SafetyChecker

    return Filtering(SafetyChecker.of(base), mode)
