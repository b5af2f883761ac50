"""Tiled diffusion: an image larger than the base was trained for, in overlapping tiles without seams.

In every step the U-Net sees overlapping tiles of its training size, and its predictions are blended into one
for the whole image, which then takes one common step (MultiDiffusion; Bar-Tal et al. 2023, arXiv:2302.08113;
weights that fall smoothly towards a tile's border as in Mixture of Diffusers, Jimenez 2023, arXiv:2302.02412).
Blending predictions rather than stepped latents gives the same for deterministic samplers, and lets the others
draw one noise for all tiles.

The autoencoder's own tiles, which diffusers blends, are switched on for large images only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minikin.models.base import Base
from minikin.models.regions import (
    Box,
    Region,
    RegionBias,
    in_view,
    region_bias_applied,
    region_bias_of,
)

LARGEST = 1024  # px of a side that the autoencoder takes as a whole


def tile_starts(length: int, side: int) -> list[int]:
    """Where tiles of this side start along a length: evenly, each half covered by the next."""
    if length <= side:
        return [0]
    n = math.ceil((length - side) / (side / 2)) + 1
    return [round(i * (length - side) / (n - 1)) for i in range(n)]


def tile_weight(height: int, width: int) -> Tensor:
    """Blending weights (1, 1, height, width), sin^2: near 0 at the border, 1 in the middle."""
    down, across = (torch.sin(math.pi * (torch.arange(n) + 0.5) / n).square() for n in (height, width))
    return (down[:, None] * across[None])[None, None]


class Tile(NamedTuple):
    """A part of the latents, and the regions relative to it."""

    top: int
    left: int
    region_bias: RegionBias | None


class TiledDiffusion:
    """The tiles of one batch.

    size     (h, w) of the latents
    side     of a tile, latent positions; a smaller image is one tile
    regions  in shares of the whole image; those to be found have none in a tile
    copies   images of the batch
    """

    def __init__(
        self, size: tuple[int, int], side: int, regions: Sequence[Region] = (), copies: int = 1
    ) -> None:
        self.size, (self.h, self.w) = size, (min(side, size[0]), min(side, size[1]))
        self.tiles = [
            Tile(top, left, self._region_bias(top, left, regions, copies))
            for top in tile_starts(size[0], self.h)
            for left in tile_starts(size[1], self.w)
        ]
        self.weight = tile_weight(self.h, self.w)

    def _region_bias(self, top: int, left: int, regions: Sequence[Region], copies: int) -> RegionBias | None:
        (h, w), (bottom, right) = self.size, (top + self.h, left + self.w)
        view = Box(left / w, top / h, right / w, bottom / h)
        in_tile = [Region(in_view(box, view), tokens) for box, tokens in regions if box]
        return region_bias_of(in_tile, copies, (self.h, self.w))

    def wrap(self, base: Base, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A U-Net's forward that calls `forward` for each tile and blends the predictions."""

        def tiled(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            channels = base.denoiser.config.out_channels
            total = torch.zeros(len(sample), channels, *self.size, device=sample.device)
            weights = torch.zeros(1, 1, *self.size, device=sample.device)
            weight = self.weight.to(sample.device)
            for_tile = {**kwargs, "return_dict": False} | self._size_conditions(base, len(sample), kwargs)
            for top, left, region_bias in self.tiles:
                part = (..., slice(top, top + self.h), slice(left, left + self.w))
                with region_bias_applied(base.denoiser, region_bias):
                    (prediction,) = forward(sample[part].contiguous(), *args, **for_tile)
                total[part] += weight * prediction.float()
                weights[part] += weight
            blended = (total / weights).to(sample.dtype)
            if not kwargs.get("return_dict", True):
                return (blended,)
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

            return UNet2DConditionOutput(sample=blended)

        return tiled

    def _size_conditions(self, base: Base, n: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Those of SDXL and PixArt-alpha are of a tile, the size that the denoiser knows, not of the whole."""
        added = kwargs.get("added_cond_kwargs") or {}
        if not added:
            return {}
        size = (self.h * base.vae_scale_factor, self.w * base.vae_scale_factor)
        return {"added_cond_kwargs": {**added, **base.size_conditions(n, size)}}


@contextmanager
def tiled_autoencoder(base: Base, largest: int = LARGEST) -> Iterator[None]:
    """Inside, the autoencoder takes images with a side above `largest` px in tiles of that side."""
    vae, latent = base.vae, largest // base.vae_scale_factor
    tiling: dict[str, Any] = {"use_tiling": True}
    if hasattr(vae, "tile_overlap_factor"):
        tiling |= {"tile_sample_min_size": largest, "tile_latent_min_size": latent, "tile_overlap_factor": 0.5}
    else:  # AutoencoderDC
        for side in ("height", "width"):
            tiling |= {f"tile_sample_min_{side}": largest, f"tile_latent_min_{side}": latent}
            tiling[f"tile_sample_stride_{side}"] = latent // 2 * base.vae_scale_factor
    before = {name: getattr(vae, name) for name in tiling}
    for name, value in tiling.items():
        setattr(vae, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
