"""Regions: an additive attention bias that binds a concept to a part of the image.

    <tom@left>   <tom@top-right:0.8>   <tom@0,20,50,100>   left, top, right, bottom in percent

Two concepts of one category have nearly the same keys, so cross-attention mixes them, and concepts of
different categories still influence each other. For positions outside a region's box, the bias lowers the
attention scores of the concept's tokens, as in Dense Diffusion (Kim et al. 2023, arXiv:2308.12964) without
its other terms. The bias is full while the first steps decide the layout and fades out later, so that
objects may cross the box. Without regions the attention is computed as usual.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from minikin.errors import BadRecipe

if TYPE_CHECKING:
    from torch import Tensor

BIAS = 8.0  # subtracted from the score at positions outside the box, which leaves e^-8 of the attention
FULL_UNTIL, ZERO_FROM = 0.4, 0.8  # shares of the steps between which the bias fades
RASTER = 64  # side of the raster a box is drawn on; positions average over it, so edges are soft


class Box(NamedTuple):
    """A rectangle in shares of the image's width and height, measured from the upper left corner."""

    left: float
    top: float
    right: float
    bottom: float


NAMED_BOXES = {
    "left": Box(0, 0, 0.5, 1), "right": Box(0.5, 0, 1, 1),
    "top": Box(0, 0, 1, 0.5), "bottom": Box(0, 0.5, 1, 1),
    "center": Box(0.25, 0.25, 0.75, 0.75), "middle": Box(1 / 3, 0, 2 / 3, 1),
    "top-left": Box(0, 0, 0.5, 0.5), "top-right": Box(0.5, 0, 1, 0.5),
    "bottom-left": Box(0, 0.5, 0.5, 1), "bottom-right": Box(0.5, 0.5, 1, 1),
}  # fmt: skip


def parse_box(text: str) -> Box:
    """A box from a region's name or from four percentages; raises BadRecipe."""
    if text in NAMED_BOXES:
        return NAMED_BOXES[text]
    try:
        box = Box(*(float(part) / 100 for part in text.split(",")))
    except (ValueError, TypeError):
        box = Box(1, 1, 0, 0)
    if not (0 <= box.left < box.right <= 1 and 0 <= box.top < box.bottom <= 1):
        raise BadRecipe(
            f"'@{text}' is no region. Use @{', @'.join(NAMED_BOXES)}, or left, top, right, bottom in percent: "
            "<tom@0,20,50,100>."
        )
    return box


def in_view(box: Box, view: Box) -> Box:
    """The box in coordinates of a part of the image (`view`); it may extend beyond it."""
    width, height = view.right - view.left, view.bottom - view.top
    return Box(
        (box.left - view.left) / width,
        (box.top - view.top) / height,
        (box.right - view.left) / width,
        (box.bottom - view.top) / height,
    )


class Region(NamedTuple):
    """A box, and how much each token (N,) belongs to the concept in it, 0 to 1."""

    box: Box
    tokens: Tensor


class RegionBias:
    """The attention bias of one prompt's regions; attention processors call `bias`.

    copies   images of the batch; the entries before them (unconditional prompt) get no bias
    latents  (height, width)
    share    share of the steps done; determines the strength of the bias
    """

    def __init__(self, regions: Sequence[Region], copies: int, latents: tuple[int, int]) -> None:
        self.regions, self.copies, self.latents = tuple(regions), copies, latents
        self.share = 0.0
        self._full: dict[int, Tensor] = {}

    @property
    def weight(self) -> float:
        """Strength of the bias at this share of the steps, 0 to 1."""
        remaining = (ZERO_FROM - self.share) / (ZERO_FROM - FULL_UNTIL)
        return min(1.0, max(0.0, remaining))

    def bias(self, batch: int, positions: int, like: Tensor) -> Tensor | None:
        """Bias (batch, 1, positions, N) to add to attention scores; None when its weight is 0.

        like  a tensor of the dtype and device of the result
        """
        import torch

        if not self.weight:
            return None
        if positions not in self._full:
            self._full[positions] = self._full_bias(positions)
        bias = (self.weight * self._full[positions]).to(like)
        unbiased = torch.zeros(batch - self.copies, 1, *bias.shape, dtype=like.dtype, device=like.device)
        return torch.cat([unbiased, bias.expand(self.copies, 1, *bias.shape)])

    def _full_bias(self, positions: int) -> Tensor:
        import torch

        size = self._size(positions)
        total = torch.zeros(positions, len(self.regions[0].tokens))
        for box, tokens in self.regions:
            outside = 1 - coverage(box, size).flatten()
            total -= BIAS * outside[:, None] * tokens.float().cpu()[None]
        return total

    def _size(self, positions: int) -> tuple[int, int]:
        """Height and width of the U-Net's level with this number of positions."""
        h, w = self.latents
        while h * w > positions:
            h, w = -(-h // 2), -(-w // 2)
        return h, w


def coverage(box: Box, size: tuple[int, int]) -> Tensor:
    """Share (h, w) of each position's area that lies inside the box."""
    import torch
    import torch.nn.functional as F

    centers = (torch.arange(RASTER) + 0.5) / RASTER
    columns = ((centers > box.left) & (centers < box.right)).float()
    rows = ((centers > box.top) & (centers < box.bottom)).float()
    raster = (rows[:, None] * columns[None])[None, None]
    return F.interpolate(raster, size, mode="area")[0, 0]


@contextmanager
def region_bias_applied(unet: Any, region_bias: RegionBias | None) -> Iterator[None]:
    """Context in which the U-Net's cross-attention adds a region bias; None changes nothing."""
    processors = [p for p in unet.attn_processors.values() if hasattr(p, "region_bias")]
    for p in processors:
        p.region_bias = region_bias
    try:
        yield
    finally:
        for p in processors:
            p.region_bias = None
