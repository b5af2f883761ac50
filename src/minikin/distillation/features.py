"""Discriminator of adversarial distillation: frozen features of images and trainable heads on them.

    TeacherFeatures   outputs of the teacher's attention blocks for noised latents
                      (latent ADD: Sauer et al. 2024, arXiv:2403.12015)
    PixelFeatures     DINOv2's patch tokens of four depths for decoded pixels
                      (ADD: Sauer et al. 2023, arXiv:2311.17042; heads as in StyleGAN-T)

Both return a list of feature maps, (B, C, h, w) or (B, C, tokens); gradients reach the images only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from minikin.distillation.sampling import pixels
from minikin.distillation.student import Network, Texts
from minikin.errors import NoNetwork
from minikin.models.base import Base
from minikin.models.loading.lock import opening
from minikin.models.loading.registry import models_folder

DINOV2 = "facebook/dinov2-small"
PATCH = 14  # px
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels


class TeacherFeatures:
    """Features of noisy latents by the teacher. The heads' condition is the prompt and the noise level."""

    dims = 2

    def __init__(self, network: Network) -> None:
        self.network = network
        unet = network.unet
        levels = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]  # in the order they are called
        # transformers as a whole: their outputs are (B, C, h, w)
        self.blocks = [m for level in levels for m in getattr(level, "attentions", [])]
        self.channels = [int(m.proj_out.weight.shape[0]) for m in self.blocks]

    def level(self, t: Tensor) -> Tensor:
        """The noise level as a condition, (B, 2)."""
        share = (t / self.network.schedule.n_train)[:, None]
        return torch.cat([(math.pi * share).cos(), (math.pi * share).sin()], 1).float()

    def times(self, n: int, g: torch.Generator) -> Tensor:
        """Random timesteps (n,), logit-normal (1, 1): mostly high noise, where the layout is decided."""
        share = torch.sigmoid(1 + torch.randn(n, generator=g))
        return (share * self.network.schedule.n_train).long().clamp(max=self.network.schedule.n_train - 1)

    def __call__(self, latents: Tensor, t: Tensor, noise: Tensor, texts: Texts) -> list[Tensor]:
        with self.network.watching(self.blocks) as feature_maps:
            self.network(self.network.schedule.noised(latents, noise, t), t, texts)
        return [f.float() for f in feature_maps]


