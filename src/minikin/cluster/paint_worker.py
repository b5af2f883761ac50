"""The worker for chunks of prompts: generates them in batches, into files named by content.

The batches of a chunk depend on the chunk alone, not on what was done before or on the worker, so that an image
has the same bytes wherever and whenever it is generated. A batch whose images all exist is skipped.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from minikin.cluster.prompts import PromptLine, failure
from minikin.errors import BadConceptFile, MinikinError, OutOfMemory, StorageError
from minikin.files import atomic_new, read_small
from minikin.images.encode import MARKED
from minikin.perfusion.concept import Concept
from minikin.perfusion.concept_file import from_bytes
from minikin.perfusion.strict_safetensors import MAX_FILE
from minikin.recipes import Paint
from minikin.server import image_metadata
from minikin.server.engine import Engine, PinnedConcept, PreparedRequest, Row

ADDRESS = 1  # version of the addresses
MAX_CONCEPTS = 512  # concepts in a worker's memory; about 100 KB each

log = logging.getLogger(__name__)
EngineFactory = Callable[[], Engine]


def studio_engine(base: str, device: str | None = None, dtype: str | None = None) -> Engine:
    """Open a base as the engine of a worker or a replica."""
    from minikin.server.studio_engine import StudioEngine
    from minikin.studio import Studio

    return StudioEngine(Studio.open(base, device=device, dtype=dtype))


@dataclass(frozen=True)
class PlannedImage:
    """One image to generate: its line in the file, and its address."""

    line: int
    prepared: PreparedRequest
    seed: int
    address: str

    @property
    def file(self) -> str:
        return f"{self.address[:2]}/{self.address}.png"


class ChunkResult(NamedTuple):
    """A chunk's records for the run log, how many images are new, and the base's fingerprint."""

    records: list[dict[str, Any]]
    new: int
    fingerprint: str


class PaintWorker:
    """Generates chunks into a folder that all workers share; runs in a `pool.ActorPool`."""

    def __init__(self, open_engine: EngineFactory, out: Path, batch: int) -> None:
        self.engine, self.out, self.batch = open_engine(), out, batch
        self._concepts: OrderedDict[str, Concept] = OrderedDict()
        self._images: dict[str, dict[str, Any]] = {}
        self._failed: dict[str, dict[str, str]] = {}

    def work(self, chunk: Sequence[PromptLine]) -> ChunkResult:
        """Generate the missing images of a chunk. Raises StorageError."""
        errors: dict[int, dict[str, str]] = {}
        planned: list[PlannedImage] = []
        for line in chunk:
            try:
                planned += self._planned(line)
            except StorageError:
                raise
            except Exception as e:
                errors[line.number] = _failure(e, line.number)
        count = 0
        self._images, self._failed = {}, {}
        for batch in self._batches(planned):
            if all((self.out / image.file).is_file() for image in batch):
                continue
            count += self._paint(batch, errors)
        records = []
        for line in chunk:
            head = {"line": line.number, "id": line.id, "asked": line.digest}
            images = [image for image in planned if image.line == line.number]
            error = line.error or errors.get(line.number)
            error = error or next((self._failed[w.address] for w in images if w.address in self._failed), None)
            result = {"error": error} if error else {"pictures": self._records(images)}  # word: key of the file
            records.append({**head, **result})
        return ChunkResult(records, count, self.engine.describe()["base"]["fingerprint"])

    def _planned(self, line: PromptLine) -> list[PlannedImage]:
        if line.recipe is None:
            return []
        pinned = {name: self._pinned(name, *where) for name, where in line.concepts.items()}
        recipe: Paint = Paint.make(**line.recipe)
        planned = []
        for seed in range(recipe.seed, recipe.seed + recipe.n):
            single = recipe.model_copy(update={"seed": seed, "n": 1})
            prepared = self.engine.prepare("paint", single, pinned)
            facts = {"address": ADDRESS, "seed": seed, "made": self.engine.facts(prepared)}
            text = json.dumps(facts, sort_keys=True, default=str)
            planned.append(PlannedImage(line.number, prepared, seed, hashlib.sha256(text.encode()).hexdigest()))
        return planned

    def _pinned(self, name: str, path: str, sha256: str) -> PinnedConcept:
        """The concept with this content, under this name. Raises BadConceptFile."""
        if sha256 not in self._concepts:
            try:
                data = read_small(Path(path), MAX_FILE)
            except OSError as e:
                raise BadConceptFile(
                    f"This worker cannot read {path} ({e.strerror}). Keep concepts in a folder that all "
                    "machines share, and name it with --concepts."
                ) from e
            if data is None or hashlib.sha256(data).hexdigest() != sha256:
                raise BadConceptFile(f"{path} changed while the run went on. Run it again.")
            self._concepts[sha256] = from_bytes(data, f"concept '{name}'")
            while len(self._concepts) > MAX_CONCEPTS:
                self._concepts.popitem(last=False)
        self._concepts.move_to_end(sha256)
        concept = self._concepts[sha256]
        return PinnedConcept(sha256, concept if concept.name == name else replace(concept, name=name))

    def _batches(self, planned: Sequence[PlannedImage]) -> list[list[PlannedImage]]:
        """Batches of compatible images, in the order of the lines; each image once."""
        groups: dict[Hashable, list[PlannedImage]] = {}
        for image in {w.address: w for w in reversed(planned)}.values():
            groups.setdefault(image.prepared.group, []).append(image)
        for group in groups.values():
            group.reverse()
        return [g[i : i + self.batch] for g in groups.values() for i in range(0, len(g), self.batch)]

    def _paint(self, batch: Sequence[PlannedImage], errors: dict[int, dict[str, str]]) -> int:
        """Generate and save a batch; errors go into `errors`. Returns how many images are new."""
        try:
            images = self.engine.paint([Row(w.prepared, w.seed) for w in batch], _ignore_step)
        except Exception as e:
            if len(batch) > 1:
                half = len(batch) // 2 if isinstance(e, OutOfMemory) else 1
                return sum(self._paint(batch[i : i + half], errors) for i in range(0, len(batch), half))
            self._failed[batch[0].address] = errors[batch[0].line] = _failure(e, batch[0].line)
            return 0
        return sum(self._keep(w, image) for w, image in zip(batch, images, strict=True))

    def _keep(self, planned: PlannedImage, image: Image.Image) -> bool:
        """Write an image; False when it existed already."""
        info, _ = image_metadata.image_texts(
            self.engine.facts(planned.prepared), planned.prepared.recipe, image, planned.seed
        )
        data = MARKED.encode(image, info=info)
        new = atomic_new(self.out / planned.file, data)
        if new:
            self._images[planned.address] = _record(data)
        return new

    def _records(self, planned: Sequence[PlannedImage]) -> list[dict[str, Any]]:
        records = []
        for image in planned:
            if image.address not in self._images:
                self._images[image.address] = _record((self.out / image.file).read_bytes())
            records.append({"seed": image.seed, "file": image.file, **self._images[image.address]})
        return records


def _record(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _failure(e: Exception, line: int) -> dict[str, str]:
    if not isinstance(e, MinikinError):
        log.error("line %d", line, exc_info=e)
    return failure(e)


def _ignore_step(done: int, preview: Any) -> None:
    """No progress within an image of a large run."""
