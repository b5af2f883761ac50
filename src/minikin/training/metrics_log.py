"""What a training run writes down: one JSON object a line, and the learning curve drawn from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minikin.errors import StorageError
from minikin.files import atomic_write


class Journal:
    """An append-only log; torn last lines of a killed run are ignored."""

    def __init__(self, path: Path, *, silent: bool = False) -> None:
        self.path, self.silent = path, silent
        self.also: Callable[[Mapping[str, Any]], None] | None = None  # told every line too

    def write(self, **values: Any) -> None:
        """Raises StorageError."""
        if self.silent:
            return
        if self.also:
            self.also(values)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as f:
                f.write(json.dumps(values) + "\n")
        except OSError as e:
            raise StorageError(
                f"{self.path} was not written: {e.strerror or e}. Free some space; the last checkpoint stands."
            ) from e

    def rows(self) -> list[dict[str, Any]]:
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def rewind(self, step: int) -> None:
        """Forget lines after `step`: what a run wrote after its last checkpoint comes again."""
        rows = [] if self.silent else self.rows()
        kept = [r for r in rows if r.get("step", 0) <= step]
        if len(kept) < len(rows):
            atomic_write(self.path, "".join(json.dumps(r) + "\n" for r in kept).encode())


def curve(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw every logged loss and every evaluated value over the examples seen, as a PNG.

    Does nothing when matplotlib is not installed: it is wanted for building only.
    """
    import io

    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    skip = {"step", "seen", "seconds", "rate", "speed", "norm", "evaluation", "device"}
    lines: dict[str, list[tuple[float, float]]] = {}
    tests: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for k, v in row.items():
            if k not in skip:
                lines.setdefault(k, []).append((row["seen"], v))
        for k, v in row.get("evaluation", {}).items():
            tests.setdefault(k, []).append((row["seen"], v))
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axis, group, mark, name in zip(
        figure.subplots(1, 2), (lines, tests), ("-", "o-"), ("training", "held out"), strict=True
    ):
        for k, points in group.items():
            axis.plot(*zip(*points, strict=True), mark, label=k, linewidth=1, markersize=3)
        axis.set(xlabel="examples seen", title=f"{title}: {name}")
        axis.grid(alpha=0.3)
        if group:
            axis.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    atomic_write(path, buffer.getvalue())
