"""Samplers of k-diffusion that diffusers has in parts: DPM++ 2S a, and DPM++ SDE with a seed for each image.

DPM2 and DPM2 a are diffusers' own, constructed in less time.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from diffusers import KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class _OneTimestepAtFirst:
    """Diffusers' constructor of DPM2 computes the midpoints of all timesteps of training one by one: 0.25 s,
    for numbers that the first `set_timesteps` of an image replaces. It alone names `num_train_timesteps`."""

    def set_timesteps(
        self, num_inference_steps: int, device: Any = None, num_train_timesteps: int | None = None
    ) -> None:
        steps = 1 if num_train_timesteps else num_inference_steps
        super().set_timesteps(steps, device, num_train_timesteps)  # type: ignore[misc]


class DPM2(_OneTimestepAtFirst, KDPM2DiscreteScheduler):  # type: ignore[misc]
    """DPM2: k-diffusion's `sample_dpm_2`."""


class DPM2Ancestral(_OneTimestepAtFirst, KDPM2AncestralDiscreteScheduler):  # type: ignore[misc]
    """DPM2 with ancestral noise: k-diffusion's `sample_dpm_2_ancestral`."""


class DPMPP2SAncestral(DPM2Ancestral):
    """DPM-Solver++(2S) with ancestral noise: k-diffusion's `sample_dpmpp_2s_ancestral`.

    Noise levels, midpoints and the first half of a step are those of diffusers' ancestral DPM2. In the second
    half x0, predicted at the midpoint, replaces the derivative there (Lu et al. 2022, arXiv:2211.01095).
    """

    sample: Any

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        if self.step_index is None or self.state_in_first_order:
            return super().step(model_output, timestep, sample, generator=generator, return_dict=return_dict)
        k = self.step_index - 1
        sigma, middle = self.sigmas[k], self.sigmas_interpol[k]
        if self.config.prediction_type == "epsilon":
            x0 = sample - middle * model_output
        else:  # v_prediction; ancestral DPM2 knows no third
            x0 = sample / (middle**2 + 1) - model_output * middle / (middle**2 + 1) ** 0.5
        share = self.sigmas_down[k] / sigma
        noise = randn_tensor(
            model_output.shape, dtype=model_output.dtype, device=model_output.device, generator=generator
        )
        stepped = share * self.sample + (1 - share) * x0 + noise * self.sigmas_up[k]
        self.sample = None
        self._step_index += 1
        if not return_dict:
            return stepped, x0
        from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import (
            KDPM2AncestralDiscreteSchedulerOutput,
        )

        return KDPM2AncestralDiscreteSchedulerOutput(prev_sample=stepped, pred_original_sample=x0)


@cache
def dpmpp_sde() -> Any:
    """DPM++ SDE, whose noise depends on each image's own seed; diffusers' needs the package torchsde."""
    from diffusers import DPMSolverSDEScheduler
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    class DPMPPSDE(DPMSolverSDEScheduler):  # type: ignore[misc]
        """diffusers' DPMSolverSDEScheduler with a generator for each image of the batch.

        Stock draws one seed for the whole batch from PyTorch's global state, so no image could be repeated.
        """

        noise_sampler: Any

        def step(
            self,
            model_output: Tensor,
            timestep: Any,
            sample: Tensor,
            generator: Any = None,
            return_dict: bool = True,
        ) -> Any:
            if self.noise_sampler is None and generator is not None:
                generators = generator if isinstance(generator, list) else [generator] * len(sample)
                seeds = [g.initial_seed() for g in generators]
                levels = self.sigmas[self.sigmas > 0]
                # a little wider than the noise levels, which rounding may put outside
                low, high = 0.999 * float(levels.min()), 1.001 * float(levels.max())
                self.noise_sampler = BrownianTreeNoiseSampler(sample, low, high, seeds)
            return super().step(model_output, timestep, sample, return_dict=return_dict)

    return DPMPPSDE
