"""95 % confidence intervals of shares, means and resampled statistics.

Images of one prompt are not independent, so where images come in groups, whole groups are resampled (cluster
bootstrap; Davison and Hinkley 1997, section 3.8). Resampling is seeded: equal numbers give equal intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minikin.errors import BadRecipe

Z = 1.959964  # 97.5 % point of the normal distribution
RESAMPLES = 2000
LEVELS = (2.5, 97.5)  # percentiles of a 95 % interval

Groups = Sequence[object] | np.ndarray  # group of each image, for example its prompt (n,)


@dataclass(frozen=True)
class Estimate:
    """A value, its 95 % interval, and the number of examples."""

    value: float
    low: float
    high: float
    n: int

    def percent(self) -> str:
        return f"{100 * self.value:5.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] of {self.n}"

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson_share(right: int, n: int) -> Estimate:
    """Share right / n with Wilson's score interval (Wilson 1927); for n = 0, nan with [0, 1]."""
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    p = right / n
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Estimate(p, max(0.0, middle - half), min(1.0, middle + half), n)


def bootstrap_mean(values: np.ndarray, seed: int = 0, groups: Groups | None = None) -> Estimate:
    """Mean of values (n,) with its percentile bootstrap interval, over groups where they are given.

    Raises BadRecipe when there are no values.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        raise BadRecipe("There is nothing to take a mean of: no images were given.")
    counts = bootstrap_counts(len(values), RESAMPLES, np.random.default_rng(seed), groups)
    return percentile_interval(float(values.mean()), counts @ values / counts.sum(1), len(values))


def bootstrap_ratio(
    values: np.ndarray, reference: np.ndarray, seed: int = 0, groups: Groups | None = None
) -> Estimate:
    """Mean of `values` over mean of `reference`, both (n,), of the same examples and resampled together.

    This is much narrower than two separate intervals, since what is hard in an example is hard in both.
    Raises BadRecipe when they are not as many or there are none.
    """
    a, b = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    if not len(a) == len(b) > 0:
        raise BadRecipe(f"A ratio needs the same examples twice, got {len(a)} and {len(b)}.")
    counts = bootstrap_counts(len(a), RESAMPLES, np.random.default_rng(seed), groups)
    return percentile_interval(float(a.mean() / b.mean()), (counts @ a) / (counts @ b), len(a))


def bootstrap_counts(
    n: int, resamples: int, rng: np.random.Generator, groups: Groups | None = None
) -> np.ndarray:
    """How often each of n examples is in each resample (resamples, n) float64.

    Without groups, n examples are drawn with replacement; with them, as many groups as there are.
    Raises BadRecipe when `groups` has another length than n.
    """
    if groups is None:
        return _counts(n, resamples, rng)
    if len(groups) != n:
        raise BadRecipe(f"{n} images but {len(groups)} prompts for them: give one for each.")
    names = list(dict.fromkeys(groups))
    place = {name: k for k, name in enumerate(names)}
    return _counts(len(names), resamples, rng)[:, [place[g] for g in groups]]


def percentile_interval(value: float, resampled: np.ndarray, n: int) -> Estimate:
    """A value with the percentile interval of its resamples."""
    low, high = np.percentile(resampled, LEVELS)
    return Estimate(value, float(low), float(high), n)


def _counts(n: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """n draws with replacement, counted (resamples, n)."""
    draws = rng.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(draws.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)
