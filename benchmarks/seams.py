"""Seams: whether the borders of tiles can be seen in an image that was painted in parts.

At a visible border, colours jump more than between the pixels beside it. The score is the mean jump
across the borders over the mean jump between neighbouring pixels near them: about 1 where nothing shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

NEAR = 8  # px on both sides


def seams(picture: Image.Image, columns: Sequence[int], rows: Sequence[int]) -> float:
    """How much colours jump at these borders, against around them.

    columns, rows  a border lies before pixel column (row) k; 0 < k < side
    """
    pixels = np.asarray(picture.convert("RGB"), np.float64)
    across = [_jumps(pixels, columns), _jumps(pixels.transpose(1, 0, 2), rows)]
    at, beside = (sum(part) for part in zip(*across, strict=True))
    return float(at / beside) if beside else 1.0


def _jumps(pixels: np.ndarray, borders: Sequence[int]) -> tuple[float, float]:
    """Sums over the borders of columns: mean jump at each, and around each."""
    jump = np.abs(np.diff(pixels, axis=1)).mean((0, 2))  # between column k and k + 1
    at = beside = 0.0
    for k in borders:
        at += float(jump[k - 1])
        near = [i for i in range(k - 1 - NEAR, k + NEAR) if i != k - 1 and 0 <= i < len(jump)]
        beside += float(jump[near].mean())
    return at, beside
