"""Fake engine: no diffusion; every image encodes its request, so that any mix-up between requests is detected.

An image is a grid of 8 x 8 blocks of one grey level each: a digest of the prompt, the concepts' contents and
the seed. PNG keeps them exactly; `read` decodes an image, `digest` computes what it must say. A batch takes a
fixed time per step, like a GPU.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from PIL import Image

from minikin import events
from minikin.errors import UnknownName
from minikin.events import Event
from minikin.recipes import Paint, Recipe
from minikin.server.engine import Concepts, JobInputs, OnStep, PreparedRequest, Row

SIDE, CELLS = 64, 8
BYTES = CELLS * CELLS


def digest(prompt: str, negative: str, concepts: Mapping[str, str], seed: int) -> bytes:
    """The bytes an image of this request must encode; concepts are contents by name."""
    text = repr((prompt, negative, sorted(concepts.items()), seed)).encode()
    return hashlib.sha512(text).digest()[:BYTES]


def draw(data: bytes, size: tuple[int, int]) -> Image.Image:
    """The bytes as grey blocks."""
    return Image.frombytes("L", (CELLS, CELLS), data).resize(size, Image.Resampling.NEAREST).convert("RGB")


def read(image: Image.Image) -> bytes:
    """The bytes an image encodes."""
    w, h = image.size
    grey = image.convert("L")
    return bytes(
        int(grey.getpixel((int((x + 0.5) * w / CELLS), int((y + 0.5) * h / CELLS))))  # type: ignore[arg-type]
        for y in range(CELLS) for x in range(CELLS)
    )  # fmt: skip


class FakeEngine:
    """A `server.engine.Engine`.

    step_s      seconds per step of a batch, however many rows it has
    errors      raised by `paint` for prompts that contain the key
    batch_size  images at once
    """

    name, side = "fake", SIDE

    def __init__(
        self, step_s: float = 0.0, steps: int = 4, errors: Mapping[str, Exception] | None = None,
        batch_size: int = 8,
    ) -> None:  # fmt: skip
        self.step_s, self.steps, self.errors, self.batch_size = step_s, steps, dict(errors or {}), batch_size
        self.batches: list[int] = []
        self.steps_done = 0
        self.go = threading.Event()  # clear it to keep every batch at its present step
        self.go.set()
        self._lock = threading.Lock()

    def prepare(
        self, kind: str, recipe: Recipe, concepts: Concepts, inputs: JobInputs | None = None
    ) -> PreparedRequest:
        width = getattr(recipe, "width", None) or SIDE
        height = getattr(recipe, "height", None) or SIDE
        steps = getattr(recipe, "steps", None) or self.steps
        if getattr(recipe, "preset", None) == "unknown":
            raise UnknownName("preset", "unknown", ["quality", "turbo"])
        group = (width, height, steps) if kind == "paint" else None
        return PreparedRequest(recipe, concepts, group, steps, width * height)

    def paint(self, rows: Sequence[Row], on_step: OnStep) -> list[Image.Image]:
        with self._lock:
            self.batches.append(len(rows))
            for row in rows:
                for word, error in self.errors.items():
                    if word in _prompt(row):
                        raise error
            images = [_image(row) for row in rows]
            for step in range(rows[0].prepared.steps):
                while not self.go.wait(0.01):
                    on_step(step, lambda i: images[i])
                time.sleep(self.step_s)
                self.steps_done += 1
                on_step(step + 1, lambda i: images[i])
            return images

    def check(self) -> None:
        pass

    def max_batch(self, prepared: PreparedRequest) -> int:
        return self.batch_size

    def run(self, kind: str, prepared: PreparedRequest, inputs: JobInputs) -> Iterator[Event]:
        recipe: Any = prepared.recipe
        preview = partial(_image, Row(prepared, 0))
        for step in range(prepared.steps):
            while not self.go.wait(0.01):
                yield events.Progress(kind, step, prepared.steps, preview=preview)
            time.sleep(self.step_s)
            yield events.Progress(kind, step + 1, prepared.steps, preview=preview)
        images = []
        for k in range(getattr(recipe, "n", 1)):
            source = inputs.images.get("image")
            seed = getattr(recipe, "seed", 0) + k
            images.append(draw(_bytes(Row(prepared, seed)), source.size if source else (SIDE, SIDE)))
            yield events.ImageReady(images[-1], "", seed)
        yield events.Done(images, {})

    def facts(self, prepared: PreparedRequest) -> dict[str, Any]:
        recipe = prepared.recipe
        return {
            "recipe": {**recipe.model_dump(mode="json"), "steps": prepared.steps},
            "base": {"name": self.name, "fingerprint": "0" * 64}, "preset": "quality",
            "concepts": {n: {"sha256": p.sha256} for n, p in prepared.concepts.items()},
            "sampler": getattr(recipe, "scheduler", None) or "Euler", "guidance": 1.0, "adapters": {},
        }  # fmt: skip

    def describe(self) -> dict[str, Any]:
        return {
            "base": {
                "name": self.name, "architecture": "tiny", "fingerprint": "0" * 64, "licence": "", "side": SIDE,
            },
            "presets": [{"name": n, "steps": 4, "guidance": 1.0, "ready": True} for n in ("quality", "turbo")],
            "live": "turbo", "samplers": ["Euler", "Euler a"], "loras": ["style"],
        }  # fmt: skip

    def with_live_engine(self, recipe: Paint) -> Paint:
        return recipe

    def warm_up(self) -> None:
        self.paint([Row(self.prepare("paint", Paint(prompt="warm"), {}), 0)], lambda done, preview: None)


def _prompt(row: Row) -> str:
    return str(getattr(row.prepared.recipe, "prompt", ""))


def _bytes(row: Row) -> bytes:
    contents = {n: p.sha256 for n, p in row.prepared.concepts.items()}
    return digest(_prompt(row), getattr(row.prepared.recipe, "negative", "") or "", contents, row.seed)


def _image(row: Row) -> Image.Image:
    recipe = row.prepared.recipe
    return draw(_bytes(row), (getattr(recipe, "width", None) or SIDE, getattr(recipe, "height", None) or SIDE))
