"""Noise schedule of tiny, and the distribution of noise levels in its training.

Stable Diffusion's betas with zero terminal SNR (Lin et al. 2023, arXiv:2305.08891), predicting
v = alpha_t eps - sigma_t x0 (Salimans and Ho 2022, arXiv:2202.00512). Most timesteps are drawn from a
Laplace distribution of log-SNR (Hang et al. 2024, arXiv:2407.03297), which concentrates them
where the content of an image is decided; some are uniform, so that no level is left out. Both are stratified.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STEPS = 1000


def scheduler() -> Any:
    """The DDIM scheduler of the exported model."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=STEPS,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        steps_offset=1,
    )


class Levels:
    """Draws timesteps and mixes noise, for the schedule `alphas_cumprod` (STEPS,)."""

    def __init__(self, alphas_cumprod: Tensor, *, uniform: float, centre: float, spread: float) -> None:
        self.uniform, self.centre, self.spread = uniform, centre, spread
        self.alphas_cumprod = alphas_cumprod  # alpha_t ** 2
        self.log_snr = (self.alphas_cumprod.clamp(min=1e-8) / (1 - self.alphas_cumprod)).log()  # falls with t

    def draw(self, n: int, g: torch.Generator) -> Tensor:
        """Timesteps (n,) int64 on the CPU: a share uniform, the rest by log-SNR, in random order."""
        even = round(n * self.uniform)
        flat = _strata(even, g) * STEPS
        p = _strata(n - even, g) - 0.5
        log_snr = self.centre - self.spread * p.sign() * torch.log1p(-2 * p.abs().clamp(max=0.49999))
        laplace = torch.searchsorted(-self.log_snr, -log_snr)
        both = torch.cat([flat.long(), laplace]).clamp(0, STEPS - 1)
        return both[torch.randperm(n, generator=g)]

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and the target v, both (B, C, h, w), for timesteps t (B,) on the same device."""
        alphas_cumprod = self.alphas_cumprod.to(x0.device)[t].view(-1, 1, 1, 1)
        alpha_t, sigma_t = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        return alpha_t * x0 + sigma_t * eps, alpha_t * eps - sigma_t * x0


def _strata(n: int, g: torch.Generator) -> Tensor:
    """Stratified random numbers (n,): one in each of n equal parts of [0, 1), rising."""
    return (torch.arange(n) + torch.rand(n, generator=g)) / max(n, 1)
