"""One opening at a time.

While they open a model, diffusers, accelerate and transformers replace functions of PyTorch for the whole
process: how a module registers its parameters (as tensors without data), how weights are initialised, and the
default dtype. Two openings at once undo each other's replacements in the wrong order, and a module that another
thread builds meanwhile is built wrongly.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()


@contextmanager
def opening() -> Iterator[None]:
    """Context, and decorator, in which no other thread opens a model or builds a network."""
    with _LOCK:
        yield
