"""Samplers of flow matching, with what the loop asks of every scheduler: `scale_model_input` and `add_noise`.

    FlowEuler   Euler steps along straight paths
    TrigFlow    SANA-Sprint's one to four steps (SANA-Sprint, arXiv:2503.09641; TrigFlow: Lu and Song 2024,
                arXiv:2410.11081); between two steps it draws fresh noise

diffusers' DPM-Solver and UniPC have both already. Where sampling starts below pure noise, `start_below` scales
the positions of all noise levels before their shift.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SCMScheduler
from torch import Tensor

from minikin.models.schedule import flow_shift, shifted

# the names of `schedulers.SCHEDULERS` whose classes end at the clean image for flow matching, too
SAMPLERS = ("Euler", "DPM++ 2M", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 2S", "UniPC")
MIDDLE = 1.3  # angle between the two steps of SANA-Sprint, diffusers' default


class FlowEuler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """diffusers' Euler for flow matching."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        noised: Tensor = self.scale_noise(original_samples, timesteps, noise)
        return noised


class TrigFlow(SCMScheduler):  # type: ignore[misc]
    """diffusers' SCM, whose timesteps are the noise levels s that SANA-Sprint's transformer reads.

    angles  (steps + 1,) of the circle from noise, pi / 2, to the image, 0; s = sin / (cos + sin)
    Latents have unit variance, diffusers' divided by `sigma_data`: for its 0.5 the same to the bit.
    """

    angles: Tensor

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        middle = MIDDLE if num_inference_steps == 2 else None
        super().set_timesteps(num_inference_steps, device=device, intermediate_timesteps=middle)
        self.set_angles(self.timesteps)

    def set_angles(self, angles: Tensor) -> None:
        self.angles, steps = angles, angles[:-1]
        self.timesteps = torch.sin(steps) / (torch.cos(steps) + torch.sin(steps))

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """On the straight path of flow matching, (1 - s) x0 + s eps, as the transformer reads latents."""
        return sample * _length(timestep)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        level = timesteps.view(-1, 1, 1, 1)
        return ((1 - level) * original_samples + level * noise) / _length(level)

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:  # fmt: skip
        """The next latents from the prediction eps - x0; in the last step, the image's."""
        s, data = timestep, self.config.sigma_data
        x = self.scale_model_input(sample, s)
        velocity = ((1 - 2 * s) * x + (1 - 2 * s + 2 * s**2) * model_output) / _length(s)
        levels, self.timesteps = self.timesteps, self.angles
        try:
            out = super().step(velocity * data, timestep, sample * data, generator, return_dict=False)
        finally:
            self.timesteps = levels
        return (out[0] / data,)


def _length(level: Tensor) -> Tensor:
    """The standard deviation of (1 - s) x0 + s eps."""
    return torch.sqrt(level**2 + (1 - level) ** 2)


_OURS = {"FlowMatchEulerDiscreteScheduler": FlowEuler, "SCMScheduler": TrigFlow}


def class_of(kind: type) -> Any:
    """Our class on top of a scheduler of diffusers, or that itself."""
    return _OURS.get(kind.__name__, kind)


def changes(config: Any) -> dict[str, Any]:
    """Configuration of any class's scheduler for the flow matching that a base's configuration describes."""
    shift = flow_shift(config)
    return {
        "use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift, "shift": shift,
    }  # fmt: skip


def start_below(scheduler: Any, share: float) -> None:
    """Let sampling start at this share of the schedule, in (0, 1): its steps then lie below it."""
    plain, shift = scheduler.set_timesteps, flow_shift(scheduler.config)

    @wraps(plain)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        plain(*args, **kwargs)
        if isinstance(scheduler, TrigFlow):
            scheduler.set_angles(share * scheduler.angles)
            return
        sigmas = scheduler.sigmas
        scheduler.sigmas = shifted(share * sigmas / (shift - (shift - 1) * sigmas), shift)
        levels = scheduler.sigmas[: len(scheduler.timesteps)]
        scheduler.timesteps = (scheduler.config.num_train_timesteps * levels).to(scheduler.timesteps)

    scheduler.set_timesteps = set_timesteps
