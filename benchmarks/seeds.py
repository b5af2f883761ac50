"""Seed identifiability: can a classifier tell from an image which seed it was painted with?

In a diverse model a seed leaves its mark on layout, whatever the prompt (GAD, arXiv:2606.01651, reports
93.7 % for SD 2 and 52.9 % for a one-step student of it). Twenty drafts are worth little if all
seeds look alike. GAD trains a network; with the hundreds of images that one evaluation paints, a ridge
classifier on fixed features is what can be trained, so only numbers of the same number of seeds, prompts and
features compare.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.evaluation.intervals import Measured, mean

FOLDS = 5
RIDGE = 1e-2  # of the mean squared length of the centred features
THUMBNAIL = 16  # px


def identifiability(features: Tensor, seed: int = 0, folds: int = FOLDS) -> Measured:
    """Share of images whose seed is named rightly; chance is 1 / seeds.

    features  (prompts, seeds, d): image (i, k) is prompt i with seed k. What a prompt's images have
              in common is taken off first; judges' vectors or `thumbnails` will do.
    Prompts that are judged were not among those trained on. The interval is over prompts.
    Raises BadRecipe for fewer than two prompts or seeds.
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
        own = torch.from_numpy(fold == f)
        scores = _ridge(x[~own].flatten(0, 1), int((~own).sum()), k, x[own].flatten(0, 1))
        named = scores.argmax(1).view(-1, k)
        right[fold == f] = (named == torch.arange(k)).numpy()
    return mean(right.flatten(), seed, np.repeat(np.arange(n), k))


def thumbnails(pictures: Sequence[Image.Image]) -> Tensor:
    """Images as tiny ones (n, 3 * 16 * 16) in [-1, 1]: their layout, without what they show."""
    small = [p.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX) for p in pictures]
    return torch.tensor(np.stack([np.asarray(s) for s in small]).reshape(len(small), -1) / 127.5 - 1).float()


def _ridge(x: Tensor, prompts: int, seeds: int, unseen: Tensor) -> Tensor:
    """Scores (m, seeds) of unseen features (m, d) by ridge regression on one-hot seeds, in its dual form."""
    wanted = torch.eye(seeds, dtype=x.dtype).repeat(prompts, 1) - 1 / seeds
    gram = x @ x.T
    load = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
    weights = torch.linalg.solve(gram + load * torch.eye(len(x), dtype=x.dtype), wanted)
    scores: Tensor = unseen @ x.T @ weights
    return scores
