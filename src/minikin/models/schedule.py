"""The noise schedule of a base: how much noise a timestep has, and what the denoiser predicts there.

Training, masks from attention, the diffusion classifier and distillation read it; sampling has diffusers'
schedulers, which are built from the same configuration (`generation.schedulers`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from minikin.errors import BadRecipe


class NoiseSchedule:
    """Denoising diffusion (Ho et al. 2020, arXiv:2006.11239): x_t = alpha_t x0 + sigma_t eps.

    n_train          number of timesteps
    prediction_type  epsilon or v_prediction, as diffusers names them
    alphas_cumprod   (n_train,) alpha_t squared
    """

    def __init__(self, config: Any) -> None:
        from diffusers import DDPMScheduler

        # the pipeline's scheduler does not serve: Euler's add_noise leaves out alpha, others have no velocity
        self._ddpm = DDPMScheduler.from_config(config)
        self.n_train = int(self._ddpm.config.num_train_timesteps)
        self.prediction_type = str(self._ddpm.config.prediction_type)
        self.alphas_cumprod: Tensor = self._ddpm.alphas_cumprod

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Latents (B, C, h, w) with the noise eps at timesteps t (B,)."""
        x_t: Tensor = self._ddpm.add_noise(x0, eps, t)
        return x_t

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The exact prediction for `noised`; raises BadRecipe for a prediction type that is not supported."""
        if self.prediction_type == "epsilon":
            return eps
        if self.prediction_type == "v_prediction":
            velocity: Tensor = self._ddpm.get_velocity(x0, eps, t)
            return velocity
        raise BadRecipe(f"This base predicts '{self.prediction_type}', which is not supported.")
