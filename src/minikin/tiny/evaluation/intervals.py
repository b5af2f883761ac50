"""How sure a measured number is: 95 % intervals of shares and of means."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Z = 1.959964  # 97.5 % point of the normal distribution
RESAMPLES = 2000


@dataclass(frozen=True)
class Measured:
    """A value with its 95 % interval and how many examples it comes from."""

    value: float
    low: float
    high: float
    n: int

    def percent(self) -> str:
        return f"{100 * self.value:5.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] of {self.n}"


def share(right: int, n: int) -> Measured:
    """Wilson's score interval (Wilson 1927); n = 0 gives nothing known: [0, 1] around nan."""
    if n == 0:
        return Measured(math.nan, 0.0, 1.0, 0)
    p = right / n
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Measured(p, max(0.0, middle - half), min(1.0, middle + half), n)


def mean(values: np.ndarray, seed: int = 0) -> Measured:
    """Percentile bootstrap of the mean over independent examples (n,)."""
    at = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[at].mean(1), (2.5, 97.5))
    return Measured(float(values.mean()), float(low), float(high), len(values))
