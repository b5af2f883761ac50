"""Strength of img2img: at which noise level sampling starts, and how many steps are left from there.

The stock rule of image-to-image, the last int(steps * strength) steps, gives none at 4 steps and strength 0.2,
and moves the first noise level about. Here strength alone chooses the level:

    start at timestep t0 = 1000 * strength - 1, run ceil(steps * strength) steps from it

so at least one step always runs, none is longer than those of a whole image, and the same strength means the
same noise for any number of steps. At strength 1 nothing of the image is left: that is text-to-image, step for
step. A student with custom timesteps starts at t0 and goes on with its own ones below; latent consistency
models start at the next timestep of their grid (every 20th).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minikin.errors import BadRecipe
from minikin.generation import schedulers
from minikin.recipes import N_TRAIN


@dataclass(frozen=True)
class StartStep:
    """Where sampling starts.

    steps      that run
    levels     number of noise levels of the scheduler, t0 + 1; None for all of them: start with noise alone
    timesteps  custom ones; None where the scheduler computes them
    skipped    steps of a whole image that lie above t0
    order      calls of the U-Net in a step; in the last step there is one
    repeats    calls besides: PNDM computes its second step twice
    """

    steps: int
    levels: int | None = None
    timesteps: tuple[int, ...] | None = None
    skipped: int = 0
    order: int = 1
    repeats: int = 0

    @property
    def calls(self) -> int:
        """Calls of the U-Net that run."""
        return self.steps * self.order - (self.order - 1) + (self.repeats if self.steps > 1 else 0)

    @property
    def skipped_calls(self) -> int:
        return self.skipped * self.order


def start_step(n: int, scheduler: str, strength: float = 1.0, custom: Sequence[int] | None = None) -> StartStep:
    """Where sampling in n steps starts at this strength, in (0, 1].

    scheduler  diffusers' class name
    custom     timesteps of a student that does not keep to the scheduler's
    Raises BadRecipe for more steps than the scheduler has timesteps.
    """
    order, on_grid = schedulers.order(scheduler), scheduler in schedulers.LCM_GRID_SCHEDULERS
    repeats = int(scheduler == "PNDMScheduler")
    most = N_TRAIN // schedulers.LCM_GRID if on_grid and not custom else N_TRAIN
    if n > most:
        raise BadRecipe(f"This scheduler paints in at most {most} steps, not {n}. Use fewer, or another one.")
    levels = max(1, round(strength * N_TRAIN))
    if levels >= N_TRAIN:
        steps = len(custom) if custom else n
        return StartStep(steps, timesteps=tuple(custom) if custom else None, order=order, repeats=repeats)
    if custom:
        left = (levels - 1, *(t for t in custom if t < levels - 1))
        return StartStep(len(left), levels, left, max(0, len(custom) - len(left)), order, repeats)
    steps = math.ceil(n * strength - 1e-9)  # 10 of 25 steps at 0.4, despite rounding
    if on_grid:
        levels = schedulers.LCM_GRID * math.ceil(levels / schedulers.LCM_GRID)
        steps = min(steps, levels // schedulers.LCM_GRID)
    return StartStep(min(steps, levels), levels, skipped=n - steps, order=order, repeats=repeats)
