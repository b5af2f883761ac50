"""Sampling with the networks of a distillation, without a pipeline: preview images, synthetic data.

Stock diffusers schedulers give the same images: `renoise` is LCMScheduler, DDIM is DDIMScheduler with
trailing timesteps. A test compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minikin.distillation.solver import consistent, guided
from minikin.distillation.student import Network, Texts
from minikin.models.base import Base


@torch.no_grad()
def few_steps(
    network: Network,
    x: Tensor,
    texts: Texts,
    times: Sequence[int],
    *,
    renoise: bool,
    noise: Callable[[], Tensor],
    scale: float = 1.0,
) -> Tensor:
    """Latents (B, C, h, w) from noise x of unit deviation, one call of the network per timestep.

    renoise  True: consistency function, then fresh noise (LCM, ADD); False: DDIM (TDM)
    noise    draws fresh noise of x's shape
    scale    guidance scale, for a network with a guidance embedding
    """
    w = torch.full((len(x),), scale - 1.0)
    for t, next_time in zip(times, [*times[1:], -1], strict=True):
        t_now = torch.full((len(x),), t)
        e = network(x, t_now, texts, w)
        t_next = torch.full((len(x),), next_time)
        if not renoise:
            x = network.schedule.ddim(e, t_next)
            continue
        x0 = consistent(e, x, t_now)
        x = x0 if next_time < 0 else network.schedule.noised(x0, noise(), t_next)
    return x


@torch.no_grad()
def many_steps(network: Network, x: Tensor, texts: Texts, empty: Texts, steps: int, scale: float) -> Tensor:
    """Latents of the teacher: DDIM with classifier-free guidance on trailing timesteps."""
    n = network.schedule.n_train
    times = [round(n - i * n / steps) - 1 for i in range(steps)]
    for t, next_time in zip(times, [*times[1:], -1], strict=True):
        t_now, t_next = (torch.full((len(x),), v) for v in (t, next_time))
        e = network(x, t_now, texts)
        if scale != 1:
            e = guided(e, network(x, t_now, empty), scale)
        x = network.schedule.ddim(e, t_next)
    return x


@contextmanager
def float32_decoder(base: Base) -> Iterator[None]:
    """Context in which an autoencoder that overflows in float16 (SDXL's) computes in float32."""
    vae: Any = base.vae
    upcast = vae.dtype is torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(torch.float16)


def pixels(base: Base, latents: Tensor) -> Tensor:
    """Latents decoded to images (B, 3, H, W), about in [-1, 1]; differentiable."""
    vae: Any = base.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    decoded: Tensor = vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype)).sample
    return decoded.float()


@torch.no_grad()
def images(base: Base, latents: Tensor) -> list[Image.Image]:
    decoded = [pixels(base, x[None].to(base.device))[0] for x in latents]
    rows = [((p.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy() for p in decoded]
    return [Image.fromarray(r) for r in rows]
