"""Results of a method with one sampler: scores at each strength, Pareto front, hypervolume, drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from minikin.evaluation.intervals import Estimate
from minikin.evaluation.pareto import hypervolume, pareto
from minikin.evaluation.scores import Scores
from minikin.evaluation.two_subjects import TwoSubjectScores


@dataclass(frozen=True)
class StrengthResult:
    """Scores and images at one strength, by prompt and seed."""

    strength: float
    scores: Scores
    images: Sequence[Path]


@dataclass(frozen=True)
class MethodResult:
    """All results of a method with one sampler.

    drift         of images of the plain category, with the method active at strength 1
    drift_free    whether these images are equal to the plain base's, bit for bit
    strengths     strength 1 first
    metric        field of Scores that measures prompt fidelity
    before, after images of the plain category, without and with the method
    two_subjects  scores and images of the two-subject test
    """

    sampler: str
    drift: Estimate
    drift_free: bool
    strengths: Sequence[StrengthResult]
    metric: str
    before: Sequence[Path]
    after: Sequence[Path]
    two_subjects: TwoSubjectScores | None = None
    two_subject_images: Sequence[Path] = ()

    @cached_property
    def fidelities(self) -> np.ndarray:
        """(strengths, 2): subject fidelity and prompt fidelity."""
        return np.array([s.scores.point(self.metric) for s in self.strengths])

    @cached_property
    def front(self) -> list[int]:
        """Indices of the strengths on the Pareto front, by rising subject fidelity."""
        return [int(i) for i in pareto(self.fidelities)]

    @property
    def hypervolume(self) -> float:
        return hypervolume(self.fidelities)
