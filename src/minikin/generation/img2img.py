"""Img2img and inpainting: a recipe and an image to a canvas, and the canvas to initial latents.

Sampling from these latents is `sampler`'s part, as for text-to-image.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from minikin.errors import BadRecipe
from minikin.generation import canvas as canvases
from minikin.generation.canvas import Canvas
from minikin.generation.defaults import LARGE
from minikin.generation.initial_latents import InitialLatents
from minikin.generation.source import InitImage
from minikin.generation.tiling import tiled_autoencoder
from minikin.models.base import Base
from minikin.recipes import Img2Img, Inpaint, Paint, Refine

FEATHER = 32  # the blend's default width is this part of the base's training size


def canvas(base: Base, recipe: Img2Img, init: InitImage) -> Canvas:
    """Which pixels are generated; raises BadRecipe or BadPhoto when there are none."""
    image = init.source.image
    if isinstance(recipe, Refine):
        with_size = recipe.with_size(image.size)
        assert with_size.width is not None
        assert with_size.height is not None
        return canvases.resize_canvas(image, (with_size.width, with_size.height), base.size_multiple)
    assert isinstance(recipe, Inpaint)
    if init.mask is None and not any(recipe.margins):
        raise BadRecipe("Say what to paint: a mask (--mask FILE, white is painted), or --extend right=64.")
    around = recipe.padding if recipe.only_masked else None
    return canvases.inpaint_canvas(
        image, init.mask, recipe.margins, base.size_multiple, base.vae_scale_factor, around, base.size_px
    )


def feather(base: Base, recipe: Paint) -> int:
    """Width of the blend inside the mask, pixels."""
    if not isinstance(recipe, Inpaint):
        return 0
    return base.size_px // FEATHER if recipe.feather is None else recipe.feather


@torch.no_grad()
def encode(base: Base, recipe: Img2Img, canvas: Canvas) -> InitialLatents:
    """The canvas as latents (1, C, h, w) and masks (1, 1, h, w)."""
    image, mask = canvas.init_image(), canvas.init_mask()
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    pixel_mask = None if mask is None else torch.from_numpy(mask)[None, None].float()
    with tiled_autoencoder(base):
        latents = base.to_latents(pixels)
        masked_latents = None
        if base.is_inpainting:  # grey under the mask, as these U-Nets were trained
            masked_latents = base.to_latents(pixels * (0 if pixel_mask is None else 1 - pixel_mask))
    # a latent position is generated as soon as one of its pixels is
    latent_mask = None if pixel_mask is None else F.max_pool2d(pixel_mask, base.vae_scale_factor)
    tile = tile_size(base, recipe, max(image.size))
    return InitialLatents(latents, recipe.strength, latent_mask, masked_latents, tile, canvas.view)


def tile_size(base: Base, recipe: Img2Img, longest: int) -> int | None:
    """Side of the tiles of tiled diffusion in latent positions; None where the U-Net sees the whole image.

    longest  side of the image, pixels
    """
    step = base.size_multiple // base.vae_scale_factor
    if recipe.tile == 0 or (recipe.tile is None and longest <= LARGE * base.size_px):
        return None
    tile = max(step, (recipe.tile or base.size_px) // base.vae_scale_factor // step * step)
    return tile if tile * base.vae_scale_factor < longest else None
