"""Timing helpers: medians with spread, alternating runs, and a description of this machine."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def timed(work: Callable[[], Any], repeats: int = 15, warm_up: int = 2) -> dict[str, float]:
    """Median, smallest and largest time of `work` in milliseconds."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return {"median_ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}


def alternating(
    a: Callable[[], Any], b: Callable[[], Any], runs: int = 7, repeats: int = 2, warm_up: int = 2
) -> list[tuple[float, float]]:
    """Medians of `a` and of `b` in milliseconds, in turn, so that other load on the machine affects both."""
    return [
        (timed(a, repeats, warm_up)["median_ms"], timed(b, repeats, warm_up)["median_ms"]) for _ in range(runs)
    ]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Least, median and most."""
    ordered = sorted(values)
    return " ".join(f"{v:.{digits}f}" for v in (ordered[0], ordered[len(ordered) // 2], ordered[-1]))


def command(*args: str, repeats: int = 7) -> dict[str, float]:
    """`timed` of a Python command line in a process of its own."""
    return timed(lambda: subprocess.run([sys.executable, *args], check=True, capture_output=True), repeats, 2)


def machine() -> dict[str, Any]:
    """Processor, cores, memory and versions."""
    import torch

    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags"))
        model += " with AMX" if "amx_bf16" in flags else ""
    except (OSError, StopIteration):
        pass
    return {
        "processor": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
