"""Showing events to a person (one progress line) or a program (one JSON object a line)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from minikin import events

QUIET_S = 15.0  # seconds without a word, where there is no terminal for a progress line

# lines that a program or a file reads stay whole, however long a path in them is
# no markup: names and paths may have square brackets in them
out = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=not sys.stderr.isatty())


def run(
    work: Iterator[events.Event], *, as_json: bool = False,
    on_picture: Callable[[events.Picture], Any] | None = None,
) -> events.Done:  # fmt: skip
    """Drive a verb to its end, showing what it tells; returns its Done."""
    done: events.Done | None = None
    told = time.monotonic()
    with _line(as_json) as line:
        tasks: dict[str, TaskID] = {}
        for event in work:
            if isinstance(event, events.Done):
                done = event
            elif isinstance(event, events.Picture):
                if on_picture:
                    on_picture(event)
            elif isinstance(event, events.Note):
                _tell(event, as_json)
            elif as_json:
                emit(_plain(event))
            elif not err.is_terminal:
                if time.monotonic() - told > QUIET_S or (event.done == event.total and told):
                    told = time.monotonic()
                    err.print(f"{event.stage} {event.done}/{event.total}  {event.info}".rstrip())
            else:
                if event.stage not in tasks:
                    for task in tasks.values():
                        line.remove_task(task)
                    tasks = {event.stage: line.add_task(event.stage, total=event.total, info=event.info)}
                line.update(tasks[event.stage], completed=event.done, info=event.info)
    assert done is not None
    return done


def warn(text: str, *, as_json: bool = False) -> None:
    """A warning outside of a verb's own events."""
    _tell(events.Note(text, warning=True), as_json)


def note(text: str, *, as_json: bool = False) -> None:
    """A remark outside of a verb's own events."""
    _tell(events.Note(text), as_json)


def _tell(event: events.Note, as_json: bool) -> None:
    if as_json:
        emit(_plain(event))
    else:
        err.print(event.text, style="yellow" if event.warning else None, soft_wrap=True)


def emit(value: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def _plain(event: events.Event) -> dict[str, Any]:
    kind = type(event).__name__.lower()
    if isinstance(event, events.Progress):
        return {
            "event": kind,
            "stage": event.stage,
            "done": event.done,
            "total": event.total,
            "info": event.info,
        }
    assert isinstance(event, events.Note)
    return {"event": kind, "text": event.text, "warning": event.warning}


def _line(as_json: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=28), TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(), TextColumn("{task.fields[info]}"), console=err, transient=True,
        disable=as_json or not err.is_terminal,
    )  # fmt: skip
