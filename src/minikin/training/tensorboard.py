"""The log's numbers for TensorBoard, where that is installed; it is never needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def board(folder: Path) -> Callable[[Mapping[str, Any]], None] | None:
    """Writes a line of the log as scalars of its step; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    writer = SummaryWriter(str(folder))

    def write(row: Mapping[str, Any]) -> None:
        for name, value in {**row, **row.get("evaluation", {})}.items():
            if isinstance(value, int | float) and name != "step":
                writer.add_scalar(name, value, row.get("step", 0))
        writer.flush()

    return write
