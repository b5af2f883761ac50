"""Regions: where in the image a concept belongs, as a soft bias of cross-attention.

    <tom@left>   <tom@top-right:0.8>   <tom@0,20,50,100>   left, top, right, bottom in percent

Two concepts of one category have nearly the same keys, so the U-Net cannot tell them apart by where it
looks; and two of different ones still borrow from each other. A region makes places outside its box
attend less to the concept's tokens: an additive bias on the attention scores, after Dense Diffusion (Kim
et al. 2023, arXiv:2308.12964), without its other terms. The bias is whole while the layout is decided and
fades out later, so that edges are free. Without regions nothing is computed otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from minikin.errors import BadRecipe

if TYPE_CHECKING:
    from torch import Tensor

BIAS = 8.0  # of a score, where nothing of the place lies inside: e^-8 of the attention is left
WHOLE_UNTIL, GONE_AFTER = 0.4, 0.8  # shares of the steps between which the bias fades
FINE = 64  # cells of a side a box is drawn on; places are averages of cells, so edges are soft


class Box(NamedTuple):
    """A rectangle in shares of the image's width and height, from its left upper corner."""

    left: float
    top: float
    right: float
    bottom: float


NAMED = {
    "left": Box(0, 0, 0.5, 1), "right": Box(0.5, 0, 1, 1),
    "top": Box(0, 0, 1, 0.5), "bottom": Box(0, 0.5, 1, 1),
    "center": Box(0.25, 0.25, 0.75, 0.75), "middle": Box(1 / 3, 0, 2 / 3, 1),
    "top-left": Box(0, 0, 0.5, 0.5), "top-right": Box(0.5, 0, 1, 0.5),
    "bottom-left": Box(0, 0.5, 0.5, 1), "bottom-right": Box(0.5, 0.5, 1, 1),
}  # fmt: skip


def box(text: str) -> Box:
    """A region's name or four percentages. Raises BadRecipe."""
    if text in NAMED:
        return NAMED[text]
    try:
        found = Box(*(float(part) / 100 for part in text.split(",")))
    except (ValueError, TypeError):
        found = Box(1, 1, 0, 0)
    if not (0 <= found.left < found.right <= 1 and 0 <= found.top < found.bottom <= 1):
        raise BadRecipe(
            f"'@{text}' is no region. Use @{', @'.join(NAMED)}, or left, top, right, bottom in percent: "
            "<tom@0,20,50,100>."
        )
    return found


def within(where: Box, view: Box) -> Box:
    """A box as seen from a part of the image, in shares of that part; it may reach beyond it."""
    across, down = view.right - view.left, view.bottom - view.top
    return Box(
        (where.left - view.left) / across, (where.top - view.top) / down,
        (where.right - view.left) / across, (where.bottom - view.top) / down,
    )  # fmt: skip


class Region(NamedTuple):
    """A box and how much each token (N,) belongs to what is placed there, 0 to 1."""

    box: Box
    tokens: Tensor


class RegionBias:
    """The bias of one prompt's regions; processors ask for it while it is on a U-Net.

    copies   images of the batch; the rows before theirs (guidance's empty prompt) have no bias
    latents  (height, width)
    share    of the steps that are done; sets how strong the bias still is
    """

    def __init__(self, placed: Sequence[Region], copies: int, latents: tuple[int, int]) -> None:
        self.regions, self.copies, self.latents = tuple(placed), copies, latents
        self.share = 0.0
        self._whole: dict[int, Tensor] = {}

    @property
    def weight(self) -> float:
        left = (GONE_AFTER - self.share) / (GONE_AFTER - WHOLE_UNTIL)
        return min(1.0, max(0.0, left))

    def bias(self, rows: int, places: int, like: Tensor) -> Tensor | None:
        """(rows, 1, places, N), to be added to the scores; None when it is gone."""
        import torch

        if not self.weight:
            return None
        if places not in self._whole:
            self._whole[places] = self._made(places)
        own = (self.weight * self._whole[places]).to(like)
        free = torch.zeros(rows - self.copies, 1, *own.shape, dtype=like.dtype, device=like.device)
        return torch.cat([free, own.expand(self.copies, 1, *own.shape)])

    def _made(self, places: int) -> Tensor:
        import torch

        size = self._size(places)
        total = torch.zeros(places, len(self.regions[0].tokens))
        for where, tokens in self.regions:
            outside = 1 - covered(where, size).flatten()
            total -= BIAS * outside[:, None] * tokens.float().cpu()[None]
        return total

    def _size(self, places: int) -> tuple[int, int]:
        """Height and width of the level with so many places."""
        h, w = self.latents
        while h * w > places:
            h, w = -(-h // 2), -(-w // 2)
        return h, w


def covered(where: Box, size: tuple[int, int]) -> Tensor:
    """How much of each place (h, w) lies inside the box, 0 to 1."""
    import torch
    import torch.nn.functional as F

    cells = (torch.arange(FINE) + 0.5) / FINE
    across = ((cells > where.left) & (cells < where.right)).float()
    down = ((cells > where.top) & (cells < where.bottom)).float()
    fine = (down[:, None] * across[None])[None, None]
    return F.interpolate(fine, size, mode="area")[0, 0]


@contextmanager
def biased_by_regions(unet: Any, region_bias: RegionBias | None) -> Iterator[None]:
    """Inside, the U-Net's cross-attention follows the regions; None changes nothing."""
    processors = [p for p in unet.attn_processors.values() if hasattr(p, "steering")]
    for p in processors:
        p.region_bias = region_bias
    try:
        yield
    finally:
        for p in processors:
            p.region_bias = None
