"""Successive halving towards the front of likeness and following the prompt.

    round 1   all settings, a few prompts, one seed
    round 2   those whose intervals reach the front, at most a quarter: all prompts, the same seed
    round 3   the front of these, the nearest to it and the taught setting: all prompts, fresh seeds

(Jamieson and Talwalkar 2016, arXiv:1502.07943, with a front in place of one best.) Settings are compared on
the same prompts and seeds. What is reported comes from round 3 alone, whose images had no part in the
choice of these settings.

Knows no painter and no judge: `look` gives what was seen in the images of a setting and a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from minikin.evaluation.intervals import Measured, mean, share
from minikin.evaluation.pareto import pareto
from minikin.evaluation.sweep.cache import Seen
from minikin.evaluation.sweep.settings import Setting
from minikin.events import Progress

FIRST = 4  # prompts of round 1
KEPT = 4  # one in so many settings goes on to round 2,
LEAST = 8  # but so many at least; likewise to round 3
MOST = 12  # settings of round 3, with the taught one

Look = Callable[[Setting, int, tuple[int, ...]], Sequence[Seen]]  # a setting, a prompt's number, seeds


@dataclass(frozen=True)
class Standing:
    """How a setting did: each with its 95 % interval over prompts.

    follows  how well prompts are followed, the axis of the front: `recognised` or `alignment`
    reach    the upper ends that likeness and follows may have, for choosing who goes on
    """

    setting: Setting
    likeness: Measured
    held_out: Measured | None
    alignment: Measured
    recognised: Measured
    follows: Measured
    reach: tuple[float, float]

    @property
    def point(self) -> tuple[float, float]:
        return self.likeness.value, self.follows.value


@dataclass(frozen=True)
class Found:
    """Standings of round 3, the taught setting first; those of round 2; and how many were tried."""

    last: tuple[Standing, ...]
    before: tuple[Standing, ...]
    tried: int


def pictures(settings: int, prompts: int, seeds: int) -> int:
    """So many images are painted at most."""
    again = min(settings, max(LEAST, -(-settings // KEPT)) + 1)
    return settings * FIRST + again * (prompts - FIRST) + min(settings, MOST) * prompts * seeds


def search(
    settings: Sequence[Setting], look: Look, *, prompts: int, seed: int, fresh: tuple[int, ...], measure: str,
) -> Generator[Progress, None, Found]:  # fmt: skip
    """Find the front.

    settings  the taught one first
    fresh     the seeds of round 3; round 1 and 2 have `seed`
    measure   "recognised" or "alignment": what following a prompt means
    """
    some = [int(k * prompts / FIRST) for k in range(FIRST)]
    everything = list(range(prompts))

    def measured(
        these: Sequence[Setting], numbers: Sequence[int], seeds: tuple[int, ...], n: int
    ) -> Generator[Progress, None, list[Standing]]:
        out, total = [], len(these) * len(numbers) * len(seeds)
        for i, setting in enumerate(these):
            seen = []
            for k, number in enumerate(numbers):
                seen.append(look(setting, number, seeds))
                done = (i * len(numbers) + k + 1) * len(seeds)
                yield Progress(f"round {n} of 3", done, total, f"{len(these)} settings")
            out.append(standing(setting, numbers, seen, measure))
        return out

    first = yield from measured(settings, some, (seed,), 1)
    again = yield from measured([s.setting for s in reaching(first)], everything, (seed,), 2)
    last = yield from measured([s.setting for s in finalists(again)], everything, fresh, 3)
    return Found(tuple(last), tuple(again), len(settings))


def standing(
    setting: Setting, numbers: Sequence[int], seen: Sequence[Sequence[Seen]], measure: str
) -> Standing:  # fmt: skip
    """How a setting did, from what was seen in the images of each prompt."""
    own = [number for number, some in zip(numbers, seen, strict=True) for _ in some]
    flat = [one for some in seen for one in some]
    fits = np.array([one.fits for one in flat])  # (images, prompts)

    def over(values: Sequence[float] | np.ndarray) -> Measured:
        return mean(np.asarray(values), groups=own)

    unseen = [one.held_out for one in flat if one.held_out is not None]
    likeness = over([one.likeness for one in flat])
    recognised = over(fits.argmax(1) == own)
    alignment = over(fits[np.arange(len(own)), own])
    follows = recognised if measure == "recognised" else alignment
    top = follows.high
    if measure == "recognised":  # of 4 wrong images a bootstrap is sure; Wilson's interval is not
        top = max(top, share(round(recognised.value * len(numbers)), len(numbers)).high)
    return Standing(
        setting, likeness, over(unseen) if len(unseen) == len(flat) else None, alignment, recognised, follows,
        (likeness.high, top),
    )  # fmt: skip


def reaching(standings: Sequence[Standing]) -> list[Standing]:
    """The taught setting and those whose intervals reach the front, the nearest to it first."""
    points, reach = _points(standings), np.array([s.reach for s in standings])
    front = points[pareto(points)]
    scale = np.where(np.ptp(points, 0) > 0, np.ptp(points, 0), 1)
    behind = ((front[None] - points[:, None]) / scale).min(2).max(1)  # 0 on the front, larger behind it
    beaten = (front[None] > reach[:, None]).all(2).any(1)
    order = [int(i) for i in np.argsort(behind, kind="stable") if not beaten[i]]
    kept = order[: max(LEAST, -(-len(standings) // KEPT))]
    return [standings[i] for i in dict.fromkeys([0, *kept])]


def finalists(standings: Sequence[Standing]) -> list[Standing]:
    """The taught setting, the front, and where that is short, as luck may have it, the nearest to it."""
    front = [standings[i] for i in _spread(pareto(_points(standings)), MOST - 1)]
    near = reaching(standings)
    others = near[1 : 1 + LEAST] if len(front) < LEAST else []  # they begin with the front
    return list(dict.fromkeys([near[0], *front, *others]))


def _points(standings: Sequence[Standing]) -> np.ndarray:
    return np.array([s.point for s in standings])


def _spread(front: np.ndarray, most: int) -> list[int]:
    """At most so many of the front, evenly along it with both ends."""
    at = np.unique(np.linspace(0, len(front) - 1, min(most, len(front))).round().astype(int))
    return [int(front[i]) for i in at]
