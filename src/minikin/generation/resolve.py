"""Operating points at work: what concepts were measured to be best at, put in where nothing else was asked.

`<tom>` stands for tom's balanced point of the preset in use, `<tom:faithful>` for another one. A
strength in the prompt and --tau, --switch, --guidance and --interval win over the point's own
values. Guidance and its interval are matters of the whole image: they are those of the first concept
in the prompt that has a point. A concept without points is painted as it was taught.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minikin.errors import BadRecipe
from minikin.models.prompt import ConceptUse, Prompt
from minikin.perfusion import operating_points
from minikin.perfusion.concept import Concept
from minikin.perfusion.conditioning import Loaded
from minikin.perfusion.edit import Gate
from minikin.perfusion.operating_points import Point
from minikin.recipes import Paint, Tuned


def settle(
    recipe: Paint, prompt: Prompt, negative: Prompt, concepts: Mapping[str, Concept], preset: str, steps: int
) -> Paint:  # fmt: skip
    """The recipe with the points of all its concepts written into it; as it is when it has points already.

    Raises BadRecipe for a point by name that was not measured for this preset.
    """
    if recipe.points is not None:
        return recipe
    found: dict[str, Point] = {}
    for use in (*prompt.uses, *negative.uses):
        measured = operating_points.of(concepts[use.name].points, preset, steps)
        if use.point and use.point not in measured:
            raise BadRecipe(_not_measured(use, preset))
        if measured and use.name not in found:
            found[use.name] = measured[use.point or operating_points.USUAL]
    if not found:
        return recipe
    settled: dict[str, Any] = {
        "points": {n: Tuned(strength=p.strength, tau=p.tau, switch=p.switch) for n, p in found.items()}
    }
    first = next((found[n] for n in prompt.names if n in found), None)
    if first and recipe.guidance is None:
        settled["guidance"] = first.guidance
    if first and recipe.interval is None:
        settled["interval"] = first.interval
    return recipe.model_copy(update=settled)


def tuned(prompt: Prompt, known: Mapping[str, Tuned]) -> Prompt:
    """The prompt with the points' strengths, where it says none itself."""
    if not known:
        return prompt
    uses = (
        replace(u, strength=known[u.name].strength) if u.name in known and not u.given else u
        for u in prompt.uses
    )
    return replace(prompt, uses=tuple(uses))


def softened(loaded: Mapping[str, Loaded], known: Mapping[str, Tuned]) -> Mapping[str, Loaded]:
    """The concepts with the points' gates."""
    own = {n: (loaded[n], p.tau) for n, p in known.items() if n in loaded}
    return {**loaded} | {
        n: replace(one, concept=replace(one.concept, gate=Gate(one.concept.gate.beta, tau)))
        for n, (one, tau) in own.items() if tau is not None
    }  # fmt: skip


def shares(recipe: Paint, names: Sequence[str]) -> dict[str, float]:
    """For each concept the share of the steps in which its category stands in for it."""
    known = recipe.points or {}
    own = {n: known[n].switch if n in known else 0.0 for n in names}
    return own if recipe.switch is None else dict.fromkeys(names, recipe.switch)


def _not_measured(use: ConceptUse, preset: str) -> str:
    return (
        f"Concept '{use.name}' has no operating point '{use.point}' for preset {preset}. Measure it with "
        f"`minikin sweep {use.name} --preset {preset}`, or write <{use.name}> or a strength, <{use.name}:0.8>."
    )
