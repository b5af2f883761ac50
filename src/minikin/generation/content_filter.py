"""The content filter's seam: what looks at finished images, and what happens to those it finds.

    off     nobody looks; the default on one's own machine
    flag    the image stays as it is, its record and the answer say what was found
    blur    the image is shown without detail, and its record says so
    block   the image is not given out; in its place stands a card of words

A filter that fails is an error of the image, never an image that nobody looked at; one that is not on
the machine is an error at the start. It is a filter and no guarantee: `safety` is easily led astray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image, ImageDraw, ImageFont

from minikin.errors import Blocked, MinikinError
from minikin.images import xmp
from minikin.images.sheet import wrapped
from minikin.recipes import Mode

if TYPE_CHECKING:
    from minikin.generation.sampler import Painted
    from minikin.models.base import Base

ACTIONS: dict[Mode, str] = {"flag": "flagged", "blur": "blurred", "block": "blocked"}
CARD = "Blocked by the content filter"
LEFT = 8  # px of the longer side that a blurred image is made from: shapes of nothing


@dataclass(frozen=True)
class Verdict:
    """What a filter thinks of one image; labels say of what kind it found it to be."""

    found: bool
    labels: tuple[str, ...] = ()


class ContentFilter(Protocol):
    """Looks at images; called from any thread."""

    name: str

    def __call__(self, images: Sequence[Image.Image]) -> Sequence[Verdict]:
        """One verdict an image, in their order."""


@dataclass(frozen=True)
class Filtering:
    """A filter and what is done by its word."""

    filter: ContentFilter
    mode: Mode

    @property
    def hides(self) -> bool:
        """Whether images that nobody has looked at yet, previews among them, may not be shown."""
        return self.mode != "flag"

    def __call__(self, painted: Sequence[Painted]) -> list[Painted]:
        """The same images, those that were found with a `verdict`, and changed as the mode says."""
        verdicts = list(self.filter([one.image for one in painted]))
        if len(verdicts) != len(painted):
            raise MinikinError(
                f"The content filter {self.filter.name} judged {len(verdicts)} of {len(painted)} images, so "
                "none is given out."
            )
        return [self._by(one, verdict) for one, verdict in zip(painted, verdicts, strict=True)]

    def _by(self, one: Painted, verdict: Verdict) -> Painted:
        if not verdict.found:
            return one
        told = {"by": self.filter.name, "action": ACTIONS[self.mode], "labels": list(verdict.labels)}
        image = {"flag": lambda i: i, "blur": blurred, "block": card}[self.mode](one.image)
        return replace(one, image=image, verdict=told)


def is_blocked(verdict: dict[str, Any] | None) -> bool:
    """Whether the image with this verdict was not given out."""
    return verdict is not None and verdict["action"] == ACTIONS["block"]


def passed(painted: Sequence[Painted], *, all_of_them: bool = False) -> list[Painted]:
    """Those that are given out; raises Blocked when none is (or, `all_of_them`, when one is not)."""
    kept = [one for one in painted if not is_blocked(one.verdict)]
    if painted and (not kept or (all_of_them and len(kept) < len(painted))):
        raise Blocked(refusal(len(painted) - len(kept), len(painted)))
    return kept


def refusal(blocked: int, of: int) -> str:
    """What somebody is told whose images were blocked."""
    what = "The image was" if of == 1 else f"{blocked} of {of} images were"
    return f"{what} blocked by the content filter. Try other words or another seed."


def blurred(image: Image.Image) -> Image.Image:
    """So little is left of it that nothing can be brought back."""
    times = LEFT / max(image.size)
    small = image.resize((max(1, round(image.width * times)), max(1, round(image.height * times))))
    return small.resize(image.size, Image.Resampling.BICUBIC)


def card(image: Image.Image) -> Image.Image:
    """A card of the image's size that says in words what happened; no model painted it."""
    w, h = image.size
    font = ImageFont.load_default(size=max(10, w // 12))
    text = "\n".join(wrapped(CARD, int(0.9 * w), font))
    found = Image.new("RGB", (w, h), (225, 225, 225))
    ImageDraw.Draw(found).multiline_text((w / 2, h / 2), text, (60, 60, 60), font, "mm", align="center")
    return xmp.made(found, xmp.NONE)


def open_filtering(mode: Mode | None, base: Base | None) -> Filtering | None:
    """The filter there is, on the base's device (without one, the CPU); None for None.

    Raises NoNetwork, BadModelFile.
    """
    if mode is None:
        return None
    from minikin.generation.safety_checker import SafetyChecker

    return Filtering(SafetyChecker.of(base), mode)
