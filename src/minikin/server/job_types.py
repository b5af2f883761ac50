"""The kinds of work a server takes: one entry each, and everything else follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from minikin import recipes
from minikin.errors import BadRecipe
from minikin.events import Event
from minikin.generation.canvas import read_mask
from minikin.generation.source import Source, inherited
from minikin.recipes import Recipe, Rework
from minikin.server.engine import Given

if TYPE_CHECKING:
    from minikin.generation.img2img import Job

Verb = Callable[[Any, Any, Given], Iterator[Event]]  # studio, recipe, given


@dataclass(frozen=True)
class Kind:
    """One kind of work.

    recipe   the model of its request
    verb     runs it alone on a Studio that has this request's concepts; None for what is batched
    takes    the images it needs, by field name; may: those it can do without
    """

    name: str
    recipe: type[Recipe]
    verb: Verb | None = None
    takes: tuple[str, ...] = ()
    may: tuple[str, ...] = ()


def job_of(given: Given) -> Job:
    """The image to paint over and its mask; raises BadPhoto."""
    from minikin.generation.img2img import Job  # needs PyTorch; the gateway does not come here

    source = Source.of(given.pictures["picture"])
    mask = given.pictures.get("mask")
    return Job(source, None if mask is None else read_mask(mask, source.image.size))


def complete(kind: str, values: Mapping[str, Any], picture: Image.Image, base: str) -> dict[str, Any]:
    """A recipe's fields with the image's own for what is not given; raises BadRecipe."""
    model = ready(kind)
    assert issubclass(model, Rework)
    made = inherited(model, Source.of(picture), {"base": base, **values})
    return made.model_dump(exclude_none=True)


def _rework(studio: Any, recipe: Any, given: Given) -> Iterator[Event]:
    yield from studio.working(recipe, job_of(given))


def _teach(studio: Any, recipe: Any, given: Given) -> Iterator[Event]:
    checkpoint = given.folder / "checkpoint.safetensors" if given.folder else None
    resume = bool(checkpoint and checkpoint.exists())
    yield from studio.teaching(
        given.many["photos"], recipe, checkpoint=checkpoint, resume=resume, stop=given.stop
    )  # fmt: skip


def _masks(studio: Any, recipe: Any, given: Given) -> Iterator[Event]:
    yield from studio.masking(given.many["photos"], recipe.category)


KINDS: dict[str, Kind] = {
    "paint": Kind("paint", recipes.Paint),
    "refine": Kind("refine", recipes.Refine, _rework, ("picture",)),
    "inpaint": Kind("inpaint", recipes.Inpaint, _rework, ("picture",), ("mask",)),
    "teach": Kind("teach", recipes.Teach, _teach),
    "masks": Kind("masks", recipes.Teach, _masks),
}


def ready(name: str) -> type[Recipe]:
    """The recipe of a kind; raises BadRecipe."""
    if name not in KINDS:
        raise BadRecipe(f"There is no kind of work '{name[:40]}'. Known: {', '.join(KINDS)}.")
    return KINDS[name].recipe
