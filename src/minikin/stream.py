"""Turn work that reports through a callback into a generator of events."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Executor
from typing import Any

from minikin.events import Cancelled, Event

Emit = Callable[[Event], None]


def stream(work: Callable[[Emit], Any], executor: Executor) -> Generator[Event, None, Any]:
    """Run `work(emit)` on an executor's thread and yield what it emits; returns what it returns.

    The executor should keep its thread: PyTorch builds a team of threads for every thread that
    calls it, which costs more than a small image.
    Closing the generator makes the next `emit` raise Cancelled inside the work, and waits for it.
    Errors of the work are raised here.
    """
    box: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
    cancelled = threading.Event()

    def emit(event: Event) -> None:
        if cancelled.is_set():
            raise Cancelled
        box.put(event)

    def run() -> Any:
        try:
            return work(emit)
        finally:
            box.put(None)

    future = executor.submit(run)
    try:
        while (event := box.get()) is not None:
            yield event
        return future.result()
    finally:
        cancelled.set()
        future.exception()  # wait until the work has ended
