"""Noise schedule of distillation: conversion of predictions, one DDIM step, guidance, distances.

Functions take tensors only and are exact in float64. Timesteps index the base's own table; -1 stands for
the clean image (alpha 1, sigma 0). Zero-terminal SNR (alpha 0 at the last timestep) works with
v-prediction; with eps-prediction it is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minikin.errors import BadRecipe

TIMESTEP_SCALING, SIGMA_DATA = 10.0, 0.5  # LCM's boundary condition, as in diffusers


class Estimate(NamedTuple):
    """A network's estimate of the clean image and of the noise in x_t, (B, C, h, w) each."""

    x0: Tensor
    eps: Tensor


class Schedule:
    """A base's noise schedule: alpha_t and sigma_t = sqrt(1 - alpha_t^2), float64, and its prediction type.

    Raises BadRecipe for a prediction type that cannot be distilled.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: str) -> None:
        a = torch.cat([alphas_cumprod.double().cpu(), torch.ones(1, dtype=torch.float64)])  # [-1] is clean
        self.alpha, self.sigma = a.sqrt(), (1 - a).sqrt()
        self.prediction, self.n_train = prediction, len(alphas_cumprod)
        if prediction not in ("epsilon", "v_prediction"):
            raise BadRecipe(f"This base predicts '{prediction}'; epsilon and v_prediction can be distilled.")
        if prediction == "epsilon" and self.alpha[-2] < 1e-4:
            raise BadRecipe(
                "This base predicts noise, but its schedule ends in pure noise (zero-terminal SNR), where "
                "noise says nothing of the image. Use the scheduler configuration it was trained with."
            )

    @classmethod
    def of(cls, base: Any) -> Schedule:
        return cls(base.schedule.alphas_cumprod, base.prediction_type)

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t for timesteps (B,), shaped to multiply `like`."""
        t = t.cpu()
        shape = (-1,) + (1,) * (like.ndim - 1)
        return self.alpha[t].to(like).view(shape), self.sigma[t].to(like).view(shape)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t eps."""
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * eps

    def noised_from(self, x_s: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x_t for a t above s from x_s, and the standard deviation of the noise added.

        x_t = (alpha_t / alpha_s) x_s + d noise, d^2 = sigma_t^2 - (alpha_t sigma_s / alpha_s)^2
        """
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.at(s, x_s), self.at(t, x_s)
        ratio = alpha_t / alpha_s
        d = (sigma_t.square() - (ratio * sigma_s).square()).clamp(min=0).sqrt()
        return ratio * x_s + d * noise, d

    def estimate(self, out: Tensor, x_t: Tensor, t: Tensor) -> Estimate:
        """Image and noise from the U-Net's output: x0 = (x - sigma eps) / alpha = alpha x - sigma v."""
        alpha, sigma = self.at(t, x_t)
        if self.prediction == "epsilon":
            return Estimate((x_t - sigma * out) / alpha, out)
        return Estimate(alpha * x_t - sigma * out, alpha * out + sigma * x_t)

    def ddim(self, e: Estimate, t_prev: Tensor) -> Tensor:
        """A DDIM step to t_prev (Song et al. 2021, arXiv:2010.02502, Eq. 12 without noise)."""
        return self.noised(e.x0, e.eps, t_prev)

    def snr(self, t: Tensor, like: Tensor) -> Tensor:
        """alpha^2 / sigma^2, 0 at zero-terminal SNR."""
        alpha, sigma = self.at(t, like)
        return (alpha / sigma).square()


def guided(conditional: Estimate, unconditional: Estimate, scale: Tensor | float) -> Estimate:
    """Classifier-free guidance of both image and noise; scale = w + 1 in the papers' w."""
    if isinstance(scale, Tensor):
        scale = scale.to(conditional.x0).view(-1, *(1,) * (conditional.x0.ndim - 1))
    return Estimate(
        unconditional.x0 + scale * (conditional.x0 - unconditional.x0),
        unconditional.eps + scale * (conditional.eps - unconditional.eps),
    )


def boundary(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of the consistency function f = c_skip x + c_out x0, with f(x, 0) = x.

    Luo et al. 2023, arXiv:2310.04378, with diffusers' scaled timestep 10 t and sigma_data 0.5.
    """
    scaled = (TIMESTEP_SCALING * t.to(like)).view(-1, *(1,) * (like.ndim - 1))
    total = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / total.sqrt()


def consistent(e: Estimate, x_t: Tensor, t: Tensor) -> Tensor:
    """Consistency function f(x_t, t) = c_skip x_t + c_out x0 of a network's estimate."""
    c_skip, c_out = boundary(t, x_t)
    return c_skip * x_t + c_out * e.x0


def grid(n_train: int, skip: int) -> Tensor:
    """The solver's timesteps skip - 1, 2 skip - 1, ...: 19, 39, ..., 999 for 1000 and 20."""
    return torch.arange(1, n_train // skip + 1) * skip - 1


def lcm_times(n_train: int, skip: int, steps: int) -> list[int]:
    """The timesteps of LCMScheduler for a number of steps: 4 of 50 are 999, 759, 499, 259."""
    falling = grid(n_train, skip).flip(0)
    return [int(falling[i * len(falling) // steps]) for i in range(steps)]


def distance(a: Tensor, b: Tensor, kind: str, c: float) -> Tensor:
    """(B,): mean over each example of sqrt(d^2 + c^2) - c ("huber") or of d^2 ("l2")."""
    d = (a - b).flatten(1)
    errors = d.square() if kind == "l2" else (d.square() + c * c).sqrt() - c
    return errors.mean(1)


def guidance_embedding(w: Tensor, width: int = 256) -> Tensor:
    """(B, width): sinusoids of 1000 w, the U-Net's `timestep_cond`; w is the guidance scale minus 1.

    The same numbers as diffusers' pipelines compute.
    """
    half = width // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=w.dtype) * -step)
    angles = (1000.0 * w)[:, None] * frequencies.to(w)[None]
    return torch.cat([angles.sin(), angles.cos()], 1)
