"""Successive halving towards the Pareto front of subject fidelity and prompt fidelity.

    round 1   all grid points, a few prompts, one seed
    round 2   those whose intervals reach the front, at most a quarter: all prompts, the same seed
    round 3   the front of round 2, its nearest neighbours and the default point: all prompts, fresh seeds

Jamieson and Talwalkar 2016, arXiv:1502.07943, with a front in place of the single best. Grid points are
compared on the same prompts and seeds. The reported numbers come from round 3 alone, whose images had no part
in choosing the grid points.

The search knows neither images nor encoders: `evaluate` returns the scores of a grid point's images of one
prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from minikin.evaluation.intervals import Estimate, wilson_share
from minikin.evaluation.pareto import pareto
from minikin.evaluation.scores import ImageScores, Scores, summarize
from minikin.evaluation.sweep.grid import GridPoint
from minikin.events import Progress

FIRST = 4  # prompts of round 1
HALVING = 4  # one in so many grid points goes on to round 2,
LEAST = 8  # but at least so many; likewise to round 3
MOST = 12  # grid points of round 3, the default one included

Evaluate = Callable[[GridPoint, int, tuple[int, ...]], Sequence[ImageScores]]  # grid point, prompt index, seeds


@dataclass(frozen=True)
class GridResult:
    """A grid point with its scores.

    metric        field of Scores that measures prompt fidelity
    upper_bounds  upper ends of the intervals of subject and prompt fidelity, for choosing who goes on
    """

    point: GridPoint
    scores: Scores
    metric: str
    upper_bounds: tuple[float, float]

    @property
    def prompt_fidelity(self) -> Estimate:
        return self.scores.prompt_fidelity(self.metric)

    @property
    def fidelities(self) -> tuple[float, float]:
        """(subject fidelity, prompt fidelity)"""
        return self.scores.point(self.metric)


@dataclass(frozen=True)
class SearchResult:
    """Results of round 3, the default point first; those of round 2; the number of grid points tried."""

    last: tuple[GridResult, ...]
    second: tuple[GridResult, ...]
    tried: int


def max_images(points: int, prompts: int, seeds: int) -> int:
    """Largest number of images that a search generates."""
    second = min(points, max(LEAST, -(-points // HALVING)) + 1)
    return points * FIRST + second * (prompts - FIRST) + min(points, MOST) * prompts * seeds


def search(
    points: Sequence[GridPoint],
    evaluate: Evaluate,
    *,
    prompts: int,
    seed: int,
    fresh: tuple[int, ...],
    metric: str,
    encoder: str,
) -> Generator[Progress, None, SearchResult]:
    """Find the front.

    points  the default one first
    fresh   seeds of round 3; rounds 1 and 2 have `seed`
    metric  field of Scores that measures prompt fidelity
    """
    few = [int(k * prompts / FIRST) for k in range(FIRST)]
    every = list(range(prompts))

    def one_round(
        candidates: Sequence[GridPoint], indices: Sequence[int], seeds: tuple[int, ...], n: int
    ) -> Generator[Progress, None, list[GridResult]]:
        results, total = [], len(candidates) * len(indices) * len(seeds)
        for i, point in enumerate(candidates):
            scores = []
            for k, index in enumerate(indices):
                scores.append(evaluate(point, index, seeds))
                done = (i * len(indices) + k + 1) * len(seeds)
                yield Progress(f"round {n} of 3", done, total, f"{len(candidates)} settings")
            results.append(grid_result(point, indices, scores, metric, encoder))
        return results

    first = yield from one_round(points, few, (seed,), 1)
    second = yield from one_round([r.point for r in reaching(first)], every, (seed,), 2)
    last = yield from one_round([r.point for r in finalists(second)], every, fresh, 3)
    return SearchResult(tuple(last), tuple(second), len(points))


def grid_result(
    point: GridPoint, indices: Sequence[int], scores: Sequence[Sequence[ImageScores]], metric: str, encoder: str
) -> GridResult:
    """Result of a grid point, from the scores of its images of each prompt."""
    prompts = [index for index, images in zip(indices, scores, strict=True) for _ in images]
    summary = summarize(encoder, [image for images in scores for image in images], prompts)
    fidelity = summary.prompt_fidelity(metric)
    top = fidelity.high
    if metric == "r_precision":  # for 4 wrong images the bootstrap's interval is [0, 0]; Wilson's is not
        top = max(top, wilson_share(round(fidelity.value * len(indices)), len(indices)).high)
    return GridResult(point, summary, metric, (summary.subject_fidelity.high, top))


def reaching(results: Sequence[GridResult]) -> list[GridResult]:
    """The default point and those whose intervals reach the front, the nearest to it first."""
    points, upper = _points(results), np.array([r.upper_bounds for r in results])
    front = points[pareto(points)]
    scale = np.where(np.ptp(points, 0) > 0, np.ptp(points, 0), 1)
    distances = ((front[None] - points[:, None]) / scale).min(2).max(1)  # 0 on the front, larger behind it
    dominated = (front[None] > upper[:, None]).all(2).any(1)
    order = [int(i) for i in np.argsort(distances, kind="stable") if not dominated[i]]
    return [results[i] for i in dict.fromkeys([0, *order[: max(LEAST, -(-len(results) // HALVING))]])]


def finalists(results: Sequence[GridResult]) -> list[GridResult]:
    """The default point, the front, and where that is short by chance, its nearest neighbours."""
    front = [results[i] for i in _spread(pareto(_points(results)), MOST - 1)]
    near = reaching(results)
    others = near[1 : 1 + LEAST] if len(front) < LEAST else []  # they begin with the front
    return list(dict.fromkeys([near[0], *front, *others]))


def _points(results: Sequence[GridResult]) -> np.ndarray:
    return np.array([r.fidelities for r in results])


def _spread(front: np.ndarray, most: int) -> list[int]:
    """At most so many of the front, evenly along it with both ends."""
    at = np.unique(np.linspace(0, len(front) - 1, min(most, len(front))).round().astype(int))
    return [int(front[i]) for i in at]
