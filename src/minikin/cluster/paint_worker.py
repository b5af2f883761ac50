"""What a worker does with a chunk of prompts: batches of whatever goes together, files named by content.

The batches of a chunk follow from the chunk alone, not from what was done before or from who paints, so that
an image has the same bytes whoever paints it, whenever. A batch all of whose images are there is left out.
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

from minikin.cluster.prompts import Line, failure
from minikin.errors import BadConceptFile, MinikinError, OutOfMemory, StorageError
from minikin.files import atomic_new, read_small
from minikin.images.encode import MARKED
from minikin.perfusion.concept import Concept
from minikin.perfusion.concept_file import from_bytes
from minikin.perfusion.strict_safetensors import MAX_FILE
from minikin.recipes import Paint
from minikin.server import image_metadata
from minikin.server.engine import Engine, Pinned, Prepared, Row

ADDRESS = 1  # the form of addresses
KEPT = 512  # concepts in a worker's memory; about 100 KB each

log = logging.getLogger(__name__)
Opening = Callable[[], Engine]


def studio_engine(base: str, device: str | None = None, dtype: str | None = None) -> Engine:
    """The engine that paints with a base."""
    from minikin.server.studio_engine import StudioEngine
    from minikin.studio import Studio

    return StudioEngine(Studio.open(base, device=device, dtype=dtype))


@dataclass(frozen=True)
class Wanted:
    """One image: the line it is of, and where it will be."""

    line: int
    prepared: Prepared
    seed: int
    address: str

    @property
    def file(self) -> str:
        return f"{self.address[:2]}/{self.address}.png"


class Painted(NamedTuple):
    """A chunk's records for the manifest, how many images are new, and what base painted them."""

    records: list[dict[str, Any]]
    new: int
    fingerprint: str


class Painter:
    """Paints chunks into a folder that all workers share. See `cluster.Crew`."""

    def __init__(self, opening: Opening, out: Path, batch: int) -> None:
        self.engine, self.out, self.batch = opening(), out, batch
        self._concepts: OrderedDict[str, Concept] = OrderedDict()
        self._images: dict[str, dict[str, Any]] = {}
        self._failed: dict[str, dict[str, str]] = {}

    def work(self, chunk: Sequence[Line]) -> Painted:
        """Paint what is not there of a chunk. Raises StorageError."""
        wrong: dict[int, dict[str, str]] = {}
        wanted: list[Wanted] = []
        for line in chunk:
            try:
                wanted += self._wanted(line)
            except StorageError:
                raise
            except Exception as e:
                wrong[line.number] = _told(e, line.number)
        painted = 0
        self._images, self._failed = {}, {}
        for batch in self._batches(wanted):
            if all((self.out / one.file).is_file() for one in batch):
                continue
            painted += self._paint(batch, wrong)
        records = []
        for line in chunk:
            head = {"line": line.number, "id": line.id, "asked": line.asked}
            mine = [one for one in wanted if one.line == line.number]
            error = line.error or wrong.get(line.number)
            error = error or next((self._failed[w.address] for w in mine if w.address in self._failed), None)
            records.append({**head, **({"error": error} if error else {"pictures": self._records(mine)})})
        return Painted(records, painted, self.engine.describe()["base"]["fingerprint"])

    def _wanted(self, line: Line) -> list[Wanted]:
        if line.recipe is None:
            return []
        pinned = {name: self._pinned(name, *where) for name, where in line.concepts.items()}
        recipe: Paint = Paint.make(**line.recipe)
        found = []
        for seed in range(recipe.seed, recipe.seed + recipe.n):
            one = recipe.model_copy(update={"seed": seed, "n": 1})
            prepared = self.engine.prepare("paint", one, pinned)
            facts = {"address": ADDRESS, "seed": seed, "made": self.engine.facts(prepared)}
            told = json.dumps(facts, sort_keys=True, default=str)
            found.append(Wanted(line.number, prepared, seed, hashlib.sha256(told.encode()).hexdigest()))
        return found

    def _pinned(self, name: str, path: str, sha256: str) -> Pinned:
        """This content, under this name. Raises BadConceptFile."""
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
            while len(self._concepts) > KEPT:
                self._concepts.popitem(last=False)
        self._concepts.move_to_end(sha256)
        concept = self._concepts[sha256]
        return Pinned(sha256, concept if concept.name == name else replace(concept, name=name))

    def _batches(self, wanted: Sequence[Wanted]) -> list[list[Wanted]]:
        """What goes together, in the order of the lines; the same image once."""
        groups: dict[Hashable, list[Wanted]] = {}
        for one in {w.address: w for w in reversed(wanted)}.values():
            groups.setdefault(one.prepared.group, []).append(one)
        for group in groups.values():
            group.reverse()
        return [g[i : i + self.batch] for g in groups.values() for i in range(0, len(g), self.batch)]

    def _paint(self, batch: Sequence[Wanted], wrong: dict[int, dict[str, str]]) -> int:
        """Paint and keep a batch; what cannot be painted is `wrong`. Returns how many images are new."""
        try:
            images = self.engine.paint([Row(w.prepared, w.seed) for w in batch], _unseen)
        except Exception as e:
            if len(batch) > 1:
                half = len(batch) // 2 if isinstance(e, OutOfMemory) else 1
                return sum(self._paint(batch[i : i + half], wrong) for i in range(0, len(batch), half))
            self._failed[batch[0].address] = wrong[batch[0].line] = _told(e, batch[0].line)
            return 0
        return sum(self._keep(w, image) for w, image in zip(batch, images, strict=True))

    def _keep(self, one: Wanted, image: Image.Image) -> bool:
        """Write an image; False when there was one already."""
        info, _ = image_metadata.inside(self.engine.facts(one.prepared), one.prepared.recipe, image, one.seed)
        data = MARKED.encode(image, info=info)
        new = atomic_new(self.out / one.file, data)
        if new:
            self._images[one.address] = _record(data)
        return new

    def _records(self, wanted: Sequence[Wanted]) -> list[dict[str, Any]]:
        found = []
        for one in wanted:
            if one.address not in self._images:
                self._images[one.address] = _record((self.out / one.file).read_bytes())
            found.append({"seed": one.seed, "file": one.file, **self._images[one.address]})
        return found


def _record(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _told(e: Exception, line: int) -> dict[str, str]:
    if not isinstance(e, MinikinError):
        log.error("line %d", line, exc_info=e)
    return failure(e)


def _unseen(done: int, preview: Any) -> None:
    """Nobody looks at the steps of an image among a million."""
