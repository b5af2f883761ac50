"""Prompt classification by the base itself: which of several prompts explains an image best.

A diffusion classifier (Li et al. 2023, arXiv:2303.16203) picks the prompt under which the base predicts the
noise of the noised image with the least error. Every prompt gets the same noise and timesteps. Prompts name the
category and never the concept, so that a concept cannot raise its own score.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from minikin.models.base import Base
from minikin.models.prompt import parse
from minikin.perfusion.conditioning import condition

LEVELS = 8  # timesteps, evenly between 20 % and 90 % of the range


@torch.no_grad()
def prediction_errors(base: Base, image: Image.Image, prompts: Sequence[str], seed: int = 0) -> np.ndarray:
    """Mean squared noise prediction error of one image under each prompt (len(prompts),)."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None]
    x0 = base.to_latents(pixels.float() / 127.5 - 1).float()
    n_train = base.schedule.n_train
    positions = torch.linspace(0.2 * n_train, 0.9 * n_train, LEVELS).long()
    t = base.schedule.timesteps(positions).to(x0.device)
    eps = torch.randn((LEVELS, *x0.shape[1:]), generator=torch.Generator().manual_seed(seed)).to(x0)
    x0 = x0.expand(LEVELS, -1, -1, -1)
    x_t = base.schedule.noised(x0, eps, t).to(base.dtype)
    target = base.schedule.target(x0, eps, t)
    errors = []
    for text in prompts:
        (conditioning,) = condition(base, [parse(text, {})], {}, copies=LEVELS)
        kv, pooled, mask = conditioning.kv.to(base.dtype), conditioning.pooled, conditioning.mask
        predicted = base.predict(x_t, t, kv, pooled=pooled, mask=mask).float()
        errors.append(float((predicted - target).square().mean()))
    return np.array(errors)


def accuracy(base: Base, images: Sequence[Image.Image], prompts: Sequence[str]) -> float:
    """Share of images (n) whose own prompt, that of the same index, has the least error of all prompts (n)."""
    hits = [int(np.argmin(prediction_errors(base, image, prompts)) == i) for i, image in enumerate(images)]
    return float(np.mean(hits))
