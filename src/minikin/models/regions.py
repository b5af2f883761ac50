"""Regions: an additive attention bias that binds a concept to a part of the image.

    <tom@left>   <tom@top-right:0.8>   <tom@0,20,50,100>   left, top, right, bottom in percent

Two concepts of one category have nearly the same keys, so cross-attention mixes them, and concepts of
different categories still influence each other. For positions outside a concept's region, the bias lowers the
attention scores of its tokens, as in Dense Diffusion (Kim et al. 2023, arXiv:2308.12964) without its other
terms. It holds to the last step: colours are decided late, and a bias that fades lets them mix
(docs/measurements.md).

Where a prompt names several concepts and no region, `AttentionRegions` finds them: each position belongs to the
concept whose tokens it attended to most in the first steps. One concept alone is painted as without regions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from minikin.errors import BadRecipe

if TYPE_CHECKING:
    from torch import Tensor

BIAS = 8.0  # subtracted from the score at positions outside the region, which leaves e^-8 of the attention
FOUND_UNTIL = 0.2  # share of the steps whose attention decides regions that are found
MEMORY = 0.5  # weight of the earlier steps' attention beside the last one's
SHARPNESS = 8.0  # of the division between concepts: the power of the ratio of their attention
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
    """A box, or None for a region to be found, and how much each token (N,) belongs to its concept, 0 to 1."""

    box: Box | None
    tokens: Tensor


class RegionBias:
    """The attention bias of one prompt's regions; cross-attention layers call `bias`.

    copies   images of the batch; the entries before them (unconditional prompt) get no bias
    latents  (height, width)
    """

    def __init__(self, regions: Sequence[Region], copies: int, latents: tuple[int, int]) -> None:
        self.regions, self.copies, self.latents = tuple(regions), copies, latents
        self._computed: dict[tuple[int, Any, Any], Tensor] = {}  # by positions, dtype and device

    def bias(self, batch: int, positions: int, like: Tensor) -> Tensor | None:
        """Bias (batch, 1, positions, N) to add to attention scores; None where there is none yet.

        like  a tensor of the dtype and device of the result
        """
        import torch

        which = positions, like.dtype, like.device
        if which not in self._computed:
            self._computed[which] = self._bias(self._size(positions)).to(like)
        bias = self._computed[which]
        unbiased = torch.zeros(batch - self.copies, *bias.shape[1:], dtype=like.dtype, device=like.device)
        return torch.cat([unbiased, bias.expand(self.copies, *bias.shape[1:])])

    def observe(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> None:
        """Called by every layer in every step with its queries and keys (B, heads, positions or N, d).

        mask  added to its scores, without this bias; None for no mask
        """

    def after_step(self, share: float) -> None:
        """Called after every step, with the share of the steps done."""

    def _bias(self, size: tuple[int, int]) -> Tensor:
        """(1 or copies, 1, positions, N)"""
        import torch

        total = torch.zeros(size[0] * size[1], len(self.regions[0].tokens))
        for box, tokens in self.regions:
            assert box is not None
            outside = 1 - coverage(box, size).flatten()
            total -= BIAS * outside[:, None] * tokens.float().cpu()[None]
        return total[None, None]

    def _size(self, positions: int) -> tuple[int, int]:
        """Height and width of the U-Net's level with this number of positions."""
        h, w = self.latents
        while h * w > positions:
            h, w = -(-h // 2), -(-w // 2)
        return h, w


class AttentionRegions(RegionBias):
    """The bias of regions that are found: none in the first step, then by the attention of the steps before.

    Each image has regions of its own. From `FOUND_UNTIL` of the steps on they stay as they are.
    """

    def __init__(self, regions: Sequence[Region], copies: int, latents: tuple[int, int]) -> None:
        import torch

        super().__init__(regions, copies, latents)
        self.maps: list[Tensor] | None = []  # of this step's layers; None when no more are needed
        self.tokens = torch.stack([region.tokens.float().cpu() for region in regions])  # (concepts, N)
        self.attention: Tensor | None = None  # (copies, concepts, h, w), 1 in the mean

    def bias(self, batch: int, positions: int, like: Tensor) -> Tensor | None:
        return None if self.attention is None else super().bias(batch, positions, like)

    def observe(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> None:
        if self.maps is not None:
            mask = mask if mask is None else mask[-self.copies :]
            attention = attention_maps(query[-self.copies :], key[-self.copies :], mask)
            self.maps.append(self._of_concepts((attention @ self.tokens.T.to(attention)).cpu()))

    def after_step(self, share: float) -> None:
        """Take up the step's attention."""
        import torch

        if not self.maps:
            return
        maps = torch.stack(self.maps).mean(0)
        before = maps if self.attention is None else self.attention
        self.attention = MEMORY * before + (1 - MEMORY) * maps
        self._computed = {}
        self.maps = [] if share < FOUND_UNTIL else None

    def _of_concepts(self, attention: Tensor) -> Tensor:
        """(copies, positions, concepts) of one layer -> (copies, concepts, h, w), 1 in the mean of each."""
        import torch.nn.functional as F

        size = self._size(attention.shape[1])
        maps = attention.transpose(1, 2).reshape(self.copies, -1, *size)
        maps = maps / maps.mean((2, 3), keepdim=True).clamp(min=1e-6)
        return F.interpolate(maps, self.latents, mode="bilinear")

    def _bias(self, size: tuple[int, int]) -> Tensor:
        import torch.nn.functional as F

        assert self.attention is not None
        attention = F.interpolate(self.attention, size, mode="area").clamp(min=1e-6)
        share = (SHARPNESS * attention.log()).softmax(1).flatten(2)  # (copies, concepts, positions)
        return -BIAS * ((1 - share).transpose(1, 2) @ self.tokens)[:, None]


def region_bias_of(regions: Sequence[Region], copies: int, latents: tuple[int, int]) -> RegionBias | None:
    """The bias of a prompt's regions; None for a prompt without any."""
    if not regions:
        return None
    kind = AttentionRegions if regions[0].box is None else RegionBias
    return kind(regions, copies, latents)


def attention_maps(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, positions, N), the mean over the heads; query and key (B, heads, positions or N, d).

    mask  to add to the scores
    """
    scores = query.float() @ key.float().transpose(-1, -2) * key.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask.float()
    maps: Tensor = scores.softmax(-1).mean(1)
    return maps


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
def region_bias_applied(denoiser: Any, region_bias: RegionBias | None) -> Iterator[None]:
    """Context in which the denoiser's cross-attention adds a region bias; None changes nothing."""
    forwards = (vars(module).get("forward") for module in denoiser.modules())
    layers: list[Any] = [forward for forward in forwards if hasattr(forward, "region_bias")]
    for layer in layers:
        layer.region_bias = region_bias
    try:
        yield
    finally:
        for layer in layers:
            layer.region_bias = None
