"""The most memory that some work needed, the base included."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


class Peak:
    """`bytes` when the work has ended; None where the system does not tell."""

    bytes: int | None = None


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Measure while inside: a GPU's allocated memory, or else this process's resident memory (Linux)."""
    found = Peak()
    known = _reset(device)
    try:
        yield found
    finally:
        if known and device.type == "cuda":
            found.bytes = int(torch.cuda.max_memory_allocated(device))
        elif known:
            highest = re.search(r"VmHWM:\s+(\d+) kB", (_PROCESS / "status").read_text())
            found.bytes = int(highest[1]) * 1024 if highest else None


def _reset(device: torch.device) -> bool:
    """Forget earlier peaks; False where that cannot be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        (_PROCESS / "clear_refs").write_text("5")  # proc(5): sets the peak to what is resident now
    except OSError:
        return False
    return device.type == "cpu"
