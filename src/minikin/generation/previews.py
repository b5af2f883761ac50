"""Previews of an image while it is sampled: latents to colours by a linear map instead of the decoder.

The colours of a decoded image are nearly a linear function of its latents. The map is fitted by least squares
to images that this base has generated, so no table of factors for each model is needed. Noise is scaled down
to the standard deviation of final latents.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

WINDOW = 64  # images; older ones fade out


class LatentPreview:
    """A linear map from latents (C, h, w) to RGB, fitted as images are generated."""

    def __init__(self) -> None:
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None
        self._map: Tensor | None = None
        self._spread = 1.0

    def fit(self, latents: Tensor, image: Image.Image) -> None:
        """Fit again, with this image and its final latents."""
        x = _flat(latents)
        h, w = latents.shape[-2:]
        small = image.convert("RGB").resize((w, h), Image.Resampling.BOX)
        y = torch.from_numpy(np.asarray(small, np.float32) / 255).reshape(-1, 3).double()
        fade = 1 - 1 / WINDOW
        gram, cross = x.T @ x, x.T @ y
        self._gram = gram if self._gram is None else fade * self._gram + gram
        self._cross = cross if self._cross is None else fade * self._cross + cross
        ridge = 1e-3 * self._gram.diagonal().mean() * torch.eye(len(self._gram), dtype=torch.float64)
        self._map = torch.linalg.solve(self._gram + ridge, self._cross)
        self._spread = float(latents.float().std()) or 1.0

    def image(self, latents: Tensor, size: tuple[int, int]) -> Image.Image | None:
        """The preview of latents (C, h, w) at (width, height) pixels; None before the first fit."""
        if self._map is None:
            return None
        now = latents.float().cpu()
        now = now * min(1.0, self._spread / (float(now.std()) or 1.0))
        h, w = now.shape[-2:]
        rgb = (_flat(now) @ self._map).float().clamp(0, 1).reshape(1, h, w, 3).permute(0, 3, 1, 2)
        rgb = F.interpolate(rgb, (size[1], size[0]), mode="bilinear")
        return Image.fromarray((rgb[0].permute(1, 2, 0) * 255).round().byte().numpy())


def _flat(latents: Tensor) -> Tensor:
    """(places, C + 1), with a column of ones."""
    x = latents.detach().cpu().double().flatten(1).T
    return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
