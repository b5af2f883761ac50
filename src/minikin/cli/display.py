"""Printing of events: one progress line for people, or one JSON object per line for programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from minikin import events
from minikin.events import Pace, duration
from minikin.printable import escaped, escaped_json

PROGRESS_S = 15.0  # seconds between lines of progress where there is no terminal


class SafeConsole(Console):
    """A console whose texts are never obeyed by the terminal: they may come from files of strangers."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(escaped(o) if isinstance(o, str) else o for o in objects), **options)


def consoles() -> tuple[SafeConsole, SafeConsole]:
    """For standard output and standard error as they are now.

    Lines are not wrapped where a program or a file reads them. No markup: paths may have square brackets.
    """
    return (
        SafeConsole(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty()),
        SafeConsole(stderr=True, highlight=False, markup=False, soft_wrap=not sys.stderr.isatty()),
    )


out, err = consoles()


def run(
    work: Iterator[events.Event], *, as_json: bool = False,
    on_image: Callable[[events.ImageReady], Any] | None = None, label: str = "",
) -> events.Done:  # fmt: skip
    """Run work to its end and print its events; returns its Done.

    on_image  is called with each event that carries an image
    label     what the work is about, before the name of each stage
    """
    done: events.Done | None = None
    printed, pace = time.monotonic(), Pace()
    with _progress(as_json, pace) as progress:
        tasks: dict[str, TaskID] = {}
        for event in work:
            if isinstance(event, events.Done):
                done = event
            elif isinstance(event, events.ImageReady):
                if on_image:
                    on_image(event)
            elif isinstance(event, events.Note):
                _print_note(event, as_json)
            elif as_json:
                emit(_plain(event))
            elif not err.is_terminal:
                pace.update(event.stage, event.done, event.total)
                if time.monotonic() - printed > PROGRESS_S or (event.done == event.total and printed):
                    printed = time.monotonic()
                    left = pace.left_s()
                    rest = f"  about {duration(left)} left" if left else ""
                    err.print(f"{label}{event.stage} {event.done}/{event.total}{rest}  {event.info}".rstrip())
            else:
                pace.update(event.stage, event.done, event.total)
                if event.stage not in tasks:
                    for task in tasks.values():
                        progress.remove_task(task)
                    tasks = {event.stage: progress.add_task(
                        label + event.stage, total=event.total, info=event.info
                    )}  # fmt: skip
                progress.update(tasks[event.stage], completed=event.done, info=event.info)
    assert done is not None
    return done


def warn(text: str, *, as_json: bool = False) -> None:
    """Print a warning."""
    _print_note(events.Note(text, warning=True), as_json)


def note(text: str, *, as_json: bool = False) -> None:
    """Print a note."""
    _print_note(events.Note(text), as_json)


def _print_note(event: events.Note, as_json: bool) -> None:
    if as_json:
        emit(_plain(event))
    else:
        err.print(event.text, style="yellow" if event.warning else None, soft_wrap=True)


def emit(value: dict[str, Any]) -> None:
    """Print one JSON object on standard output."""
    sys.stdout.write(escaped_json(value) + "\n")
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


class _TimeLeft(ProgressColumn):
    """The estimated rest of the stage; rich's own forgets steps that took half a minute."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:
        left = self._pace.left_s()
        return Text("" if left is None else f"{duration(left)} left", style="progress.remaining")


def _progress(as_json: bool, pace: Pace) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=28), TextColumn("{task.completed}/{task.total}"),
        _TimeLeft(pace), TextColumn("{task.fields[info]}"), console=err, transient=True,
        disable=as_json or not err.is_terminal,
    )  # fmt: skip
