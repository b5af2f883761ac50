"""Calls in parallel processes, with clear errors when a process is interrupted or killed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from minikin.errors import OutOfMemory


def spread(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], workers: int) -> Iterator[int]:
    """Make all calls in `workers` processes, or in this one (0); yields the number of finished calls.

    Processes are spawned, not forked, since a fork of a process with threads can hang. Ctrl-C drops the
    calls that have not started. Raises the error of a failed call, OutOfMemory for a killed process.
    """
    if not workers:
        for i, arguments in enumerate(calls, 1):
            function(*arguments)
            yield i
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _leave_interrupts_to_the_parent) as pool:
        futures = [pool.submit(function, *arguments) for arguments in calls]
        try:
            for i, future in enumerate(as_completed(futures), 1):
                future.result()
                yield i
        except BrokenProcessPool as e:
            raise OutOfMemory(
                "A worker process was ended from outside, most often because memory is short. Run the same "
                f"command again with fewer than --workers {workers}; what is finished is kept."
            ) from e
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
