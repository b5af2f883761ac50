"""TensorBoard writer for the metrics log, where TensorBoard is installed; it is never needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def writer(folder: Path) -> Callable[[Mapping[str, Any]], None] | None:
    """A function that writes a row of the metrics log as scalars of its step; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    summary = SummaryWriter(str(folder))

    def write(row: Mapping[str, Any]) -> None:
        for name, value in {**row, **row.get("evaluation", {})}.items():
            if isinstance(value, int | float) and name != "step":
                summary.add_scalar(name, value, row.get("step", 0))
        summary.flush()

    return write
