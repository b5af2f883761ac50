"""Text alignment by the base itself: which of several prompts explains an image best.

A diffusion classifier (Li et al. 2023, arXiv:2303.16203): the prompt under which the base predicts
the noise of the noised image with the least error. The same noise and timesteps are used for
every prompt. It judges a base by its own understanding; prompts name the category, never the
concept, so that the concept cannot please itself.
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
def errors(base: Base, picture: Image.Image, prompts: Sequence[str], seed: int = 0) -> np.ndarray:
    """Mean prediction error of one image under each prompt (len(prompts),)."""
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1)[None]
    x0 = base.to_latents(pixels.float() / 127.5 - 1).float()
    n_train = int(base.noise.config.num_train_timesteps)
    t = torch.linspace(0.2 * n_train, 0.9 * n_train, LEVELS).long().to(x0.device)
    eps = torch.randn((LEVELS, *x0.shape[1:]), generator=torch.Generator().manual_seed(seed)).to(x0)
    x0 = x0.expand(LEVELS, -1, -1, -1)
    x_t = base.noise.add_noise(x0, eps, t).to(base.dtype)
    v_target = base.prediction == "v_prediction"
    target = base.noise.get_velocity(x0, eps, t) if v_target else eps
    out = []
    for text in prompts:
        (made,) = condition(base, [parse(text, {})], {}, copies=LEVELS)
        more = base.conditions(LEVELS, made.pooled)
        predicted = base.unet(x_t, t, made.kv.to(base.dtype), **more).sample.float()
        out.append(float((predicted - target).square().mean()))
    return np.array(out)


def picks_own(base: Base, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> float:
    """Share of images whose own prompt (same index) explains them best among all prompts."""
    hits = [int(np.argmin(errors(base, p, prompts)) == i) for i, p in enumerate(pictures)]
    return float(np.mean(hits))
