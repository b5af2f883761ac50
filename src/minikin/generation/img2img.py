"""Painting over images: a recipe and an image become a canvas, the canvas a ground in latents.

What is painted on the ground is `paint.paint_batch`'s matter, as for images from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from minikin.errors import BadRecipe
from minikin.generation import canvas as canvases
from minikin.generation.canvas import Canvas
from minikin.generation.initial_latents import Ground
from minikin.generation.sampler import LARGE, Painted
from minikin.generation.source import Source
from minikin.generation.tiling import tiled_autoencoder
from minikin.images import xmp
from minikin.models.base import Base
from minikin.recipes import Inpaint, Paint, Refine, Rework

FEATHER = 32  # the blend's default width is this part of the base's size


@dataclass(frozen=True)
class Job:
    """An image to paint over and, for inpainting, the mask (H, W) bool of what is painted."""

    source: Source
    mask: np.ndarray | None = None

    def record(self) -> dict[str, Any]:
        """What the new image records of it, so that it can be repeated."""
        facts: dict[str, Any] = {"parent": self.source.parent(), xmp.KEY: self.source.source_type}
        return facts if self.mask is None else facts | {"mask": {"png": canvases.mask_text(self.mask)}}


@dataclass
class Begun:
    """One recipe on one image: the ground is the same for all its batches."""

    base: Base
    recipe: Rework
    canvas: Canvas

    @cached_property
    def ground(self) -> Ground:
        """Encoded when it is first asked for, by the thread that paints."""
        return ground(self.base, self.recipe, self.canvas)

    def finished(self, one: Painted) -> Painted:
        """The image with what was painted in its place."""
        return Painted(self.canvas.finished(one.image, feather(self.base, self.recipe)), one.seed)


def begun(base: Base, recipe: Paint, job: Job | None) -> Begun | None:
    """None for an image from nothing. Raises BadRecipe, BadPhoto."""
    if job is None:
        return None
    if not isinstance(recipe, Rework):
        raise BadRecipe("An image is refined or inpainted; `paint` paints from nothing.")
    return Begun(base, recipe, canvas(base, recipe, job))


def canvas(base: Base, recipe: Rework, job: Job) -> Canvas:
    """What is painted of the image; raises BadRecipe or BadPhoto when there is nothing."""
    picture = job.source.image
    if isinstance(recipe, Refine):
        told = recipe.sized(picture.size)
        assert told.width is not None
        assert told.height is not None
        return canvases.refining(picture, (told.width, told.height), base.grid)
    assert isinstance(recipe, Inpaint)
    if job.mask is None and not any(recipe.margins):
        raise BadRecipe("Say what to paint: a mask (--mask FILE, white is painted), or --extend right=64.")
    around = recipe.padding if recipe.only_masked else None
    return canvases.inpainting(picture, job.mask, recipe.margins, base.grid, base.factor, around, base.size_px)


def feather(base: Base, recipe: Rework) -> int:
    """Width of the blend inside the mask, pixels."""
    own = recipe.feather if isinstance(recipe, Inpaint) else 0
    return base.size_px // FEATHER if own is None else own


def ground(base: Base, recipe: Rework, painted: Canvas) -> Ground:
    """The canvas in latents."""
    picture, mask = painted.ground(), painted.ground_mask()
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    covered = None if mask is None else torch.from_numpy(mask)[None, None].float()
    with torch.no_grad(), tiled_autoencoder(base):
        latents = base.to_latents(pixels)
        bare = None
        if base.is_inpainting:  # grey where it is painted, as these were trained
            bare = base.to_latents(pixels * (0 if covered is None else 1 - covered))
    # a latent position is painted as soon as one of its pixels is
    small = None if covered is None else F.max_pool2d(covered, base.factor)
    return Ground(latents, recipe.strength, small, bare, side(base, recipe, picture), painted.view)


def side(base: Base, recipe: Rework, picture: Image.Image) -> int | None:
    """Side of the windows in latent positions; None where the U-Net looks at the whole."""
    step = base.grid // base.factor
    if recipe.tile == 0 or (recipe.tile is None and max(picture.size) <= LARGE * base.size_px):
        return None
    wanted = (recipe.tile or base.size_px) // base.factor
    found = max(step, wanted // step * step)
    return found if found * base.factor < max(picture.size) else None
