"""What was seen in images already painted: one JSON object a line, only ever added to.

A line is the images of one setting, prompt and row of seeds, and what one judge saw in them. The key
is a hash of everything the images depend on, the eye one of everything the scores depend on. A line is
on the disk before the next image is begun; one that was torn by a crash is dropped when the file
is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minikin.errors import StorageError
from minikin.files import atomic_write


@dataclass(frozen=True)
class Seen:
    """What a judge sees in one image.

    likeness, held_out  mean cosine with the photos, and with those that teaching was not shown
    fits                cosine with the plain text of every prompt of the sweep
    """

    likeness: float
    held_out: float | None
    fits: tuple[float, ...]


class Cache:
    """Scores by key and eye, and a few numbers by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: dict[tuple[str, str], tuple[Seen, ...]] = {}
        self._numbers: dict[str, float] = {}
        data = path.read_bytes() if path.is_file() else b""
        whole, _, torn = data.rpartition(b"\n")
        if torn:
            atomic_write(path, whole + b"\n" if whole else b"")
        for line in whole.splitlines():
            self._take(line)

    def __len__(self) -> int:
        return len(self._seen)

    def get(self, key: str, eye: str) -> tuple[Seen, ...] | None:
        return self._seen.get((key, eye))

    def put(self, key: str, eye: str, seen: Sequence[Seen]) -> None:
        """Raises StorageError; what was there before survives."""
        self._seen[key, eye] = tuple(seen)
        self._append({"key": key, "eye": eye, "seen": [[s.likeness, s.held_out, s.fits] for s in seen]})

    def number(self, name: str) -> float | None:
        return self._numbers.get(name)

    def keep(self, name: str, value: float) -> None:
        """Raises StorageError."""
        self._numbers[name] = value
        self._append({"number": name, "value": value})

    def _take(self, line: bytes) -> None:
        try:
            row: dict[str, Any] = json.loads(line)
            if "number" in row:
                self._numbers[str(row["number"])] = float(row["value"])
                return
            seen = tuple(Seen(a, b, tuple(fits)) for a, b, fits in row["seen"])
            self._seen[str(row["key"]), str(row["eye"])] = seen
        except (ValueError, KeyError, TypeError):
            return  # a damaged line is painted again

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
                "command again; what was painted before is kept."
            ) from e


def key(*parts: Any) -> str:
    """24 hexadecimal digits that stand for these JSON values."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
