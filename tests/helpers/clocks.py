"""Clocks that a machine with other work to do does not make lie.

A bar on the clock on the wall fails where somebody else has the processor. Work is measured by the processor's
time it took (`cpu`), waiting by a clock that stands still while this process is not let run (`Ticks`).
"""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType

TICK_S = 0.005


def cpu() -> float:
    """Seconds of the processor that this process and its ended children have had."""
    return sum(os.times()[:4])


class Ticks:
    """`with Ticks() as t: ...; assert t.seconds < 1`: a thread that sleeps 5 ms again and again, and counts.

    Where nothing else runs, these are the wall's seconds, or a little fewer.
    """

    def __enter__(self) -> Ticks:
        self._count, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _tick(self) -> None:
        while not self._done.is_set():
            time.sleep(TICK_S)
            self._count += 1

    @property
    def seconds(self) -> float:
        return self._count * TICK_S
