"""A device's memory: what is free, the most that some work needed, and whether an error says it ran out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")
_MACHINE = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")  # of a container: its limit, and what it has taken


class Peak:
    """Bytes when the work has ended, the base included, and when it began; None where nothing tells."""

    bytes: int | None = None
    before: int | None = None


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Measure while inside: a GPU's allocated memory, or else this process's resident memory (Linux)."""
    found = Peak()
    known = _reset(device)
    if known:
        cuda = device.type == "cuda"
        found.before = int(torch.cuda.memory_allocated(device)) if cuda else _resident("VmRSS")
    try:
        yield found
    finally:
        if known and device.type == "cuda":
            found.bytes = int(torch.cuda.max_memory_allocated(device))
        elif known:
            found.bytes = _resident("VmHWM")


def free(device: torch.device) -> int | None:
    """Bytes that may still be taken; None where nothing tells.

    CUDA: what the card has left and what PyTorch holds without using it. CPU (Linux): the memory that can
    be had without swapping, or what the container's limit leaves of it.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + int(held)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory()) - int(torch.mps.driver_allocated_memory())
    if device.type != "cpu":
        return None
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", _MACHINE.read_text())
    except OSError:
        return None
    if available is None:
        return None
    left = _left_in_group()
    machine = int(available[1]) * 1024
    return machine if left is None else min(machine, left)


def ran_out(e: BaseException) -> bool:
    """Whether this error says that memory ran out: a GPU's has a class of its own, the CPU's only words."""
    return isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)


def _left_in_group() -> int | None:
    """What a container's limit (cgroup v2) leaves; files it has read can be dropped and do not count."""
    try:
        most = (_GROUP / "memory.max").read_text().strip()
        taken = int((_GROUP / "memory.current").read_text())
        files = re.search(r"^inactive_file (\d+)", (_GROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    if most == "max":
        return None
    return max(0, int(most) - taken + (int(files[1]) if files else 0))


def _resident(which: str) -> int | None:
    found = re.search(rf"{which}:\s+(\d+) kB", (_PROCESS / "status").read_text())
    return int(found[1]) * 1024 if found else None


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
