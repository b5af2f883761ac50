"""Turn work that reports through a callback into a generator of events."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

from minikin.events import Cancelled, Event

Emit = Callable[[Event], None]


def stream(work: Callable[[Emit], Any]) -> Generator[Event, None, Any]:
    """Run `work(emit)` in a thread and yield what it emits; returns what it returns.

    Closing the generator makes the next `emit` raise Cancelled inside the work, and waits for it.
    Errors of the work are raised here.
    """
    box: queue.Queue[tuple[str, Any]] = queue.Queue()
    cancelled = threading.Event()

    def emit(event: Event) -> None:
        if cancelled.is_set():
            raise Cancelled
        box.put(("event", event))

    def run() -> None:
        try:
            box.put(("result", work(emit)))
        except BaseException as e:  # handed over to the caller's thread, whatever it is
            box.put(("error", e))

    thread = threading.Thread(target=run, name="minikin-work", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = box.get()
            if kind == "result":
                return value
            if kind == "error":
                raise value
            yield value
    finally:
        cancelled.set()
        thread.join()
