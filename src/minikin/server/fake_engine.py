"""An engine without diffusion that draws what was asked into the image, so that a mix-up is counted.

Every image is a grid of 8 x 8 blocks of one grey level each: a digest of the prompt, the concepts' contents
and the seed. PNG keeps them exactly; `read` gets them back, `digest` says what they must be.
It takes as long as it is told, per batch and step, like a GPU.
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
from minikin.server.engine import Concepts, Given, OnStep, Prepared, Row

SIDE, CELLS = 64, 8
BYTES = CELLS * CELLS


def digest(prompt: str, negative: str, concepts: Mapping[str, str], seed: int) -> bytes:
    """What an image must say: of its own words, its own concepts' contents, its own seed."""
    told = repr((prompt, negative, sorted(concepts.items()), seed)).encode()
    return hashlib.sha512(told).digest()[:BYTES]


def drawn(data: bytes, size: tuple[int, int]) -> Image.Image:
    """The bytes as grey blocks."""
    return Image.frombytes("L", (CELLS, CELLS), data).resize(size, Image.Resampling.NEAREST).convert("RGB")


def read(image: Image.Image) -> bytes:
    """The bytes of an image."""
    w, h = image.size
    grey = image.convert("L")
    return bytes(
        int(grey.getpixel((int((x + 0.5) * w / CELLS), int((y + 0.5) * h / CELLS))))  # type: ignore[arg-type]
        for y in range(CELLS) for x in range(CELLS)
    )  # fmt: skip


class Canary:
    """See `engine.Engine`.

    step_s   of each step of a batch, however many rows it has
    broken   raised by `paint` for prompts that hold this word
    fits     images at once
    """

    name, side = "canary", SIDE

    def __init__(
        self, step_s: float = 0.0, steps: int = 4, broken: Mapping[str, Exception] | None = None,
        fits: int = 8,
    ) -> None:  # fmt: skip
        self.step_s, self.steps, self.broken, self.fits = step_s, steps, dict(broken or {}), fits
        self.batches: list[int] = []
        self.stepped = 0
        self.hold = threading.Event()  # clear it to keep every batch at its first step
        self.hold.set()
        self._turn = threading.Lock()

    def prepare(self, kind: str, recipe: Recipe, concepts: Concepts, given: Given | None = None) -> Prepared:
        width = getattr(recipe, "width", None) or SIDE
        height = getattr(recipe, "height", None) or SIDE
        steps = getattr(recipe, "steps", None) or self.steps
        if getattr(recipe, "preset", None) == "unknown":
            raise UnknownName("preset", "unknown", ["quality", "turbo"])
        group = (width, height, steps) if kind == "paint" else None
        return Prepared(recipe, concepts, group, steps, width * height)

    def paint(self, rows: Sequence[Row], on_step: OnStep) -> list[Image.Image]:
        with self._turn:
            self.batches.append(len(rows))
            for row in rows:
                for word, error in self.broken.items():
                    if word in _prompt(row):
                        raise error
            images = [_image(row) for row in rows]
            for step in range(rows[0].prepared.steps):
                while not self.hold.wait(0.01):
                    on_step(step, lambda i: images[i])
                time.sleep(self.step_s)
                self.stepped += 1
                on_step(step + 1, lambda i: images[i])
            return images

    def check(self) -> None:
        pass

    def room(self, prepared: Prepared) -> int:
        return self.fits

    def run(self, kind: str, prepared: Prepared, given: Given) -> Iterator[Event]:
        recipe: Any = prepared.recipe
        look = partial(_image, Row(prepared, 0))
        for step in range(prepared.steps):
            while not self.hold.wait(0.01):
                yield events.Progress(kind, step, prepared.steps, look=look)
            time.sleep(self.step_s)
            yield events.Progress(kind, step + 1, prepared.steps, look=look)
        made = []
        for k in range(getattr(recipe, "n", 1)):
            picture = given.pictures.get("picture")
            seed = getattr(recipe, "seed", 0) + k
            row = Row(prepared, seed)
            made.append(drawn(_bytes(row), picture.size if picture else (SIDE, SIDE)))
            yield events.Picture(made[-1], "", seed)
        yield events.Done(made, {})

    def facts(self, prepared: Prepared) -> dict[str, Any]:
        recipe = prepared.recipe
        plan = {**recipe.model_dump(mode="json"), "steps": prepared.steps}
        return {
            "recipe": plan, "base": {"name": self.name, "fingerprint": "0" * 64}, "preset": "quality",
            "concepts": {n: {"sha256": p.sha256} for n, p in prepared.concepts.items()},
            "sampler": getattr(recipe, "scheduler", None) or "Euler", "guidance": 1.0, "adapters": {},
        }  # fmt: skip

    def describe(self) -> dict[str, Any]:
        base = {"name": self.name, "architecture": "tiny", "fingerprint": "0" * 64, "licence": "", "side": SIDE}
        ready = [{"name": n, "steps": 4, "guidance": 1.0, "ready": True} for n in ("quality", "turbo")]
        return {
            "base": base,
            "presets": ready,
            "live": "turbo",
            "samplers": ["Euler", "Euler a"],
            "loras": ["style"],
        }

    def hastened(self, recipe: Paint) -> Paint:
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
    return drawn(_bytes(row), (getattr(recipe, "width", None) or SIDE, getattr(recipe, "height", None) or SIDE))
