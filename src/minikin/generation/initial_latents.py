"""Latents that sampling starts from: noise for text-to-image, a noised image for img2img and inpainting.

Inpainting keeps what lies outside the mask in one of two ways:

    ordinary U-Nets    after every step, latents outside the mask are replaced by the image's own latents with
                       the noise of the next timestep (RePaint; Lugmayr et al. 2022, arXiv:2201.09865)
    inpainting U-Nets  mask and masked image are inputs, 9 channels in all (`unet_wrappers`)

At strength 1 without a mask, img2img is text-to-image, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from minikin.generation.start_step import StartStep
from minikin.models.base import Base
from minikin.models.regions import Box

EVERYTHING = Box(0, 0, 1, 1)


@dataclass(frozen=True)
class InitialLatents:
    """An encoded image to start from.

    latents         (1, C, h, w) of the image
    strength        (0, 1]: share of the noise that sampling starts with
    mask            (1, 1, h, w): 1 where latents are generated, 0 where they stay; None for 1 everywhere
    masked_latents  (1, C, h, w) of the image without what is under the mask, for inpainting U-Nets
    tile            side of the tiles of tiled diffusion, latent positions; None for the whole at once
    view            the part of the image that this is: regions in prompts refer to the whole image
    """

    latents: Tensor
    strength: float
    mask: Tensor | None = None
    masked_latents: Tensor | None = None
    tile: int | None = None
    view: Box = EVERYTHING

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in latent positions."""
        return self.latents.shape[-2], self.latents.shape[-1]


class LatentBatch:
    """Noise and known latents of one batch, and how they enter sampling.

    noise  (B, C, h, w), drawn as the stock pipelines draw it: one CPU generator for each image
    x0     (B, C, h, w), the image's latents; None for text-to-image
    """

    def __init__(
        self,
        base: Base,
        scheduler: Any,
        generators: list[torch.Generator],
        size: tuple[int, int],
        initial: InitialLatents | None,
    ) -> None:
        self.scheduler, self.initial = scheduler, initial
        shape = (len(generators), int(base.vae.config.latent_channels), *size)
        self.noise = randn_tensor(shape, generator=generators, device=base.device, dtype=base.latent_dtype)
        self.x0 = initial.latents.to(self.noise).expand(shape) if initial else None
        # inpainting U-Nets see mask and image themselves
        self.mask = None if base.is_inpainting or initial is None else initial.mask

    def start(self, start: StartStep) -> Tensor:
        """The latents of the first step, in the scheduler's scale."""
        latents = self.noise
        if self.x0 is not None and start.levels is not None:
            # divided and multiplied again, as stock pipelines scale every latents they are given
            latents = self._noised_image(self.scheduler.timesteps[:1]) / self.scheduler.init_noise_sigma
        scaled: Tensor = latents * self.scheduler.init_noise_sigma
        return scaled

    def paste_back(self, latents: Tensor, done: int) -> Tensor:
        """The latents after `done` steps, with the image's own outside the mask."""
        if self.mask is None or self.x0 is None:
            return latents
        timesteps = self.scheduler.timesteps
        image_latents = self._noised_image(timesteps[done : done + 1]) if done < len(timesteps) else self.x0
        mask = self.mask.to(latents)
        return mask * latents + (1 - mask) * image_latents

    def _noised_image(self, t: Tensor) -> Tensor:
        noised: Tensor = self.scheduler.add_noise(self.x0, self.noise, t.expand(len(self.noise)))
        return noised
