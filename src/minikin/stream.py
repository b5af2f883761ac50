"""Work in another thread, which reports through a callback, as a generator of events."""

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

    The executor should keep its thread: PyTorch starts a pool of threads for every thread that calls it, which
    costs more than a small image.
    Closing the generator makes the next `emit` raise Cancelled inside the work, and waits until the work ends.
    Errors of the work are raised here.
    """
    pending: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
    cancelled = threading.Event()

    def emit(event: Event) -> None:
        if cancelled.is_set():
            raise Cancelled
        pending.put(event)

    def run() -> Any:
        try:
            return work(emit)
        finally:
            pending.put(None)

    future = executor.submit(run)
    try:
        while (event := pending.get()) is not None:
            yield event
        return future.result()
    finally:
        cancelled.set()
        future.exception()  # wait until the work has ended
