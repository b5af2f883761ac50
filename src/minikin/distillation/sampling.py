"""Painting with a network of a distillation, without a pipeline: samples on the way, synthetic data.

Stock diffusers schedulers give the same images: `renoise` is LCMScheduler, `ddim` DDIMScheduler
with trailing timesteps; a test compares them.
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
    network: Network, x: Tensor, texts: Texts, times: Sequence[int], *, renoise: bool,
    noise: Callable[[], Tensor], scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Latents (B, C, h, w) from noise x of unit deviation, one call of the network per timestep.

    renoise  take the consistency function's value and add fresh noise (LCM, ADD); else DDIM (TDM)
    noise    draws fresh noise of x's shape
    scale    guidance, for a network with its embedding
    """
    w = torch.full((len(x),), scale - 1.0)
    for t, following in zip(times, [*times[1:], -1], strict=True):
        now = torch.full((len(x),), t)
        e = network(x, now, texts, w)
        then = torch.full((len(x),), following)
        if not renoise:
            x = network.schedule.ddim(e, then)
            continue
        x0 = consistent(e, x, now)
        x = x0 if following < 0 else network.schedule.noised(x0, noise(), then)
    return x


@torch.no_grad()
def many_steps(network: Network, x: Tensor, texts: Texts, empty: Texts, steps: int, scale: float) -> Tensor:
    """The teacher's image: DDIM with guidance on trailing timesteps."""
    n = network.schedule.n_train
    times = [round(n - i * n / steps) - 1 for i in range(steps)]
    for t, following in zip(times, [*times[1:], -1], strict=True):
        now, then = (torch.full((len(x),), v) for v in (t, following))
        e = network(x, now, texts)
        if scale != 1:
            e = guided(e, network(x, now, empty), scale)
        x = network.schedule.ddim(e, then)
    return x


@contextmanager
def wide_decoder(base: Base) -> Iterator[None]:
    """Inside, an autoencoder that overflows in float16 (SDXL's) computes in float32."""
    vae: Any = base.vae
    narrow = vae.dtype is torch.float16 and vae.config.force_upcast
    if narrow:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if narrow:
            vae.to(torch.float16)


def pixels(base: Base, latents: Tensor) -> Tensor:
    """Latents to images (B, 3, H, W), about [-1, 1]; gradients flow."""
    vae: Any = base.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    decoded: Tensor = vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype)).sample
    return decoded.float()


@torch.no_grad()
def pictures(base: Base, latents: Tensor) -> list[Image.Image]:
    made = [pixels(base, x[None].to(base.device))[0] for x in latents]
    rows = [((p.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy() for p in made]
    return [Image.fromarray(r) for r in rows]
