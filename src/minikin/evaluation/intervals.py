"""How sure a measured number is: 95 % intervals of shares, of means, and of anything that is resampled.

Images of one prompt are not independent of each other, so where images come in groups, whole
groups are drawn again (the cluster bootstrap; Davison and Hinkley 1997, section 3.8). Every draw is
seeded: the same numbers give the same interval.
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

Groups = Sequence[object] | np.ndarray  # what each image belongs to (its prompt, say), (n,)


@dataclass(frozen=True)
class Measured:
    """A value with its 95 % interval and how many examples it comes from."""

    value: float
    low: float
    high: float
    n: int

    def percent(self) -> str:
        return f"{100 * self.value:5.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] of {self.n}"

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def share(right: int, n: int) -> Measured:
    """Wilson's score interval (Wilson 1927); n = 0 gives nothing known: [0, 1] around nan."""
    if n == 0:
        return Measured(math.nan, 0.0, 1.0, 0)
    p = right / n
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Measured(p, max(0.0, middle - half), min(1.0, middle + half), n)


def mean(values: np.ndarray, seed: int = 0, groups: Groups | None = None) -> Measured:
    """Percentile bootstrap of the mean of values (n,), over groups of them where they come in groups.

    Raises BadRecipe when there are no values.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        raise BadRecipe("There is nothing to take a mean of: no images were given.")
    counts = draws(len(values), RESAMPLES, np.random.default_rng(seed), groups)
    return around(float(values.mean()), counts @ values / counts.sum(1), len(values))


def ratio(values: np.ndarray, whole: np.ndarray, seed: int = 0, groups: Groups | None = None) -> Measured:
    """Mean of `values` over that of `whole`, both (n,), of the same examples: drawn together.

    Much surer than two intervals beside each other, since what is hard in an example is hard in both.
    Raises BadRecipe when they are not as many or there are none.
    """
    a, b = np.asarray(values, np.float64), np.asarray(whole, np.float64)
    if not len(a) == len(b) > 0:
        raise BadRecipe(f"A ratio needs the same examples twice, got {len(a)} and {len(b)}.")
    counts = draws(len(a), RESAMPLES, np.random.default_rng(seed), groups)
    return around(float(a.mean() / b.mean()), (counts @ a) / (counts @ b), len(a))


def draws(n: int, times: int, rng: np.random.Generator, groups: Groups | None = None) -> np.ndarray:
    """How often each of n examples is in each resample (times, n) float64.

    Without groups n examples are drawn with replacement; with them, as many groups as there are.
    Raises BadRecipe when the groups are not n.
    """
    if groups is None:
        return _counts(n, times, rng)
    if len(groups) != n:
        raise BadRecipe(f"{n} images but {len(groups)} prompts for them: give one for each.")
    names = list(dict.fromkeys(groups))
    place = {name: k for k, name in enumerate(names)}
    return _counts(len(names), times, rng)[:, [place[g] for g in groups]]


def around(value: float, resampled: np.ndarray, n: int) -> Measured:
    """The percentile interval of resampled values around the value itself."""
    low, high = np.percentile(resampled, LEVELS)
    return Measured(value, float(low), float(high), n)


def _counts(n: int, times: int, rng: np.random.Generator) -> np.ndarray:
    """n draws with replacement, counted (times, n)."""
    at = rng.integers(n, size=(times, n)) + n * np.arange(times)[:, None]
    return np.bincount(at.ravel(), minlength=times * n).reshape(times, n).astype(np.float64)
