"""Subject fidelity without a network: colours and their arrangement inside the subject's mask.

A descriptor of the masked subject: its colour histogram (64 bins) and its autocorrelogram (Huang et al. 1997),
the probability that a pixel some distance away has the same colour, which tells stripes from dots. It knows
nothing of shapes and is no substitute for DINO on photographs; on the sticker world it separates identities
(tests/evaluation/test_colour_fidelity.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BINS = 4  # per channel
DISTANCES = (2, 4, 8, 12)  # px of a 128 px image


def descriptor(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Histogram and autocorrelogram (64 * 5,) of the masked pixels (H, W, 3) uint8, mask (H, W) in [0, 1].

    Each part sums to at most 1; all zero for an empty mask.
    """
    bins = np.minimum(pixels.astype(np.int64) * BINS // 256, BINS - 1)
    index = (bins[..., 0] * BINS + bins[..., 1]) * BINS + bins[..., 2]
    inside = mask > 0.5
    total = max(int(inside.sum()), 1)
    n = BINS**3
    parts = [np.bincount(index[inside], minlength=n) / total]
    for d in DISTANCES:
        same = np.zeros(n)
        pairs = _shifted_pairs(d)
        for a, b in pairs:
            both = inside[a] & inside[b] & (index[a] == index[b])
            same += np.bincount(index[a][both], minlength=n)
        parts.append(same / (len(pairs) * total))
    return np.concatenate(parts)


def _shifted_pairs(d: int) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Pairs of shifted views: right, down, and both diagonals."""
    low, high, every = slice(None, -d), slice(d, None), slice(None)
    return [
        ((every, low), (every, high)),
        ((low, every), (high, every)),
        ((low, low), (high, high)),
        ((low, high), (high, low)),
    ]


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection of two descriptors over their union: 1 for equal ones, 0 for nothing in common."""
    union = float(np.maximum(a, b).sum())
    return float(np.minimum(a, b).sum()) / union if union else 0.0


def subject_fidelity(pixels: np.ndarray, mask: np.ndarray, references: Sequence[np.ndarray]) -> float:
    """Mean similarity of a masked image to reference descriptors."""
    image = descriptor(pixels, mask)
    return float(np.mean([similarity(image, r) for r in references]))
