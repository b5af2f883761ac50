"""Arrays of rows in numbered .npy files, memory mapped, written in any order and by any process.

Files are written atomically, so a killed build keeps its finished files. manifest.json records what the
rows were made from; a folder with rows made from something else is refused.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minikin.errors import AssetError, BadRecipe
from minikin.files import atomic_write


class Shards:
    """At least `total` rows in files of `size` rows each.

    facts  what the rows are made from; JSON
    Raises BadRecipe when the folder holds rows made from something else.
    """

    def __init__(self, folder: Path, total: int, size: int, facts: Mapping[str, Any]) -> None:
        self.folder, self.size = folder, size
        self.files = -(-total // size)
        facts = {**facts, "size": size}
        manifest = folder / "manifest.json"
        if manifest.exists():
            theirs = _read(manifest)
            differ = [k for k in {**theirs, **facts} if theirs.get(k) != facts.get(k)]
            if differ:
                k = differ[0]
                raise BadRecipe(
                    f"{folder} was made from something else: {k} is {theirs.get(k)} there and {facts.get(k)} "
                    "now. Delete the folder to make it anew, or choose another --out."
                )
        else:
            atomic_write(manifest, json.dumps(facts, indent=1).encode())

    def __len__(self) -> int:
        return self.files * self.size

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.npy"

    def missing(self) -> list[int]:
        return [i for i in range(self.files) if not self.path(i).exists()]

    def complete(self, stage: str) -> Shards:
        """Self, when no file is missing. Raises BadRecipe that names the stage which writes them."""
        if missing := self.missing():
            raise BadRecipe(
                f"{self.folder} lacks {len(missing)} of its {self.files} files. Run --stage {stage} first; it "
                "resumes where it stopped."
            )
        return self

    def shard(self, number: int) -> np.ndarray:
        """The rows of one file, memory mapped. Raises AssetError when it is missing or damaged."""
        path = self.path(number)
        try:
            rows: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise AssetError(
                f"{path} cannot be read ({type(e).__name__}: {e}). Delete this one file and run its stage "
                "again; only that file is made anew."
            ) from e
        if len(rows) != self.size:
            raise AssetError(f"{path} has {len(rows)} rows instead of {self.size}. Delete it; it is made anew.")
        return rows

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        return [self.shard(i) for i in range(self.files)]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """The rows with these indices, copied and stacked."""
        return np.stack([self._maps[i // self.size][i % self.size] for i in rows.tolist()])

    def all(self) -> np.ndarray:
        """All rows in memory."""
        return np.concatenate(self._maps)


def write(path: Path, rows: np.ndarray) -> None:
    """Raises StorageError."""
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    atomic_write(path, buffer.getvalue())


def _read(manifest: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(manifest.read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise AssetError(f"{manifest} cannot be read ({e}). Delete its folder to make it anew.") from e
