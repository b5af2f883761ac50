"""Align Your Steps: timesteps optimised for Stable Diffusion 1.5 and XL (Sabour et al. 2024, arXiv:2404.14507).

The lists are those of diffusers (`AysSchedules`), for 10 steps. Other numbers of steps are interpolated in the
logarithm of the noise level, as the authors do.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers.schedulers import AysSchedules

_LISTS = {"sd1": "StableDiffusion", "sd2": "StableDiffusion", "sdxl": "StableDiffusionXL"}
STEPS = 10  # of the published lists


def is_known(architecture: str) -> bool:
    """True if the schedule was measured for this architecture (for SD 2, A1111 takes that of SD 1)."""
    return architecture in _LISTS


def timesteps(architecture: str, steps: int, alphas_cumprod: torch.Tensor) -> list[int]:
    """The timesteps of `steps` steps, highest first.

    alphas_cumprod  of the base's noise schedule: which timestep a noise level belongs to
    """
    name = _LISTS[architecture]
    if steps == STEPS:
        return list(AysSchedules[f"{name}Timesteps"])
    published = np.log(np.array(AysSchedules[f"{name}Sigmas"], dtype=float))
    targets = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(published)), published)[:-1]
    levels = 0.5 * np.log(((1 - alphas_cumprod) / alphas_cumprod).double().numpy())
    nearest = np.abs(levels[None] - targets[:, None]).argmin(1)
    # from 100 steps on neighbours may round to one timestep, which samplers take for none
    for k in range(1, steps):
        nearest[k] = min(nearest[k], nearest[k - 1] - 1)
    return [int(t) for t in nearest if t >= 0]
