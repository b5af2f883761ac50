"""Normalisation of latents to mean 0 and about unit variance, by the autoencoder's two 1x1 convolutions.

The scaling factor is then 1. Channels are scaled by their deviation to the power 0.6, not 1: channels of
small variance carry little information, and with unit variance the diffusion model would spend its
capacity on them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

POWER = 0.6


def normalise(model: Any, images: Tensor, autocast: torch.autocast) -> tuple[Any, str]:
    """A copy of the autoencoder in float32 on the CPU, normalised on `images` (B, 3, H, W).

    Also returns the smallest and largest deviation of a channel afterwards, as text. Decoded images are
    unchanged.
    """
    from copy import deepcopy

    with torch.no_grad(), autocast:
        z = torch.cat([model.encode(x).latent_dist.mean.float() for x in torch.split(images, 32)]).cpu()
    mean, deviation = z.mean((0, 2, 3)), z.std((0, 2, 3)).clamp(min=1e-6)
    scale = deviation**POWER
    scale = scale * (deviation / scale).pow(2).mean().sqrt()  # unit variance over all channels together
    out = deepcopy(model).cpu().float()
    n = len(mean)
    with torch.no_grad():
        quant, post = out.quant_conv, out.post_quant_conv
        quant.weight[:n] /= scale[:, None, None, None]
        quant.bias[:n] = (quant.bias[:n] - mean) / scale
        quant.bias[n:] -= 2 * scale.log()
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= scale[None, :, None, None]
    out.register_to_config(scaling_factor=1.0)
    after = deviation / scale
    return out, f"{float(after.min()):.2f} to {float(after.max()):.2f}"
