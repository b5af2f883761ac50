"""Ctrl-C, SIGTERM and SIGHUP: long work finishes its step and saves instead of being torn apart.

SIGTERM comes from `kill`, batch systems and a shutdown, SIGHUP when the terminal is closed or the connection to
it breaks. All three do the same, but only Ctrl-C does more when it is repeated: a shell and the kernel may both
send SIGHUP, and a shutdown sends SIGTERM after it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

HANGUP = getattr(signal, "SIGHUP", None)  # there is none on Windows
_running: list[Callable[[], None]] = []  # what interrupts the work of the innermost `interruptible`


@contextmanager
def interruptible(notify: Callable[[], None] | None = None) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C, SIGTERM or SIGHUP sets; another Ctrl-C raises KeyboardInterrupt at once.

    notify  called with the first one
    Only the main thread can have signal handlers; in another one the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def interrupt() -> None:
        if not stop.is_set():
            stop.set()
            if notify:
                with suppress(OSError):  # the terminal may be gone: that must not keep work from being saved
                    notify()

    def handle(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        interrupt()

    _running.append(interrupt)
    try:
        with _handling(handle, signal.SIGINT, signal.SIGTERM):
            yield stop
    finally:
        _running.remove(interrupt)


@contextmanager
def as_ctrl_c(handle: Callable[[int, Any], None] | None = None) -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP do as Ctrl-C does: they raise KeyboardInterrupt, or call `handle`."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handling(handle or interrupt, signal.SIGTERM):
        yield


def request_stop() -> bool:
    """Do what the first Ctrl-C does to work inside `interruptible`; False when there is none."""
    if _running:
        _running[-1]()
    return bool(_running)


@contextmanager
def _handling(handle: Callable[[int, Any], None], *signals: int) -> Iterator[None]:
    """Inside, these signals and SIGHUP are handled; SIGHUP stays ignored where it was, as under nohup."""
    terminals = [fd for fd in (0, 1, 2) if os.isatty(fd)]

    def hung_up(number: int, frame: Any) -> None:
        for fd in terminals:  # writing to what is gone would be an error in the midst of saving
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), fd)
        handle(number, frame)

    before = {s: signal.signal(s, handle) for s in signals}
    if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:
        before[HANGUP] = signal.signal(HANGUP, hung_up)
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
