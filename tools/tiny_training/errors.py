"""How this package's commands tell errors: one message and an exit code, like `minikin` itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from minikin.errors import MinikinError


@contextmanager
def told() -> Iterator[None]:
    """Inside, errors that are the user's to read end the program with their message and code."""
    try:
        yield
    except MinikinError as e:
        if os.environ.get("MINIKIN_DEBUG"):
            raise
        print(f"minikin: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("\nminikin: interrupted; run the same command to go on.", file=sys.stderr)
        sys.exit(130)
