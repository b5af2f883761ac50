"""Getting a sweep's parts together: judge, photos, and what the images depend on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from minikin.errors import BadRecipe
from minikin.evaluation.encoders import Judge, open_judge
from minikin.evaluation.scores import References
from minikin.evaluation.sweep.sweep import Task
from minikin.generation.plan import Plan
from minikin.images.photos import Photo, load_photos
from minikin.models.base import Base
from minikin.perfusion.concept import Concept
from minikin.recipes import Sweep

UNSEEN = "unseen"  # beside the photos: others of the same thing, which teaching was not shown


def task(
    recipe: Sweep, concept: Concept, base: Base, plan: Plan, facts: Mapping[str, Any],
    judge: Judge | None = None,
) -> Task:  # fmt: skip
    """What is to be swept.

    facts  of an image of this concept (`Studio.facts`)
    judge  opened already; by the recipe's name otherwise
    Raises BadRecipe without photos or for a judge of another world, BadPhoto, and what `open_judge` raises.
    """
    if recipe.photos is None:
        raise BadRecipe(
            f"There are no photos of '{concept.name}' to compare with; a concept file holds none. Give "
            "the folder it was taught from: --photos FOLDER."
        )
    judge, _, known = references(recipe.judge, base, recipe.photos, judge, recipe.device)
    target = {
        "concept": facts["concepts"][concept.name]["sha256"], "base": facts["base"]["fingerprint"],
        "preset": facts["preset"], "steps": plan.steps, "sampler": facts["sampler"],
        "size": [plan.recipe.width, plan.recipe.height], "adapters": facts["adapters"],
        "dtype": str(base.dtype).removeprefix("torch."),
    }  # fmt: skip
    return Task(recipe, concept, plan, target, judge, known, plan.preset.embedded)


def references(
    name: str, base: Base, folder: str, judge: Judge | None = None, device: str | None = None
) -> tuple[Judge, list[Photo], References]:
    """The judge of this name, the photos, and what the judge sees in them and in those of `unseen/`.

    judge  opened already
    Raises BadRecipe for a judge of another world, BadPhoto, and what `open_judge` raises.
    """
    judge = judge or suited(name, base, device)
    photos, beside = load_photos(folder), Path(folder) / UNSEEN
    unseen = _images(load_photos(beside)) if beside.is_dir() else None
    return judge, photos, References.of(judge, _images(photos), held_out=unseen)


def suited(name: str, base: Base, device: str | None = None) -> Judge:
    """The judge of this name; raises BadRecipe when it knows another world than the base's."""
    if name == "tiny" and base.architecture != "tiny":
        raise BadRecipe(
            f"The judge tiny knows tiny's own world alone and cannot judge images of '{base.name}'. "
            "Use --judge clip-b32 or clip-l14."
        )
    return open_judge(name, device)


def _images(photos: list[Photo]) -> list[Image.Image]:
    return [Image.fromarray(photo.pixels) for photo in photos]
