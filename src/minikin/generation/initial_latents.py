"""The ground an image is painted on: what is there already, and what of it stays.

The stock text-to-image pipeline paints on a ground too, when it is given the latents to begin with, a
scheduler that begins at their noise level, and what to put back after every step. So presets, concepts,
regions, engines and the course of guidance are the same code as for an image from nothing, and at
strength 1 without a mask it is the same image.

    ordinary U-Nets    outside the mask, the ground with its own noise is put back after every step
                       (RePaint's replacement; Lugmayr et al. 2022, arXiv:2201.09865)
    inpainting U-Nets  9 channels: the mask and the ground without what is under it are inputs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from minikin.generation.start_step import Beginning
from minikin.models.backends import behind
from minikin.models.base import Base
from minikin.models.regions import Box

EVERYTHING = Box(0, 0, 1, 1)


@dataclass(frozen=True)
class Ground:
    """What is painted on, in latents of one image.

    latents   (1, C, h, w) of the image
    strength  (0, 1]: how much noise painting begins with
    mask      (1, 1, h, w): 1 where it is painted, 0 where the ground stays; None for everywhere
    bare      (1, C, h, w) of the image without what is under the mask, for inpainting U-Nets
    side      of the windows the U-Net looks through, latent positions; None for one look at all
    view      the part of the image that this is: regions in prompts are of the whole image
    """

    latents: Tensor
    strength: float
    mask: Tensor | None = None
    bare: Tensor | None = None
    side: int | None = None
    view: Box = EVERYTHING

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in latent positions."""
        return self.latents.shape[-2], self.latents.shape[-1]


class Overpainting:
    """One batch on its way from the ground to images.

    latents  (B, C, h, w): as they are now; at the end, those of the images
    """

    def __init__(
        self, ground: Ground, base: Base, scheduler: Any, beginning: Beginning,
        generators: list[torch.Generator],
    ) -> None:  # fmt: skip
        self.ground, self.base, self.scheduler = ground, base, scheduler
        shape = (len(generators), *ground.latents.shape[1:])
        # drawn first and in this way, as the stock pipeline does: images from nothing are then the same
        self.noise = randn_tensor(shape, generator=generators, device=base.device, dtype=base.dtype)
        self.x0 = ground.latents.to(base.device, base.dtype).expand(shape)
        if beginning.pinned:
            scheduler.set_timesteps(timesteps=list(beginning.pinned), device=base.device)
        else:
            scheduler.set_timesteps(beginning.steps, device=base.device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        self.latents = self.noise
        if beginning.levels is not None:
            self.latents = self._noised(scheduler.timesteps[:1]) / scheduler.init_noise_sigma

    def _noised(self, t: Tensor) -> Tensor:
        made: Tensor = self.scheduler.add_noise(self.x0, self.noise, t.expand(len(self.noise)))
        return made

    def after(self, done: int, state: dict[str, Any]) -> dict[str, Any]:
        """A callback's answer after `done` steps: what lies outside the mask is the ground again."""
        self.latents = state["latents"]
        if self.ground.mask is None or self.base.is_inpainting:
            return state
        mask = self.ground.mask.to(self.latents)
        times = self.scheduler.timesteps
        there = self._noised(times[done : done + 1]) if done < len(times) else self.x0
        self.latents = mask * self.latents + (1 - mask) * there
        return {**state, "latents": self.latents}

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Inside, an inpainting U-Net is given mask and bare ground besides the latents; others nothing."""
        if not self.base.is_inpainting:
            yield
            return
        ground, like = self.ground, self.latents
        assert ground.bare is not None
        mask = like.new_ones(1, 1, *ground.size) if ground.mask is None else ground.mask.to(like)
        more = torch.cat([mask, ground.bare.to(like)], 1)
        plain: Callable[..., Any] = self.base.unet.forward

        def forward(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            inputs = more.expand(len(sample), -1, -1, -1).to(sample)
            return plain(torch.cat([sample, inputs], 1), *args, **kwargs)

        with behind(self.base.unet, forward):
            yield
