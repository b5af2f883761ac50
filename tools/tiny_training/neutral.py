"""AutoencoderKL whose norms hardly normalise.

Every GroupNorm of diffusers' AutoencoderKL takes mean and deviation over the whole image. In a small network
this mixes distant pixels: the colours of a background change how a thing is encoded, and a network that is
trained on crops meets other statistics in whole images. AutoencoderKL has no other norm, but a GroupNorm of
one group can be made nearly the identity. `neutralise` sets channel 0 of every feature map to a large constant,
which makes up nearly all of the deviation, so the norm divides by nearly a fixed number; gain and bias undo
that. `freeze_constant` masks the gradients, so that training keeps the constant. The file is an ordinary
AutoencoderKL.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

LEVEL = 4.0  # deviation of a feature map with the constant; that of the activations is about 1


def neutralise(model: Any) -> None:
    """Set the weights of an untrained AutoencoderKL with norms of one group so that these hardly normalise."""
    from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D

    with torch.no_grad():
        for part in (model.encoder, model.decoder):
            _set_constant(part.conv_in)
            _set_identity(part.conv_norm_out)
            for m in part.modules():
                if isinstance(m, ResnetBlock2D):
                    _set_identity(m.norm1)
                    _set_identity(m.norm2)
                    _set_constant(m.conv1)
                    m.conv2.weight *= 0.5
                    m.conv2.weight[0], m.conv2.bias[0] = 0, 0  # the residual branch leaves the constant
                    if (c := m.conv_shortcut) is not None:
                        c.weight[:, 0], c.weight[0], c.bias[0] = 0, 0, 0
                        c.weight[0, 0] = math.sqrt(c.out_channels / c.in_channels)
                elif isinstance(m, (Downsample2D, Upsample2D)):
                    m.conv.weight[:, 0] = 0
                    _set_constant(m.conv)


def is_neutral(model: Any) -> bool:
    """True for a model that `neutralise` was applied to, also after training."""
    return not bool(model.encoder.conv_in.weight[0].any())


def freeze_constant(model: Any) -> None:
    """Mask the gradients of a neutral model, so that training keeps the constant."""
    from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D

    for part in (model.encoder, model.decoder):
        _mask_gradients(part.conv_in)
        _mask_gradients(part.conv_norm_out)
        for m in part.modules():
            if isinstance(m, ResnetBlock2D):
                for layer in (m.norm1, m.norm2, m.conv1, m.conv2):
                    _mask_gradients(layer)
                if m.conv_shortcut is not None:
                    _mask_gradients(m.conv_shortcut, columns=True)
            elif isinstance(m, (Downsample2D, Upsample2D)):
                _mask_gradients(m.conv, columns=True)


def _set_constant(conv: nn.Conv2d) -> None:
    """Make output channel 0 the constant."""
    assert conv.bias is not None
    conv.weight[0] = 0
    conv.bias[0] = LEVEL * math.sqrt(conv.out_channels)


def _set_identity(norm: nn.GroupNorm) -> None:
    """Gain and bias that undo the norm; channel 0 becomes 0."""
    n = norm.num_channels
    constant = LEVEL * math.sqrt(n)
    norm.weight.fill_(math.sqrt(LEVEL**2 * (1 - 1 / n) + 1))
    norm.bias.fill_(constant / n)
    norm.weight[0], norm.bias[0] = 0, 0


def _mask_gradients(layer: nn.Module, *, columns: bool = False) -> None:
    """No gradient for output channel 0 nor, with `columns`, for input channel 0."""
    for p in layer.parameters():
        mask = torch.ones_like(p)
        mask[0] = 0
        if columns and p.ndim > 1:
            mask[:, 0] = 0
        p.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient.device))  # type: ignore[no-untyped-call]
