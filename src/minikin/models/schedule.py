"""The noise schedule of a base: how much noise a timestep has, and what the denoiser predicts there.

    NoiseSchedule   denoising diffusion: Stable Diffusion, PixArt
    FlowMatching    straight paths from images to noise: SANA; SANA-Sprint, which was trained as TrigFlow and
                    whose transformer reads and predicts the same

Training, masks from attention, the diffusion classifier and distillation read it; sampling has diffusers'
schedulers, which are built from the same configuration (`generation.schedulers`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minikin.errors import BadRecipe

if TYPE_CHECKING:  # the server's gateway asks here what a base is, without PyTorch
    from torch import Tensor


class NoiseSchedule:
    """Denoising diffusion (Ho et al. 2020, arXiv:2006.11239): x_t = alpha_t x0 + sigma_t eps.

    n_train          number of timesteps
    prediction_type  epsilon or v_prediction, as diffusers names them
    alphas_cumprod   (n_train,) alpha_t squared
    """

    is_flow = False

    def __init__(self, config: Any) -> None:
        from diffusers import DDPMScheduler

        # the pipeline's scheduler does not serve: Euler's add_noise leaves out alpha, others have no velocity
        self._ddpm = DDPMScheduler.from_config(config)
        self.n_train = int(self._ddpm.config.num_train_timesteps)
        self.prediction_type = str(self._ddpm.config.prediction_type)
        self.alphas_cumprod: Tensor = self._ddpm.alphas_cumprod

    def timesteps(self, positions: Tensor) -> Tensor:
        """The denoiser's timesteps at positions 0 to n_train - 1 of the schedule, both (B,): the same."""
        return positions

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


class FlowMatching(NoiseSchedule):
    """Flow matching (Lipman et al. 2022, arXiv:2210.02747): x_t = (1 - s) x0 + s eps, predicted is eps - x0.

    shift  moves the noise levels s of evenly spaced positions u up: s = shift u / (1 + (shift - 1) u)
           (Esser et al. 2024, arXiv:2403.03206, equation 23)
    scale  timesteps are scale * s: 1000, or 1 for SANA-Sprint
    """

    is_flow = True

    def __init__(self, config: Any) -> None:
        self.n_train = int(config.get("num_train_timesteps", 1000))
        self.prediction_type = "flow_prediction"
        self.shift = flow_shift(config)
        self.scale = 1 if config.get("prediction_type") == "trigflow" else self.n_train

    def timesteps(self, positions: Tensor) -> Tensor:
        """The denoiser's timesteps at positions 0 to n_train - 1 of the schedule, both (B,), float32."""
        return self.scale * shifted(positions.float() / self.n_train, self.shift)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        level = (t.to(x0) / self.scale).view(-1, 1, 1, 1)
        return (1 - level) * x0 + level * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps - x0


def shifted(level: Tensor, shift: float) -> Tensor:
    """Noise levels in [0, 1], moved towards noise."""
    return shift * level / (1 + (shift - 1) * level)


def flow_shift(config: Any) -> float:
    """The shift of a flow-matching scheduler's configuration, 1 by default."""
    return float(config.get("flow_shift") or config.get("shift") or 1.0)


def is_flow(config: Any) -> bool:
    """True for the configuration of a scheduler of flow matching or TrigFlow.

    FlowMatchEulerDiscreteScheduler has no prediction type, and alone has `shift`.
    """
    return config.get("prediction_type") in ("flow_prediction", "trigflow") or "shift" in config


def noise_schedule(config: Any) -> NoiseSchedule:
    """The noise schedule that the configuration of a pipeline's scheduler describes."""
    return FlowMatching(config) if is_flow(config) else NoiseSchedule(config)
