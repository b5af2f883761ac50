"""What a sweep tries: the grid of settings, and the prompts they are tried with.

Of settings that come to the same thing, one is tried: in 4 steps, a switch after 20 % and one after
35 % are both one step; an image without guidance has no guidance interval; mode row has no gate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from minikin.errors import BadRecipe
from minikin.generation.conditioning_schedule import nearest
from minikin.generation.plan import Plan
from minikin.models.presets import Preset
from minikin.perfusion.concept import Concept
from minikin.recipes import WHOLE, Compare, Sweep

FEW = 8  # steps; up to here a preset has one guidance that it was distilled for
MORE_GUIDANCE = 1.5  # times a base's own guidance: the other one that is tried with many steps
# Places alone are followed at almost any strength; another thing and its side are what a strong concept
# forgets. In words that the embedded model knows, too.
SCENES = (
    "in the snow", "and a rocket in the forest", "at night", "to the left of a robot in the desert",
    "in the forest", "and a teapot on the beach", "on a blue background",
    "to the right of a mushroom in the snow", "in the desert", "and a soccer ball at night",
    "on a pink background", "to the left of a sailboat in the city", "on the beach",
    "and a cactus in a meadow", "in the city", "to the right of a guitar in a room", "in a meadow",
    "and a penguin in the snow", "in a room", "to the left of a chair on the beach", "on a green background",
    "and a car in the city", "on a yellow background", "on a white background",
)  # fmt: skip
PLACES = tuple(s for s in SCENES if s.split()[0] in ("in", "on", "at"))  # with nothing else in them


@dataclass(frozen=True, order=True)
class Setting:
    """One way to paint a concept. tau None: the concept's own; interval in shares of the steps."""

    strength: float = 1.0
    tau: float | None = None
    guidance: float = 1.0
    switch: float = 0.0
    interval: tuple[float, float] = WHOLE

    def __str__(self) -> str:
        told = [f"strength {self.strength:g}"]
        if self.tau is not None:
            told.append(f"tau {self.tau:g}")
        told.append(f"guidance {self.guidance:g}")
        if self.interval != WHOLE:
            told[-1] += f" from {self.interval[0]:.0%} to {self.interval[1]:.0%}"
        if self.switch:
            told.append(f"category first {self.switch:.0%}")
        return ", ".join(told)


def taught(concept: Concept, plan: Plan) -> Setting:
    """How the concept is painted without any sweep."""
    return Setting(1.0, concept.gate.tau if concept.mode == "gated" else None, plan.guidance)


def grid(recipe: Sweep, concept: Concept, plan: Plan, embedded: bool = False) -> tuple[Setting, ...]:
    """All settings to try, the taught one first.

    embedded  guidance is an input of the U-Net (full LCM), so that it has no interval
    Raises BadRecipe for a guidance scale that the preset is not made for.
    """
    usual = taught(concept, plan)
    taus = recipe.taus if usual.tau is not None else (None,)
    seen, found = {_effect(usual, plan.steps, embedded)}, [usual]
    for strength, tau, guidance, switch, interval in product(
        recipe.strengths, taus, _guidances(recipe, plan), recipe.switches, recipe.intervals
    ):
        one = Setting(strength, tau, guidance, switch, interval)
        effect = _effect(one, plan.steps, embedded)
        if effect not in seen and effect[3] < plan.steps:  # the category alone is no image of the concept
            seen.add(effect)
            found.append(one)
    return tuple(found)


def drawn(settings: Sequence[Setting], n: int, seed: int) -> tuple[Setting, ...]:
    """The taught setting and n - 1 others, drawn at random."""
    order = np.random.default_rng(seed).permutation(len(settings) - 1) + 1
    return (settings[0], *(settings[i] for i in sorted(order[: n - 1])))


def _guidances(recipe: Sweep, plan: Plan) -> Sequence[float]:
    preset: Preset = plan.preset
    if recipe.guidances is None:
        return (plan.guidance,) if plan.steps <= FEW else (plan.guidance, MORE_GUIDANCE * plan.guidance)
    wrong = [g for g in recipe.guidances if not preset.low <= g <= preset.high]
    if wrong:
        raise BadRecipe(
            f"Preset {preset.name} is made for guidance {preset.low:g} to {preset.high:g}, not {wrong[0]:g}. "
            "Take it out of --guidances."
        )
    return recipe.guidances


def _effect(s: Setting, steps: int, embedded: bool) -> tuple[float, float | None, float, int, tuple[int, int]]:
    low, high = WHOLE if s.guidance <= 1 or embedded else s.interval
    return s.strength, s.tau, s.guidance, nearest(s.switch, steps), (nearest(low, steps), nearest(high, steps))


def texts(recipe: Sweep | Compare, category: str) -> tuple[str, ...]:
    """The prompts with {} where the thing is named, no other of its category in them.

    Raises BadRecipe when there are too few.
    """
    if recipe.texts is None:
        found = [f"a photo of {{}} {scene}" for scene in SCENES if f"a {category} " not in scene]
        whence = "scenes of its own"
    else:
        found, whence = _read(Path(recipe.texts)), f"prompts in {recipe.texts}"
    if len(found) < recipe.prompts:
        raise BadRecipe(
            f"--prompts asks for {recipe.prompts} prompts, but there are {len(found)} {whence}. Give a file "
            "with more of them, one a line, with --texts, or ask for fewer."
        )
    return tuple(found[: recipe.prompts])


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise BadRecipe(f"The prompts {path} cannot be read ({e}).") from e
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.startswith("#")))
    wrong = [line for line in found if line.count("{}") != 1]
    if wrong:
        raise BadRecipe(
            f'In {path}, write {{}} once where the thing is named; the line "{wrong[0][:60]}" does not.'
        )
    return found


def told(minutes: float) -> str:
    """A time as people say it."""
    if minutes < 1:
        return f"{math.ceil(60 * minutes)} seconds"
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
