"""Grid of a sweep: the combinations of strength, tau, guidance, concept start and guidance interval to try.

Of combinations with the same effect, one is tried: in 4 steps, a concept start of 20 % and one of 35 % are both
one step; an image without guidance has no guidance interval; the value-only edit has no gate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from minikin.errors import BadRecipe
from minikin.generation.conditioning_schedule import nearest
from minikin.generation.request import ImageRequest
from minikin.models.presets import Preset
from minikin.perfusion.concept import Concept
from minikin.recipes import WHOLE, Sweep

FEW = 8  # steps; up to here a preset has one guidance that it was distilled for
MORE_GUIDANCE = 1.5  # times a base's own guidance: the second scale that is tried with many steps


@dataclass(frozen=True, order=True)
class GridPoint:
    """One way to generate images of a concept.

    tau            softness of the gate; None for the concept's own
    concept_start  share of the steps before the concept acts
    interval       shares of the steps from which and up to which there is guidance
    """

    strength: float = 1.0
    tau: float | None = None
    guidance: float = 1.0
    concept_start: float = 0.0
    interval: tuple[float, float] = WHOLE

    def __str__(self) -> str:
        parts = [f"strength {self.strength:g}"]
        if self.tau is not None:
            parts.append(f"tau {self.tau:g}")
        span = "" if self.interval == WHOLE else f" from {self.interval[0]:.0%} to {self.interval[1]:.0%}"
        parts.append(f"guidance {self.guidance:g}{span}")
        if self.concept_start:
            parts.append(f"concept from {self.concept_start:.0%}")
        return ", ".join(parts)


def default_point(concept: Concept, request: ImageRequest) -> GridPoint:
    """How the concept is used without any sweep."""
    return GridPoint(1.0, concept.gate.tau if concept.mode == "gated" else None, request.guidance)


def grid(
    recipe: Sweep, concept: Concept, request: ImageRequest, embedded: bool = False
) -> tuple[GridPoint, ...]:
    """All grid points, the default one first.

    embedded  guidance is an input of the U-Net (full LCM), so that it has no interval
    Raises BadRecipe for a guidance scale that the preset is not made for.
    """
    default = default_point(concept, request)
    taus = recipe.taus if default.tau is not None else (None,)
    effects, points = {_effect(default, request.steps, embedded)}, [default]
    for strength, tau, guidance, start, interval in product(
        recipe.strengths, taus, _guidances(recipe, request), recipe.concept_starts, recipe.intervals
    ):
        point = GridPoint(strength, tau, guidance, start, interval)
        effect = _effect(point, request.steps, embedded)
        if effect not in effects and effect[3] < request.steps:  # otherwise the concept never acts
            effects.add(effect)
            points.append(point)
    return tuple(points)


def sample(points: Sequence[GridPoint], n: int, seed: int) -> tuple[GridPoint, ...]:
    """The default point and n - 1 random others."""
    order = np.random.default_rng(seed).permutation(len(points) - 1) + 1
    return (points[0], *(points[i] for i in sorted(order[: n - 1])))


def duration(minutes: float) -> str:
    """A time in the largest unit that fits."""
    if minutes < 1:
        return f"{math.ceil(60 * minutes)} seconds"
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


def _guidances(recipe: Sweep, request: ImageRequest) -> Sequence[float]:
    preset: Preset = request.preset
    if recipe.guidances is None:
        return (
            (request.guidance,)
            if request.steps <= FEW
            else (request.guidance, MORE_GUIDANCE * request.guidance)
        )
    wrong = [g for g in recipe.guidances if not preset.low <= g <= preset.high]
    if wrong:
        raise BadRecipe(
            f"Preset {preset.name} is made for guidance {preset.low:g} to {preset.high:g}, not {wrong[0]:g}. "
            "Take it out of --guidances."
        )
    return recipe.guidances


def _effect(
    p: GridPoint, steps: int, embedded: bool
) -> tuple[float, float | None, float, int, tuple[int, int]]:
    """What tells two grid points apart in this number of steps."""
    low, high = WHOLE if p.guidance <= 1 or embedded else p.interval
    span = nearest(low, steps), nearest(high, steps)
    return p.strength, p.tau, p.guidance, nearest(p.concept_start, steps), span
