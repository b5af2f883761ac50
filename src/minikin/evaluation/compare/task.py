"""Getting a comparison's parts together: judge, photos, and the courses its images are painted by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minikin.baselines import class_images
from minikin.errors import BadRecipe
from minikin.evaluation.compare.compare import Course, Task
from minikin.evaluation.compare.methods import chosen
from minikin.evaluation.encoders import Judge
from minikin.evaluation.sweep.settings import FEW, texts
from minikin.evaluation.sweep.task import references
from minikin.images.photos import Photo
from minikin.models.base import Base
from minikin.models.presets import PRESETS, preset
from minikin.perfusion.concept import check_category, check_name
from minikin.recipes import Compare, Paint

Facts = Callable[[Paint], Mapping[str, Any]]  # of an image of this recipe (`Studio.facts`)


def task(
    recipe: Compare, base: Base, listed: Sequence[Mapping[str, Any]], facts: Facts, judge: Judge | None = None
) -> Task:  # fmt: skip
    """What is to be compared.

    listed  the presets of the base (`Studio.presets`)
    judge   opened already; by the recipe's name otherwise
    Raises UnknownName, BadRecipe, BadPhoto, and what `open_judge` raises.
    """
    methods = chosen(recipe.methods)
    check_name(recipe.name)
    check_category(recipe.category)
    texts(recipe, recipe.category)  # raises here what is wrong with them, not after teaching
    judge, photos, known = references(recipe.judge, base, recipe.photos, judge, recipe.device)
    courses, skipped = _courses(recipe, listed, facts)
    if not courses:
        raise BadRecipe(f"There is nothing to paint: {' '.join(skipped)} Choose other --steps.")
    second: list[Photo] = []
    beside = None
    if recipe.beside and recipe.beside_category:
        check_category(recipe.beside_category)
        _, second, beside = references(recipe.judge, base, recipe.beside, judge, recipe.device)
    return Task(recipe, methods, base, photos, courses, skipped, judge, known, beside, second)


def _courses(
    recipe: Compare, listed: Sequence[Mapping[str, Any]], facts: Facts
) -> tuple[tuple[Course, ...], tuple[str, ...]]:
    """How images of each number of steps are painted, and a sentence for each that cannot be."""
    found, skipped = [], []
    asked = [preset(name).name for name in recipe.presets]
    for steps in dict.fromkeys(recipe.steps):
        fitting = [p for p in listed if steps in PRESETS[p["name"]].allowed]
        fitting = [p for p in fitting if (p["name"] == "quality") == (steps > FEW)]
        fitting.sort(key=lambda p: len(PRESETS[p["name"]].allowed))  # made for few other numbers
        if asked and steps <= FEW:
            fitting = [p for p in fitting if p["name"] in asked]
        ready = [p for p in fitting if p["ready"]]
        if not ready:
            missing = " or ".join(f"{p['name']} (adapter {p['adapter']})" for p in fitting)
            why = f"preset {missing} is not on this machine" if missing else "no preset of this base is for it"
            skipped.append(f"{_counted(steps)} left out: {why}.")
            continue
        text = class_images.prompt(recipe.category)
        for name in [p["name"] for p in ready][: None if asked else 1]:
            looked = Paint.make(prompt=text, base=recipe.base, preset=name, steps=steps, points={})
            told = facts(looked)
            if told["recipe"]["steps"] != steps:
                skipped.append(f"{_counted(steps)} left out: {name}'s adapter is for other numbers.")
                continue
            keep = ("base", "preset", "sampler", "guidance", "adapters")
            found.append(Course(name, steps, {"steps": steps} | {k: told[k] for k in keep}))
    return tuple(found), tuple(skipped)


def _counted(steps: int) -> str:
    return "1 step is" if steps == 1 else f"{steps} steps are"
