"""Euler ancestral at custom timesteps: the sampler of Stability's Turbo demo.

diffusers' Euler ancestral takes a number of steps and a spacing, not a list; the demo's timesteps
999, 899, 799, 699 are no spacing it knows.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler


class EulerAncestralCustomTimesteps(EulerAncestralDiscreteScheduler):  # type: ignore[misc]
    """Euler ancestral whose `set_timesteps` also takes a list of timesteps, highest first."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: list[int] | None = None,
    ) -> None:
        if timesteps is None:
            super().set_timesteps(num_inference_steps, device)
            return
        super().set_timesteps(len(timesteps), device)
        alphas_cumprod = self.alphas_cumprod[timesteps]
        sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
        self.sigmas = torch.cat([sigmas, torch.zeros(1)]).to("cpu", torch.float32)
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32, device=device)
