"""Memory of a device: free bytes, peak use, and out-of-memory errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")
_MACHINE = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # a container's limit and use


class Peak:
    """Memory in bytes, the base included; None where it cannot be measured."""

    bytes: int | None = None  # the peak, set when the context ends
    before: int | None = None  # at the start of the context


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Context that measures peak memory: a GPU's allocated, or this process's resident memory (Linux)."""
    result = Peak()
    measurable = _reset(device)
    if measurable:
        cuda = device.type == "cuda"
        result.before = int(torch.cuda.memory_allocated(device)) if cuda else _resident("VmRSS")
    try:
        yield result
    finally:
        if measurable and device.type == "cuda":
            result.bytes = int(torch.cuda.max_memory_allocated(device))
        elif measurable:
            result.bytes = _resident("VmHWM")


def free(device: torch.device) -> int | None:
    """Free bytes of a device; None where they cannot be measured.

    CUDA: the card's free memory and PyTorch's unused cache. CPU (Linux): memory available without swapping,
    within the container's limit.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + int(cached)
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
    in_container = _free_in_cgroup()
    machine = int(available[1]) * 1024
    return machine if in_container is None else min(machine, in_container)


def is_out_of_memory(e: BaseException) -> bool:
    """True for an out-of-memory error of a GPU (by its class) or of the CPU (by its message)."""
    return isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)


def _free_in_cgroup() -> int | None:
    """Bytes that a container's limit (cgroup v2) leaves; its file cache can be dropped and counts as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        current = int((_CGROUP / "memory.current").read_text())
        files = re.search(r"^inactive_file (\d+)", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - current + (int(files[1]) if files else 0))


def _resident(field: str) -> int | None:
    match = re.search(rf"{field}:\s+(\d+) kB", (_PROCESS / "status").read_text())
    return int(match[1]) * 1024 if match else None


def _reset(device: torch.device) -> bool:
    """Reset the peak; False where that is not possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        (_PROCESS / "clear_refs").write_text("5")  # proc(5): resets the peak resident size
    except OSError:
        return False
    return device.type == "cpu"
