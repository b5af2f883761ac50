"""What long work tells while it runs. Every verb is a generator of these; faces show them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Note:
    """Something a person should read; `warning` when it may not be what they wanted."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of `stage`, with what there is to say about it (loss, ...).

    look  the image as it is now, for who wants to see it: it costs nothing until it is called. None,
          or a call that gives None, where there is nothing to see
    """

    stage: str
    done: int
    total: int
    info: str = ""
    look: Callable[[], Any] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Picture:
    """An image was made: a sample, a preview or a result.

    verdict  what the content filter found (`generation.content_filter`); None for nothing
    """

    image: Any
    caption: str = ""
    seed: int | None = None
    verdict: dict[str, Any] | None = None


@dataclass(frozen=True)
class Done:
    """The end: the result, and facts about the run."""

    result: Any
    facts: dict[str, Any]


class Cancelled(Exception):
    """Raised inside work when nobody wants its result any more."""


Event = Note | Progress | Picture | Done
