"""Seed identifiability: the accuracy of a classifier that tells from an image which seed it was generated with.

In a diverse model a seed determines layout, whatever the prompt (GAD, arXiv:2606.01651, reports 93.7 % for SD 2
and 52.9 % for a one-step student of it). Twenty drafts are worth little if all seeds look alike. GAD trains a
network; with the hundreds of images of one evaluation only a ridge classifier on fixed features can be trained,
so numbers compare only for equal numbers of seeds and prompts and equal features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.evaluation.intervals import Estimate, bootstrap_mean

FOLDS = 5
RIDGE = 1e-2  # of the mean squared length of the centred features
THUMBNAIL = 16  # px


def identifiability(features: Tensor, seed: int = 0, folds: int = FOLDS) -> Estimate:
    """Share of images whose seed is predicted correctly; chance is 1 / seeds.

    features  (prompts, seeds, d): image (i, k) is prompt i with seed k. The mean of each prompt's images is
              subtracted first; an encoder's vectors or `thumbnails` will do.
    Cross-validated over prompts; the interval is over prompts. Raises BadRecipe for fewer than two prompts or
    seeds.
    """
    if features.ndim != 3 or min(features.shape[:2]) < 2:
        raise BadRecipe(
            f"Seed identifiability needs features (prompts, seeds, d) of at least two prompts and two seeds, "
            f"got {tuple(features.shape)}."
        )
    x = features.double() - features.double().mean(1, keepdim=True)
    n, k, _ = x.shape
    fold = np.random.default_rng(seed).permutation(n) % min(folds, n)
    right = np.zeros((n, k))
    for f in np.unique(fold):
        test = torch.from_numpy(fold == f)
        scores = _ridge(x[~test].flatten(0, 1), int((~test).sum()), k, x[test].flatten(0, 1))
        right[fold == f] = (scores.argmax(1).view(-1, k) == torch.arange(k)).numpy()
    return bootstrap_mean(right.flatten(), seed, np.repeat(np.arange(n), k))


def thumbnails(images: Sequence[Image.Image]) -> Tensor:
    """Images (n, 3 * 16 * 16) in [-1, 1] of 16 px: their layout without detail."""
    small = [image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX) for image in images]
    return torch.tensor(np.stack([np.asarray(s) for s in small]).reshape(len(small), -1) / 127.5 - 1).float()


def _ridge(x: Tensor, prompts: int, seeds: int, test: Tensor) -> Tensor:
    """Scores (m, seeds) of test features (m, d) by ridge regression on one-hot seeds, in its dual form."""
    targets = torch.eye(seeds, dtype=x.dtype).repeat(prompts, 1) - 1 / seeds
    gram = x @ x.T
    load = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
    weights = torch.linalg.solve(gram + load * torch.eye(len(x), dtype=x.dtype), targets)
    scores: Tensor = test @ x.T @ weights
    return scores
