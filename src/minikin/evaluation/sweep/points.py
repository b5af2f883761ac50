"""Selection of a concept's operating points from the results of a sweep.

Only the useful part of the Pareto front counts: at least 60 % of its best subject fidelity and 80 % of its best
prompt fidelity. Its end of highest subject fidelity is `faithful`, the other end `creative`, and the knee
between them `balanced`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minikin.evaluation.pareto import hypervolume, knee, pareto
from minikin.evaluation.sweep.search import GridResult
from minikin.perfusion.operating_points import Point

USEFUL = (0.6, 0.8)  # shares of the front's best subject and prompt fidelity


@dataclass(frozen=True)
class Selection:
    """Indices into the results: the front by rising subject fidelity, and the operating points by name."""

    front: tuple[int, ...]
    points: dict[str, int]
    hypervolume: float


def select(results: Sequence[GridResult]) -> Selection:
    """Choose the operating points. Where nothing lies in the useful part, all three are the front's knee."""
    points = np.array([r.fidelities for r in results])
    front = pareto(points)
    best = points[front].max(0)
    useful = front[(points[front] >= best * USEFUL).all(1)]
    if not len(useful):
        useful = np.array([knee(points)])
    middle = int(useful[knee(points[useful])])
    chosen = {"faithful": int(useful[-1]), "balanced": middle, "creative": int(useful[0])}
    return Selection(tuple(int(i) for i in front), chosen, hypervolume(points))


def operating_point(result: GridResult, encoder: str) -> Point:
    """A result as the concept file stores it; `encoder` is the encoder's name and digest."""
    p = result.point
    return Point(p.strength, p.tau, p.guidance, p.concept_start, p.interval, *result.fidelities, encoder)
