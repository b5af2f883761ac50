"""Append-only cache of an experiment: scores of cells, and a few numbers by name, one JSON object a line.

A line holds the scores of one cell's images by one encoder. Lines are keyed by a hash of everything the images
depend on and by a hash of everything the scores depend on besides. A line is on disk before the next cell is
generated; a line torn by a crash is dropped when the file is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minikin.errors import StorageError
from minikin.evaluation.scores import ImageScores
from minikin.files import atomic_write


class Cache:
    """Scores by key of the cell and of the evaluator, and numbers by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._scores: dict[tuple[str, str], tuple[ImageScores, ...]] = {}
        self._numbers: dict[str, float] = {}
        data = path.read_bytes() if path.is_file() else b""
        whole, _, torn = data.rpartition(b"\n")
        if torn:
            atomic_write(path, whole + b"\n" if whole else b"")
        for line in whole.splitlines():
            self._read(line)

    def __len__(self) -> int:
        return len(self._scores)

    def get(self, cell: str, evaluator: str) -> tuple[ImageScores, ...] | None:
        return self._scores.get((cell, evaluator))

    def put(self, cell: str, evaluator: str, scores: Sequence[ImageScores]) -> None:
        """Raises StorageError; earlier lines survive."""
        self._scores[cell, evaluator] = tuple(scores)
        rows = [[s.subject_fidelity, s.held_out, s.alignments] for s in scores]
        self._append({"cell": cell, "evaluator": evaluator, "scores": rows})

    def number(self, name: str) -> float | None:
        return self._numbers.get(name)

    def put_number(self, name: str, value: float) -> None:
        """Raises StorageError."""
        self._numbers[name] = value
        self._append({"number": name, "value": value})

    def _read(self, line: bytes) -> None:
        try:
            row: dict[str, Any] = json.loads(line)
            if "number" in row:
                self._numbers[str(row["number"])] = float(row["value"])
                return
            scores = tuple(ImageScores(a, b, tuple(alignments)) for a, b, alignments in row["scores"])
            self._scores[str(row["cell"]), str(row["evaluator"])] = scores
        except (ValueError, KeyError, TypeError):
            return  # the cell of a damaged line is generated again

    def _append(self, row: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as f:
                f.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            raise StorageError(
                f"{self.path} was not written: {e.strerror or e}. Free some space and run the same "
                "command again; images generated so far are kept."
            ) from e


def key(*parts: Any) -> str:
    """24 hexadecimal digits of a hash of these JSON values."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
