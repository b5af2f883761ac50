"""The kinds of work a server takes: one entry each, and everything else follows from it.

A kind whose recipe this version does not have yet is listed all the same; asking for it is answered
501 with a sentence. To plug one in: name its recipe and its verb here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from minikin import recipes
from minikin.errors import BadRecipe
from minikin.events import Event
from minikin.recipes import Recipe
from minikin.server.engine import Given
from minikin.server.faults import Refused

Verb = Callable[[Any, Any, Given], Iterator[Event]]  # studio, recipe, given


@dataclass(frozen=True)
class Kind:
    """One kind of work.

    recipe   the model of its request; None when this version cannot do it
    verb     runs it alone on a Studio that has this request's concepts; None for what is batched
    takes    the pictures it needs, by field name
    """

    name: str
    recipe: type[Recipe] | None
    verb: Verb | None = None
    takes: tuple[str, ...] = ()


def _refine(studio: Any, recipe: Any, given: Given) -> Iterator[Event]:
    yield from studio.refining(recipe, given.pictures["picture"])


def _inpaint(studio: Any, recipe: Any, given: Given) -> Iterator[Event]:
    yield from studio.inpainting(recipe, given.pictures["picture"], given.pictures["mask"])


def _teach(studio: Any, recipe: Any, given: Given) -> Iterator[Event]:
    checkpoint = given.folder / "checkpoint.safetensors" if given.folder else None
    resume = bool(checkpoint and checkpoint.exists())
    yield from studio.teaching(
        given.many["photos"], recipe, checkpoint=checkpoint, resume=resume, stop=given.stop
    )  # fmt: skip


def _recipe(name: str) -> type[Recipe] | None:
    found: type[Recipe] | None = getattr(recipes, name, None)
    return found


KINDS: dict[str, Kind] = {
    "paint": Kind("paint", recipes.Paint),
    "refine": Kind("refine", _recipe("Refine"), _refine, ("picture",)),
    "inpaint": Kind("inpaint", _recipe("Inpaint"), _inpaint, ("picture", "mask")),
    "teach": Kind("teach", recipes.Teach, _teach),
}


def ready(name: str) -> type[Recipe]:
    """The recipe of a kind; raises Refused, 501, for one that is not there yet."""
    if name not in KINDS:
        raise BadRecipe(f"There is no kind of work '{name[:40]}'. Known: {', '.join(KINDS)}.")
    found = KINDS[name].recipe
    if found is None:
        raise Refused(
            f"This version of Minikin cannot {name} pictures yet; it paints them from a prompt alone "
            "(/api/paint, /v1/images/generations, /sdapi/v1/txt2img).",
            status=501, code="not_implemented",
        )  # fmt: skip
    return found