class PixelFeatures:
    """Features of decoded images by DINOv2. The heads' condition is the prompt and the real image."""

    dims = 1

    def __init__(self, base: Base, name: str, side: int) -> None:
        self.base = base
        self.model = _dinov2(name).to(base.device)
        depth, width = int(self.model.config.num_hidden_layers), int(self.model.config.hidden_size)
        self.depths = [0, *(max(1, round(depth * k / 4)) for k in (1, 2, 3, 4))]  # 0: the patch embedding
        self.channels = [width] * len(self.depths)
        self.width = width
        self.side = PATCH * max(4, min(37, round(max(side, 224) / PATCH)))

    def _states(self, image: Tensor) -> tuple[Tensor, ...]:
        """Hidden states of all layers for an image (B, 3, H, W) in [-1, 1]."""
        small = F.interpolate(image, (self.side, self.side), mode="bilinear", antialias=True)
        mean, deviation = (torch.tensor(v).to(small).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
        out = self.model(pixel_values=((small + 1) / 2 - mean) / deviation, output_hidden_states=True)
        states: tuple[Tensor, ...] = out.hidden_states
        return states

    def __call__(self, image: Tensor) -> list[Tensor]:
        states = self._states(image)
        return [states[d][:, 1:].transpose(1, 2) for d in self.depths]  # without the class token

    @torch.no_grad()
    def whole(self, image: Tensor) -> Tensor:
        """The class token (B, width): the whole image as one vector."""
        return self._states(image)[-1][:, 0]

    def decoded(self, latents: Tensor) -> Tensor:
        return pixels(self.base, latents)


@opening()
def _dinov2(name: str) -> Any:
    from transformers import AutoModel

    pulled = models_folder() / "dinov2-s14"
    ref = name if name != "dinov2" else str(pulled) if pulled.is_dir() else DINOV2
    try:
        model = AutoModel.from_pretrained(ref, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as e:
        raise NoNetwork(
            f"The features '{name}' ({ref}) are not on this machine, and training never downloads. Fetch "
            "them once with `minikin models pull dinov2-s14`, or give the folder of a DINOv2 model, or use "
            "--features teacher, which needs no other weights."
        ) from e
    return model.eval().requires_grad_(False)


NORM_GROUP = 8  # examples that share the statistics of a virtual batch norm


class VirtualBatchNorm(nn.Module):
    """Batch norm over groups of 8 examples, without running averages, as in StyleGAN-T."""

    def __init__(self, channels: int, group: int = NORM_GROUP) -> None:
        super().__init__()
        self.group = group
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        parts: list[Tensor] = [_normed(x[i : i + self.group]) for i in range(0, len(x), self.group)]
        shape = (1, -1, *(1,) * (x.ndim - 2))
        normed: Tensor = torch.cat(parts) * self.weight.view(shape) + self.bias.view(shape)
        return normed


def _normed(x: Tensor) -> Tensor:
    over = [0, *range(2, x.ndim)]
    variance = x.var(over, unbiased=False, keepdim=True)
    normed: Tensor = (x - x.mean(over, keepdim=True)) / (variance + 1e-5).sqrt()
    return normed


class Head(nn.Module):
    """Discriminator head: a score for every position of one feature map, conditioned by projection.

    As in StyleGAN-T: a 1x1 convolution, a residual convolution of width 9 (3x3 on 2D maps), spectral
    norm on both, and the dot product of 64 channels with a linear function of the condition, over 8.
    """

    def __init__(self, channels: int, condition: int, dims: int, inner: int = 64) -> None:
        super().__init__()
        conv: Any = nn.Conv1d if dims == 1 else nn.Conv2d
        width = 9 if dims == 1 else 3

        def block(size: int) -> nn.Sequential:
            layer = conv(channels, channels, size, padding=size // 2, padding_mode="circular")
            norm = VirtualBatchNorm(channels) if dims == 1 else nn.GroupNorm(8, channels)
            return nn.Sequential(spectral_norm(layer), norm, nn.LeakyReLU(0.2))

        self.first, self.second = block(1), block(width)
        self.score = spectral_norm(conv(channels, inner, 1))
        self.condition = nn.Linear(condition, inner)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.first(x)
        x = (x + self.second(x)) / math.sqrt(2)
        y: Tensor = self.score(x).flatten(2)  # (B, inner, positions)
        scores: Tensor = (y * self.condition(c)[:, :, None]).sum(1) / math.sqrt(y.shape[1])
        return scores


class Heads(nn.Module):
    """One head for each feature map; returns their mean scores (B, heads)."""

    def __init__(self, channels: list[int], condition: int, dims: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(c, condition, dims) for c in channels)

    def forward(self, features: list[Tensor], c: Tensor) -> Tensor:
        scores = [h(f, c).mean(1) for h, f in zip(self.heads, features, strict=True)]
        return torch.stack(scores, 1)


def augmented(images: Tensor, draws: Tensor) -> Tensor:
    """Differentiable augmentation: brightness, saturation, contrast, shift by an eighth, a cut-out half.

    images  (B, 3, H, W) in [-1, 1]
    draws   (B, 7) random numbers in [0, 1)

    Zhao et al. 2020, arXiv:2006.10738.
    """
    d = draws.to(images)[:, :, None, None, None]  # (B, 7, 1, 1, 1)
    x = images + (d[:, 0] - 0.5)
    x = x.mean(1, keepdim=True) + (x - x.mean(1, keepdim=True)) * 2 * d[:, 1]
    centre = x.mean((1, 2, 3), keepdim=True)
    x = centre + (x - centre) * (0.5 + d[:, 2])
    h, w = x.shape[-2:]
    rows, columns = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    out = []
    for image, draw in zip(x, draws, strict=True):
        down, right = (int((2 * float(v) - 1) * side / 8) for v, side in zip(draw[3:5], (h, w), strict=True))
        padded = F.pad(image, (abs(right),) * 2 + (abs(down),) * 2)
        moved = padded[:, abs(down) - down :, abs(right) - right :][:, :h, :w]
        top, left = float(draw[5]) * h, float(draw[6]) * w
        hole = ((rows - top).abs() < h / 4)[:, None] & ((columns - left).abs() < w / 4)[None]
        out.append(moved * ~hole)
    return torch.stack(out)
