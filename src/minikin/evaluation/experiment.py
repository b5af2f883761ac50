"""Experiment driver: cells of images, generated once, scored, and resumed after an interruption.

A cell is the images of one prompt with consecutive seeds, all generated in the same way. `sweep` and `compare`
say which cells there are and what their numbers mean; this module generates, stores, times and scores them.

    OUT/images/       images, named by a hash of everything they depend on
    OUT/cache.jsonl   scores of cells, seconds of an image

The caller supplies the painter, so that the module knows neither a base nor its lock.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from minikin.errors import BadRecipe, extra
from minikin.evaluation.cache import Cache, key
from minikin.evaluation.encoders import Encoder, require_text_encoder
from minikin.evaluation.scores import ImageScores, References, score_images
from minikin.events import Progress
from minikin.files import atomic_write
from minikin.images.encode import MARKED, save_image
from minikin.recipes import Paint

BATCH = 8  # images of one cell per batch
THUMBNAIL = 256  # px, the longer side at most

Painter = Callable[[Paint], Sequence[Image.Image]]
# a painter with these trained results active at this strength
Activate = Callable[[Sequence[Any], float], AbstractContextManager[Painter]]


@dataclass(frozen=True)
class Cell:
    """Images of one prompt with the seeds recipe.seed ... recipe.seed + recipe.n - 1.

    recipe        prompt, seeds, preset, guidance, ...
    dependencies  everything else the images depend on, as JSON: hashes of base, concept and adapters
    results       trained results that are active while the cell is generated, at `strength`
    label         description for progress events
    """

    recipe: Paint
    dependencies: Any
    results: tuple[Any, ...] = ()
    strength: float = 1.0
    label: str = ""

    @cached_property
    def key(self) -> str:
        """Hash of everything the images depend on."""
        recipe = self.recipe.model_dump(mode="json", exclude={"base", "batch", "device", "dtype"})
        return key(self.dependencies, recipe)


class Evaluator:
    """Scores images by one encoder against the subject's photos and the run's plain prompts."""

    def __init__(self, encoder: Encoder, references: References, plain_prompts: Sequence[str]) -> None:
        self.encoder, self.references = encoder, references
        self.texts = encoder.encode_texts(plain_prompts)
        photos = [v for v in (references.photos, references.held_out) if v is not None]
        self.key = key(encoder.card.digest, list(plain_prompts), [_digest(v) for v in photos])

    def __call__(self, images: Sequence[Image.Image]) -> list[ImageScores]:
        return score_images(self.encoder, images, self.texts, self.references)


class Experiment:
    """Cells of one output folder; every cell is generated once, however often the run is interrupted.

    thumbnails  store small JPEGs instead of whole PNGs; scores are always those of the whole images
    """

    def __init__(self, folder: Path, activate: Activate, *, thumbnails: bool = False) -> None:
        self.images_folder, self.activate, self.thumbnails = folder / "images", activate, thumbnails
        self.cache = Cache(folder / "cache.jsonl")
        self.generated = 0  # cells, in this process

    def paths(self, cell: Cell) -> list[Path]:
        """Files of a cell's images, in the order of their seeds, whether they exist or not."""
        suffix = "jpg" if self.thumbnails else "png"
        return [self.images_folder / f"{cell.key}-{k}.{suffix}" for k in range(cell.recipe.n)]

    def stored(self, cell: Cell) -> bool:
        """Whether all images exist. Otherwise the whole cell is generated: its images share a batch."""
        return all(path.is_file() for path in self.paths(cell))

    def generate(self, cells: Sequence[Cell], stage: str) -> Generator[Progress, None, None]:
        """Generate and store the missing images; results are activated once for all cells that share them."""
        groups: dict[Any, list[Cell]] = {}
        for cell in cells:
            groups.setdefault((*map(id, cell.results), cell.strength), []).append(cell)
        done, total = 0, sum(cell.recipe.n for cell in cells)
        for group in groups.values():
            with ExitStack() as stack:
                painter: Painter | None = None
                for cell in group:
                    if not self.stored(cell):
                        painter = painter or stack.enter_context(self.activate(cell.results, cell.strength))
                        self._store(cell, self._paint(cell, painter))
                    done += cell.recipe.n
                    yield Progress(stage, done, total, cell.label)

    def scores(self, cell: Cell, evaluator: Evaluator, *, store: bool = False) -> tuple[ImageScores, ...]:
        """Scores of a cell's images, from the cache where they are known.

        store  keep the images, too
        """
        cached = self.cache.get(cell.key, evaluator.key)
        if cached and not (store and not self.stored(cell)):
            return cached
        with self.activate(cell.results, cell.strength) as painter:
            images = self._paint(cell, painter)
        if store:
            self._store(cell, images)
        scores = tuple(evaluator(images))
        self.cache.put(cell.key, evaluator.key, scores)
        return scores

    def seconds_per_image(self, name: str, cells: Sequence[Cell], run: Callable[[Cell], object]) -> float:
        """Seconds of one image in the last of these cells, measured once; the cells before it warm up.

        name  what the time depends on
        run   generates a cell
        """
        seconds = self.cache.number(f"seconds {name}")
        if seconds is None:
            for cell in cells:
                before, started = self.generated, time.perf_counter()
                run(cell)
                if self.generated == before:  # stored by a run that was killed before it noted the time
                    with self.activate(cell.results, cell.strength) as painter:
                        self._paint(cell, painter)
                seconds = (time.perf_counter() - started) / cell.recipe.n
            assert seconds is not None
            self.cache.put_number(f"seconds {name}", seconds)
        return seconds

    def _paint(self, cell: Cell, painter: Painter) -> Sequence[Image.Image]:
        images = painter(cell.recipe)
        self.generated += 1
        return images

    def _store(self, cell: Cell, images: Sequence[Image.Image]) -> None:
        for image, path in zip(images, self.paths(cell), strict=True):
            if self.thumbnails:
                atomic_write(path, jpeg(image, THUMBNAIL))
            else:
                save_image(image, path)


def check(encoder: Encoder) -> None:
    """Raises BadRecipe, before anything is generated, without a text encoder or without matplotlib."""
    require_text_encoder(encoder)
    if find_spec("matplotlib") is None:
        raise BadRecipe(f"Drawings need matplotlib, which is not installed. Install it: {extra('evaluation')}.")


def open_images(paths: Sequence[Path]) -> list[Image.Image]:
    """Stored images as RGB."""
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    return images


def jpeg(image: Image.Image, side: int) -> bytes:
    """An image as a small JPEG whose longer side is at most `side` px."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return MARKED.encode(small, "JPEG", quality=92)


def _digest(vectors: Tensor) -> str:
    return hashlib.sha256(vectors.float().contiguous().numpy().tobytes()).hexdigest()[:16]
