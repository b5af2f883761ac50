"""The trade between likeness and text alignment: its Pareto front, the area under it, its knee.

Points are (n, 2), both larger better. The reference point of the hypervolume is a stated worst: by
default (0, 0), no likeness and no alignment, which every cosine of use lies above. Hypervolumes
compare only by one judge and one reference point.
"""

from __future__ import annotations

import numpy as np

from minikin.errors import BadRecipe

REFERENCE = (0.0, 0.0)


def pareto(points: np.ndarray) -> np.ndarray:
    """Indices of the points that no other beats in both, by rising first coordinate.

    Of equal points the first counts. Raises BadRecipe for points that are not finite.
    """
    points = _checked(points)
    order = np.lexsort((np.arange(len(points)), -points[:, 1], -points[:, 0]))
    front, best = [], -np.inf
    for i in order:  # from the largest first coordinate down
        if points[i, 1] > best:
            front.append(int(i))
            best = points[i, 1]
    return np.array(front[::-1], np.int64)


def hypervolume(points: np.ndarray, reference: tuple[float, float] = REFERENCE) -> float:
    """Area that is dominated by some point and dominates the reference (Zitzler and Thiele 1999).

    Points not above the reference in both coordinates add nothing.
    """
    points = _checked(points)
    above = points[(points > reference).all(1)]
    area, left = 0.0, reference[0]
    for x, y in above[pareto(above)] if len(above) else ():
        area += (x - left) * (y - reference[1])
        left = x
    return float(area)


def knee(points: np.ndarray) -> int:
    """Index of the front's point farthest above the line between its ends (Das 1999), on axes from 0 to 1.

    With two points on the front, the one with the larger sum; with one, that one.
    """
    points = _checked(points)
    if not len(points):
        raise BadRecipe("There is no knee without points.")
    front = pareto(points)
    ends = points[front]
    span = ends.max(0) - ends.min(0)
    scaled = (ends - ends.min(0)) / np.where(span > 0, span, 1)
    above = scaled.sum(1)  # the line between (0, 1) and (1, 0) has the sum 1
    best = np.flatnonzero(above > above.max() - 1e-9)
    return int(front[best[np.argmax(ends[best].sum(1))]])


def _checked(points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, np.float64).reshape(-1, 2)
    if not np.isfinite(points).all():
        raise BadRecipe("A point of the front is not a number; every point needs likeness and alignment.")
    return points
