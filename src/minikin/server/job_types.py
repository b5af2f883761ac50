"""Job types: one entry for each type of work a server accepts; routes, recipes and inputs follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from minikin import recipes
from minikin.errors import BadRecipe
from minikin.events import Event
from minikin.generation.canvas import read_mask
from minikin.generation.source import InitImage, SourceImage, inherited
from minikin.recipes import Img2Img, Recipe
from minikin.server.engine import JobInputs

Runner = Callable[[Any, Any, JobInputs], Iterator[Event]]  # of studio, recipe and inputs


@dataclass(frozen=True)
class JobType:
    """One type of work.

    recipe    the pydantic model of its request
    run       runs it alone on a Studio that has this request's concepts; None for what is batched
    required  names of the images it needs; optional: of those it can do without
    """

    name: str
    recipe: type[Recipe]
    run: Runner | None = None
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def init_image(inputs: JobInputs) -> InitImage:
    """The source image and its mask; raises BadPhoto."""
    source = SourceImage.of(inputs.images["image"])
    mask = inputs.images.get("mask")
    return InitImage(source, None if mask is None else read_mask(mask, source.image.size))


def with_defaults_of(kind: str, values: Mapping[str, Any], image: Image.Image, base: str) -> dict[str, Any]:
    """A recipe's fields; those that the request left out come from the image's metadata. Raises BadRecipe."""
    model = recipe_model(kind)
    assert issubclass(model, Img2Img)
    recipe = inherited(model, SourceImage.of(image), {"base": base, **values})
    return recipe.model_dump(exclude_none=True)


def _img2img(studio: Any, recipe: Any, inputs: JobInputs) -> Iterator[Event]:
    yield from studio.generating(recipe, init_image(inputs))


def _teach(studio: Any, recipe: Any, inputs: JobInputs) -> Iterator[Event]:
    checkpoint = inputs.folder / "checkpoint.safetensors" if inputs.folder else None
    resume = bool(checkpoint and checkpoint.exists())
    yield from studio.teaching(inputs.photos, recipe, checkpoint=checkpoint, resume=resume, stop=inputs.stop)


def _masks(studio: Any, recipe: Any, inputs: JobInputs) -> Iterator[Event]:
    yield from studio.masking(inputs.photos, recipe.category)


JOB_TYPES: dict[str, JobType] = {
    "paint": JobType("paint", recipes.Paint),
    "refine": JobType("refine", recipes.Refine, _img2img, ("image",)),
    "inpaint": JobType("inpaint", recipes.Inpaint, _img2img, ("image",), ("mask",)),
    "teach": JobType("teach", recipes.Teach, _teach),
    "masks": JobType("masks", recipes.Teach, _masks),
}


def recipe_model(kind: str) -> type[Recipe]:
    """The recipe of a job type; raises BadRecipe."""
    if kind not in JOB_TYPES:
        raise BadRecipe(f"There is no job type '{kind[:40]}'. Known: {', '.join(JOB_TYPES)}.")
    return JOB_TYPES[kind].recipe
