"""Trade-off between subject fidelity and prompt fidelity: Pareto front, hypervolume, knee.

Points are (n, 2); larger is better in both. The hypervolume's reference point is (0, 0) by default: no subject
fidelity and no prompt fidelity. Hypervolumes compare only for one encoder and one reference point.
"""

from __future__ import annotations

import numpy as np

from minikin.errors import BadRecipe

REFERENCE = (0.0, 0.0)


def pareto(points: np.ndarray) -> np.ndarray:
    """Indices of the points that no other point dominates, by rising first coordinate.

    Of equal points the first counts. Raises BadRecipe for NaN or Inf.
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
    """Area that some point dominates, above the reference point (Zitzler and Thiele 1999).

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
    """Index of the front's point farthest above the line between its ends, both axes scaled to 0..1 (Das 1999).

    With two points on the front, the one with the larger sum; with one, that one. Raises BadRecipe without
    points.
    """
    points = _checked(points)
    if not len(points):
        raise BadRecipe("A knee needs at least one point; none were given.")
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
        raise BadRecipe("A point of the Pareto front is NaN or Inf; every point needs two finite numbers.")
    return points
