"""Events of long work. Every command is a generator of them, and front ends display them."""

from __future__ import annotations

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
    """

    image: Any
    caption: str = ""
    seed: int | None = None
    verdict: dict[str, Any] | None = None
    record: dict[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Done:
    """The end of the work: its result, and facts about the run."""

    result: Any
    facts: dict[str, Any]


class Cancelled(Exception):
    """Raised inside work whose result is no longer needed."""


Event = Note | Progress | ImageReady | Done
