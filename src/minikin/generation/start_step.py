"""Strength: at which noise level painting over an image begins, and how many steps are left from there.

The stock rule of image-to-image, int(steps * strength) of the last steps, gives none at 4 steps and
strength 0.2, and moves the first noise level about. Here strength alone chooses the level:

    begin at timestep t0 = 1000 * strength - 1, run ceil(steps * strength) steps from it

so at least one step always runs, none is longer than those of a whole image, and the same strength
means the same noise for any number of steps. At strength 1 nothing of the image is left: that is
painting from noise, step for step. A student that keeps to timesteps of its own begins at t0 and goes on
with its own ones below; latent consistency models begin at the next of their every 20th timestep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from minikin.errors import BadRecipe
from minikin.generation import schedulers
from minikin.generation.plan import Plan
from minikin.recipes import N_TRAIN


@dataclass(frozen=True)
class Beginning:
    """Where painting begins.

    steps    that run
    levels   of noise the scheduler knows, t0 + 1; None for all of them: begin with nothing but noise
    pinned   the timesteps, where they are not what the scheduler comes to by itself
    skipped  steps of a whole image that lie above t0
    """

    steps: int
    levels: int | None = None
    pinned: tuple[int, ...] | None = None
    skipped: int = 0


def begin(decided: Plan, scheduler: str | None, strength: float = 1.0) -> Beginning:
    """Where a plan begins at this strength, in (0, 1].

    scheduler  diffusers' class name of what will paint
    """
    pinned = decided.pinned
    finest = N_TRAIN // schedulers.LATTICE if scheduler in schedulers.LATTICED and not pinned else N_TRAIN
    if decided.steps > finest:
        raise BadRecipe(
            f"This scheduler paints in at most {finest} steps, not {decided.steps}. Use fewer, or another one."
        )
    if strength >= 1:
        return Beginning(decided.steps, pinned=tuple(pinned) if pinned else None)
    levels = max(1, round(strength * N_TRAIN))
    if pinned:
        left = (levels - 1, *(t for t in pinned if t < levels - 1))
        return Beginning(len(left), levels, left, max(0, len(pinned) - len(left)))
    steps = math.ceil(decided.steps * strength - 1e-9)  # 10 of 25 steps at 0.4, whatever floats make of it
    if scheduler in schedulers.LATTICED:
        levels = schedulers.LATTICE * math.ceil(levels / schedulers.LATTICE)
        steps = min(steps, levels // schedulers.LATTICE)
    return Beginning(min(steps, levels), levels, skipped=decided.steps - steps)
