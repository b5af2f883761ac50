"""How a method did in one course: its strengths as points, their front, the area under it, and drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from minikin.evaluation.intervals import Measured
from minikin.evaluation.pareto import hypervolume, pareto
from minikin.evaluation.scores import Scores
from minikin.evaluation.two_subjects import Together


@dataclass(frozen=True)
class Point:
    """One strength: its scores and images, by prompt and seed."""

    strength: float
    scores: Scores
    pictures: Sequence[Path]


@dataclass(frozen=True)
class Standing:
    """All of a method in one course.

    drift    of images of the plain category, with the method's result on at strength 1
    same     whether these images are equal to the bit
    points   the strength 1 first
    measure  what following the prompt means: "recognised" or "alignment"
    """

    course: str
    drift: Measured
    same: bool
    points: Sequence[Point]
    measure: str
    before: Sequence[Path]
    after: Sequence[Path]
    both: Together | None = None  # two things in one image
    duets: Sequence[Path] = ()  # the images of these

    @cached_property
    def places(self) -> np.ndarray:
        """(points, 2): likeness and following the prompt."""
        return np.array([(p.scores.likeness.value, self.follows(p).value) for p in self.points])

    @cached_property
    def front(self) -> list[int]:
        """Numbers of the points on the front, by rising likeness."""
        return [int(i) for i in pareto(self.places)]

    @property
    def hypervolume(self) -> float:
        return hypervolume(self.places)

    def follows(self, point: Point) -> Measured:
        found: Measured | None = getattr(point.scores, self.measure)
        assert found is not None  # a comparison has a judge that reads, and two prompts at least
        return found
