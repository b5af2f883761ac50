"""How far one set of images is from another, as distributions of their features.

    frechet   Frechet distance of two Gaussians fitted to the features (Heusel et al. 2017, arXiv:1706.08500)
    kernel    squared maximum mean discrepancy, cubic kernel, unbiased (Binkowski et al. 2018, arXiv:1801.01401)

Published FID and KID use raw Inception features; ours are a judge's unit vectors, so the numbers
compare among themselves only, and for `frechet` only at equal numbers of images: it is biased upward when
they are few, `kernel` is not. The two sets must be drawn independently: an image and what became of
it are no pair for these.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.evaluation.intervals import LEVELS, Groups, Measured, around, draws

FRECHET_RESAMPLES = 100  # each costs two QR decompositions
KERNEL_RESAMPLES = 1000


def frechet(a: Tensor, b: Tensor, seed: int = 0, resamples: int = FRECHET_RESAMPLES) -> Measured:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features (n, d) and (m, d), float64.

    The interval says how the value moves with other images in equal numbers. Resampling repeats
    images, which alone raises the distance; this mean shift is taken off the resampled values.
    Raises BadRecipe for fewer than two images on a side.
    """
    x, y = _checked(a, b)
    value = _frechet(x, y)
    rng = np.random.default_rng(seed)
    again = np.array([_frechet(*(_drawn(v, rng) for v in (x, y))) for _ in range(resamples)])
    low, high = np.percentile(again - again.mean() + value, LEVELS)
    return Measured(value, max(0.0, float(min(low, value))), float(max(high, value)), len(x))


def kernel(
    a: Tensor, b: Tensor, gamma: float = 1.0, seed: int = 0,
    groups: tuple[Groups | None, Groups | None] = (None, None),
) -> Measured:  # fmt: skip
    """Unbiased squared MMD of features (n, d) and (m, d) under k(x, y) = (gamma x.y + 1)^3; may be below 0.

    gamma   1 for unit vectors; 1/d, as published, for raw features of size sqrt(d)
    groups  the prompts of either side: resampling draws prompts instead of images
    In a resample an image is never paired with its own copy, which would bias it.
    """
    x, y = _checked(a, b)
    k_xx, k_yy, k_xy = ((gamma * (u @ v.T) + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
    once = (np.ones((1, len(x))), np.ones((1, len(y))))
    rng = np.random.default_rng(seed)
    again = tuple(draws(len(v), KERNEL_RESAMPLES, rng, g) for v, g in zip((x, y), groups, strict=True))

    def mmd(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        u, v = torch.from_numpy(p), torch.from_numpy(q)
        across = ((u @ k_xy) * v).sum(1) / (u.sum(1) * v.sum(1))
        return np.asarray((_within(k_xx, u) + _within(k_yy, v) - 2 * across).numpy())

    resampled = mmd(*again)
    return around(float(mmd(*once)[0]), resampled[np.isfinite(resampled)], len(x))


def _within(k: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of k over pairs of different rows, for weights (times, n)."""
    squares = weights.square()
    total = ((weights @ k) * weights).sum(1) - squares @ torch.diagonal(k)
    return total / (weights.sum(1).square() - squares.sum(1))


def _frechet(x: Tensor, y: Tensor) -> float:
    """With x - mean = Q R and S = R^T R / (n - 1): tr (S_a S_b)^(1/2) is the sum of the singular values
    of R_a R_b^T over sqrt((n - 1)(m - 1)). No covariance is squared or rooted, so nothing can turn
    negative or complex, and fewer images than dimensions are no special case.
    """
    spread, roots = 0.0, []
    for v in (x, y):
        centred = (v - v.mean(0)) / (len(v) - 1) ** 0.5
        spread += float(centred.square().sum())
        roots.append(torch.linalg.qr(centred, mode="r").R)
    shared = float(torch.linalg.svdvals(roots[0] @ roots[1].T).sum())
    apart = float((x.mean(0) - y.mean(0)).square().sum())
    return max(apart + spread - 2 * shared, 0.0)


def _drawn(v: Tensor, rng: np.random.Generator) -> Tensor:
    return v[torch.from_numpy(rng.integers(len(v), size=len(v)))]


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:] or a.ndim != 2:
        raise BadRecipe(
            f"A feature distance needs two sets (n, d) of at least two images by one judge; got "
            f"{tuple(a.shape)} and {tuple(b.shape)}."
        )
    return a.double().cpu(), b.double().cpu()
