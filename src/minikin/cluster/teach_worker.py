"""The task of one concept: teach it, or resume it, and write its file.

Teaching gives the same bits wherever it is resumed, so that a worker that was believed dead and comes back late
writes the same file as its successor.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from minikin import events
from minikin.cluster.concept_table import Row
from minikin.cluster.prompts import failure
from minikin.errors import MinikinError, StorageError
from minikin.files import atomic_write, sweep_orphans
from minikin.images.encode import save_image
from minikin.images.photos import load_photos
from minikin.perfusion.concept_file import to_bytes
from minikin.studio import Studio

PARTS = ".fleet"  # below the out folder: states, checkpoints, masks


class Task(NamedTuple):
    """One concept and the folder it goes to."""

    row: Row
    out: Path

    @property
    def file(self) -> Path:
        return self.out / f"{self.row.recipe.name}.safetensors"

    @property
    def state(self) -> Path:
        return self.out / PARTS / f"{self.row.recipe.name}.json"

    def done(self) -> dict[str, Any] | None:
        """The saved state of a concept that was taught from exactly this row; None when there is none."""
        try:
            state: dict[str, Any] = json.loads(self.state.read_text())
            same = state["asked"] == self.row.source_digest
            return state if same and state["sha256"] == _sha256(self.file.read_bytes()) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def teach(task: Task) -> dict[str, Any]:
    """Teach one concept; returns its state, or `error`. Raises StorageError, which the next would meet, too."""
    recipe = task.row.recipe
    folder = task.out / PARTS / recipe.name
    checkpoint = folder / f"{task.row.source_digest[:16]}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.safetensors"):
            if old != checkpoint:
                old.unlink(missing_ok=True)
        sweep_orphans(folder)
        studio = _studio(recipe.base, recipe.device, recipe.dtype).beside()
        resumed = checkpoint.exists()
        done = None
        for event in studio.teaching(
            load_photos(task.row.photos), recipe, checkpoint=checkpoint, resume=resumed
        ):  # fmt: skip
            if isinstance(event, events.ImageReady):
                save_image(event.image, folder / f"{event.caption}.png")
            elif isinstance(event, events.Done):
                done = event
        assert done is not None
        data = to_bytes(done.result, int8=recipe.int8)
        atomic_write(task.file, data)
        state = {
            "asked": task.row.source_digest, "sha256": _sha256(data), "bytes": len(data), "resumed": resumed,
            **{k: done.facts[k] for k in ("steps", "best_step", "seconds")},
        }  # fmt: skip
        atomic_write(task.state, json.dumps(state).encode())
        checkpoint.unlink(missing_ok=True)
        return state
    except OSError as e:
        raise StorageError(f"{folder} cannot be used: {e.strerror}.") from e
    except MinikinError as e:
        if isinstance(e, StorageError):
            raise
        return {"error": failure(e)}


@lru_cache(1)
def _studio(base: str, device: str | None, dtype: str | None) -> Studio:
    """Opened once per process."""
    return Studio.open(base, device=device, dtype=dtype)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
