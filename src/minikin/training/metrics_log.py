"""Metrics log of a training run, one JSON object per line, and the learning curve drawn from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minikin.errors import StorageError
from minikin.files import atomic_write

NOT_LOSSES = {"step", "seen", "seconds", "lr", "rate", "speed", "norm", "evaluation", "device"}


class MetricsLog:
    """An append-only log; an incomplete last line of a killed run is ignored.

    path    None writes nothing
    writer  called with every row, too: `tensorboard.writer`
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.writer: Callable[[Mapping[str, Any]], None] | None = None

    def write(self, **values: Any) -> None:
        """Append a row. Raises StorageError."""
        if self.path is None:
            return
        if self.writer:
            self.writer(values)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as f:
                f.write(json.dumps(values) + "\n")
        except OSError as e:
            raise StorageError(
                f"{self.path} was not written: {e.strerror or e}. Free some space; the last checkpoint stands."
            ) from e

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path and self.path.exists() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`: what a run wrote after its last checkpoint comes again."""
        rows = self.rows()
        before = [r for r in rows if r.get("step", 0) <= step]
        if self.path and len(before) < len(rows):
            atomic_write(self.path, "".join(json.dumps(r) + "\n" for r in before).encode())


def curve(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw every logged loss and every evaluated value over the examples seen, as a PNG.

    Does nothing when matplotlib is not installed: only those who train tiny need it.
    """
    import io

    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    losses: dict[str, list[tuple[float, float]]] = {}
    evaluations: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for k, v in row.items():
            if k not in NOT_LOSSES:
                losses.setdefault(k, []).append((row["seen"], v))
        for k, v in row.get("evaluation", {}).items():
            evaluations.setdefault(k, []).append((row["seen"], v))
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axis, lines, mark, name in zip(
        figure.subplots(1, 2), (losses, evaluations), ("-", "o-"), ("training", "held out"), strict=True
    ):
        for k, points in lines.items():
            axis.plot(*zip(*points, strict=True), mark, label=k, linewidth=1, markersize=3)
        axis.set(xlabel="examples seen", title=f"{title}: {name}")
        axis.grid(alpha=0.3)
        if lines:
            axis.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    atomic_write(path, buffer.getvalue())
