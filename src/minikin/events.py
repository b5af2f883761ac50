"""Events of long work. Every command is a generator of them, and front ends display them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Note:
    """A sentence for a person; `warning` when the result may differ from what they asked for."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of `stage`.

    info     further values to display (loss, ...)
    preview  makes an image of the present state when it is called; None, or a call that returns None, where
             there is none
    """

    stage: str
    done: int
    total: int
    info: str = ""
    preview: Callable[[], Any] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class ImageReady:
    """An image: a sample, a preview or a result.

    verdict  of the content filter (`generation.content_filter`); None where it has no objection
    record   how a result was generated, for its metadata (`generation.request`); None for other images
    subject_fidelity  of a sample while a concept is taught: mean cosine to its photos; None where it is unknown
    """

    image: Any
    caption: str = ""
    seed: int | None = None
    verdict: dict[str, Any] | None = None
    record: dict[str, Any] | None = field(default=None, repr=False)
    subject_fidelity: float | None = None


@dataclass(frozen=True)
class Done:
    """The end of the work: its result, and facts about the run."""

    result: Any
    facts: dict[str, Any]


class Cancelled(Exception):
    """Raised inside work whose result is no longer needed."""


class Pace:
    """Estimates when a stage ends, from its progress; as soon as one step is done, however long it took.

    A resumed stage begins at a later step: one more step is needed then, since the first has no known start.
    """

    def __init__(self) -> None:
        self._stage = ""
        self._first: tuple[int, float] | None = None  # steps done and time, from which on it is measured
        self._done, self._total, self._now = 0, 0, time.monotonic()

    def update(self, stage: str, done: int, total: int) -> None:
        """Note that `done` of `total` steps of a stage are done by now."""
        now = time.monotonic()
        if stage != self._stage or done < self._done:
            # the first step began when the last thing was reported
            self._stage, self._first = stage, (0, self._now) if done == 1 else (done, now)
        self._done, self._total, self._now = done, total, now

    def left_s(self) -> float | None:
        """Estimated seconds until the end of the stage; None before a step was timed."""
        if self._first is None or self._done <= self._first[0]:
            return None
        a_step = (self._now - self._first[1]) / (self._done - self._first[0])
        return max(0.0, a_step * (self._total - self._done) - (time.monotonic() - self._now))


def duration(seconds: float) -> str:
    """Seconds for people: 40 s, 12 min, 3 h 20 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


Event = Note | Progress | ImageReady | Done
