"""Windows: an image larger than the base was trained for, in overlapping parts without seams.

At every step the U-Net looks at overlapping windows of its own size, and its predictions are blended into
one for the whole image, which then takes one common step (MultiDiffusion; Bar-Tal et al. 2023,
arXiv:2302.08113; weights that fall smoothly towards a window's border as in Mixture of Diffusers,
Jimenez 2023, arXiv:2302.02412). Blending predictions rather than stepped latents gives the same for
deterministic samplers, and lets the others draw one noise for all windows.

The autoencoder's own tiles, which diffusers blends, are switched on for large images only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minikin.models.backends import behind
from minikin.models.base import Base
from minikin.models.regions import Box, Placed, Steering, steered, within

LARGEST = 1024  # px of a side that the autoencoder takes as a whole


def starts(length: int, side: int) -> list[int]:
    """Where windows of this side begin along a length: evenly, each covered half by the next."""
    if length <= side:
        return [0]
    n = math.ceil((length - side) / (side / 2)) + 1
    return [round(i * (length - side) / (n - 1)) for i in range(n)]


def bump(height: int, width: int) -> Tensor:
    """(1, 1, height, width) weights, sin^2: near 0 at the border, 1 in the middle."""
    down, across = (torch.sin(math.pi * (torch.arange(n) + 0.5) / n).square() for n in (height, width))
    return (down[:, None] * across[None])[None, None]


class Window(NamedTuple):
    """A part of the latents, and the regions as seen from it."""

    top: int
    left: int
    steering: Steering | None


class Windows:
    """The windows of one batch.

    size    (h, w) of the latents
    side    of a window, latent positions; a larger `size` is cut, a smaller one is not
    placed  regions, in shares of the whole
    """

    def __init__(
        self, size: tuple[int, int], side: int, placed: Sequence[Placed] = (), copies: int = 1
    ) -> None:
        self.size, (self.h, self.w) = size, (min(side, size[0]), min(side, size[1]))
        self.parts = [
            Window(top, left, self._steering(top, left, placed, copies))
            for top in starts(size[0], self.h)
            for left in starts(size[1], self.w)
        ]
        self.weight = bump(self.h, self.w)

    def _steering(self, top: int, left: int, placed: Sequence[Placed], copies: int) -> Steering | None:
        if not placed:
            return None
        (h, w), (y, x) = self.size, (top + self.h, left + self.w)
        view = Box(left / w, top / h, x / w, y / h)
        own = [Placed(within(p.box, view), p.tokens) for p in placed]
        return Steering(own, copies, (self.h, self.w))

    def at(self, share: float) -> None:
        """Tell the regions what share of the steps is done."""
        for part in self.parts:
            if part.steering:
                part.steering.share = share

    @contextmanager
    def on(self, base: Base) -> Iterator[None]:
        """Inside, the U-Net looks through the windows."""
        with behind(base.unet, self._through(base, base.unet.forward)):
            yield

    def _through(self, base: Base, plain: Callable[..., Any]) -> Callable[..., Any]:
        def forward(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            total = torch.zeros_like(sample[:, : base.unet.config.out_channels], dtype=torch.float32)
            weights = torch.zeros(1, 1, *self.size, device=sample.device)
            weight = self.weight.to(sample.device)
            given = {**kwargs, "return_dict": False} | self._sizes(base, kwargs)
            for top, left, steering in self.parts:
                part = (..., slice(top, top + self.h), slice(left, left + self.w))
                with steered(base.unet, steering):
                    (made,) = plain(sample[part].contiguous(), *args, **given)
                total[part] += weight * made.float()
                weights[part] += weight
            out = (total / weights).to(sample.dtype)
            if not kwargs.get("return_dict", True):
                return (out,)
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

            return UNet2DConditionOutput(sample=out)

        return forward

    def _sizes(self, base: Base, kwargs: dict[str, Any]) -> dict[str, Any]:
        """SDXL is told the size of its window, which is the size it knows, not that of the whole."""
        more = kwargs.get("added_cond_kwargs") or {}
        if "time_ids" not in more:
            return {}
        h, w = self.h * base.factor, self.w * base.factor
        ids = more["time_ids"].new_tensor([h, w, 0, 0, h, w]).expand(len(more["time_ids"]), -1)
        return {"added_cond_kwargs": {**more, "time_ids": ids}}


@contextmanager
def tiled_autoencoder(base: Base, largest: int = LARGEST) -> Iterator[None]:
    """Inside, the autoencoder takes images with a side above `largest` px in tiles of that side."""
    vae = base.vae
    names = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor")
    before = {name: getattr(vae, name) for name in names}
    vae.use_tiling, vae.tile_sample_min_size = True, largest
    vae.tile_latent_min_size, vae.tile_overlap_factor = largest // base.factor, 0.5
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
