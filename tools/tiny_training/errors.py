"""Errors of this package's commands: one message and an exit code, as `minikin` reports them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from minikin.errors import MinikinError


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Context in which a MinikinError or Ctrl-C ends the program with a message and an exit code."""
    try:
        yield
    except MinikinError as e:
        if os.environ.get("MINIKIN_DEBUG"):
            raise
        print(f"minikin: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("\nminikin: interrupted; run the same command to resume.", file=sys.stderr)
        sys.exit(130)
