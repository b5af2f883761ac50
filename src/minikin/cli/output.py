"""Standard output and standard error that may be closed, or go to a full disk, while a command runs."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from minikin.cli.resident.command import fill_standard
from minikin.errors import MinikinError, reason
from minikin.training.signals import request_stop

BROKEN_PIPE = 141  # 128 and SIGPIPE's number, as a shell reports programs whose reader left


class OutputLost(MinikinError):
    """Standard output cannot be written: its reader has left, as `| head` does, or the disk is full."""

    code = "output_lost"

    def __init__(self, cause: OSError) -> None:
        super().__init__(
            f"standard output cannot be written: {reason(cause)}. What was saved before is complete."
        )
        self.quiet = cause.errno == errno.EPIPE
        self.exit_code = BROKEN_PIPE if self.quiet else 7


class _Guarded:
    """A text stream whose first failed write ends the command, after long work has saved what it has.

    ignore  a failed write changes nothing but that nothing more is written
    """

    def __init__(self, stream: TextIO, *, ignore: bool) -> None:
        self._stream, self._ignore = stream, ignore
        self.lost: OutputLost | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text) if self.lost is None else len(text)
        except OSError as e:
            self._fail(e)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as e:
            self._fail(e)

    def _fail(self, e: OSError) -> None:
        first, self.lost = self.lost is None, self.lost or OutputLost(e)
        with suppress(OSError, ValueError):  # what is in the buffer is written at the end of the process
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), self._stream.fileno())
        if first and not self._ignore and not request_stop():
            raise self.lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded() -> Iterator[None]:
    """Inside, losing standard output raises OutputLost, at the end if the work could be stopped and saved.

    Streams that were closed from the start (`>&-`) are as good as /dev/null: without them, the next file that
    is opened would take their number.
    """
    fill_standard()
    before = sys.stdout, sys.stderr
    out, err = (stream or open(os.devnull, "w") for stream in before)  # noqa: SIM115 - until the process ends
    guard = _Guarded(out, ignore=False)
    sys.stdout, sys.stderr = guard, _Guarded(err, ignore=True)
    try:
        try:
            yield
        finally:
            sys.stderr.flush()
            guard.flush()
            if guard.lost:
                raise guard.lost
    finally:
        sys.stdout, sys.stderr = before
