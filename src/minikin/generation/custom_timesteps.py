"""Euler ancestral at custom timesteps (the sampler of Stability's Turbo demo) and with other noise schedules.

diffusers' Euler ancestral takes a number of steps and a spacing, not a list; the demo's timesteps
999, 899, 799, 699 are no spacing it knows. Nor has it the schedules of diffusers' Euler (Karras and others),
which in A1111 and ComfyUI go with every sampler.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler


class EulerAncestralCustomTimesteps(EulerAncestralDiscreteScheduler):  # type: ignore[misc]
    """Euler ancestral whose `set_timesteps` also takes a list of timesteps, highest first.

    sigma_schedule  option of Euler's configuration for the noise levels (use_karras_sigmas); {} for none
    """

    sigma_schedule: Mapping[str, Any] = {}

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: list[int] | None = None,
    ) -> None:
        if timesteps is None:
            super().set_timesteps(num_inference_steps, device)
            if any(self.sigma_schedule.values()):
                euler = EulerDiscreteScheduler.from_config(self.config, **self.sigma_schedule)
                euler.set_timesteps(num_inference_steps, device)
                self.sigmas, self.timesteps = euler.sigmas, euler.timesteps
            return
        super().set_timesteps(len(timesteps), device)
        alphas_cumprod = self.alphas_cumprod[timesteps]
        sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
        self.sigmas = torch.cat([sigmas, torch.zeros(1)]).to("cpu", torch.float32)
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32, device=device)
