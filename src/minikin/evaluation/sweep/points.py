"""Which of the measured settings become operating points.

Only the useful span of the front counts: at least 60 % of its best likeness, and prompts followed at least
80 % as well as anywhere on it. Its end of most likeness is `faithful`, the other one `creative`, and
the knee between them `balanced`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minikin.evaluation.pareto import hypervolume, knee, pareto
from minikin.evaluation.sweep.search import Standing
from minikin.perfusion.operating_points import Point

LIKENESS = 0.6  # of the front's best
FOLLOWS = 0.8


@dataclass(frozen=True)
class Chosen:
    """Indices into the standings: the front by rising likeness, and the operating points by name."""

    front: tuple[int, ...]
    named: dict[str, int]
    hypervolume: float


def choose(standings: Sequence[Standing]) -> Chosen:
    """Where no setting lies in the useful span, the front's knee is all three points."""
    points = np.array([s.point for s in standings])
    front = pareto(points)
    best = points[front].max(0)
    useful = front[(points[front] >= best * (LIKENESS, FOLLOWS)).all(1)]
    if not len(useful):
        useful = np.array([knee(points)])
    middle = int(useful[knee(points[useful])])
    named = {"faithful": int(useful[-1]), "balanced": middle, "creative": int(useful[0])}
    return Chosen(tuple(int(i) for i in front), named, hypervolume(points))


def as_point(one: Standing, judge: str) -> Point:
    """What the concept file keeps of a standing; `judge` is the judge's name and digest."""
    s = one.setting
    return Point(s.strength, s.tau, s.guidance, s.switch, s.interval, *one.point, judge)
