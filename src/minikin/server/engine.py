"""Inference backend as the server sees it: a small protocol, so that tests need no diffusion model.

    prepare   at admission: raises everything that can be wrong with a request, before it waits
    paint     one batch of rows of one group, in the worker's thread
    run       any other type of job, as events

A `Row` carries its concepts, pinned by content when the request was accepted. Nothing is looked up by
name later, so what other clients add, replace or remove meanwhile changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event as Flag
from typing import Any, NamedTuple, Protocol

from PIL import Image

from minikin.errors import MinikinError
from minikin.events import Event
from minikin.images.photos import Photo
from minikin.perfusion.concept import Concept
from minikin.recipes import Paint, Recipe


@dataclass(frozen=True)
class PinnedConcept:
    """A concept with exactly this content (SHA-256 of its file), under the name it has in this request."""

    sha256: str
    concept: Concept


Concepts = Mapping[str, PinnedConcept]  # by name in the prompt


@dataclass(frozen=True)
class PreparedRequest:
    """A request that can be carried out.

    recipe    as the client sent it
    group     rows of equal groups may share a batch; None for a job that runs alone
    steps     denoising steps of one image; pixels of one image
    plan      the engine's private data
    """

    recipe: Recipe
    concepts: Concepts
    group: Hashable
    steps: int
    pixels: int
    warnings: tuple[str, ...] = ()
    plan: Any = None

    @property
    def cost(self) -> float:
        """Cost of one image in megapixel-steps."""
        return self.steps * self.pixels / 1e6


class EngineLost(MinikinError):
    """The engine died with everything it was working on; `warm_up` starts another."""

    exit_code = 1
    code = "engine_lost"


class Row(NamedTuple):
    """One image of a batch."""

    prepared: PreparedRequest
    seed: int


Preview = Callable[[int], Image.Image | None]  # the current image of the row with this number
OnStep = Callable[[int, Preview], None]  # steps done; may raise events.Cancelled


@dataclass(frozen=True)
class JobInputs:
    """What a request carries besides its recipe: images, photos for teaching, and a folder to work in.

    images  by field name: "image" and "mask"
    stop    when set, teaching ends early and keeps the concept as it is
    source  file name of the image it starts from, where that is known
    parent  id of that image, where it is a result of this server
    """

    images: Mapping[str, Image.Image] = field(default_factory=dict)
    photos: Sequence[Photo] = ()
    folder: Path | None = None
    stop: Flag | None = None
    source: str = ""
    parent: str = ""

    @property
    def area(self) -> int:
        """Pixels of all images and photos together."""
        sizes = [*(image.size for image in self.images.values()), *(p.pixels.shape[:2] for p in self.photos)]
        return int(sum(a * b for a, b in sizes))


class Engine(Protocol):
    """Runs a model on one device. `prepare` is called from any thread, the others from the worker's alone.

    Any method may raise EngineLost; another worker then repeats the work.
    """

    name: str
    side: int

    def prepare(
        self, kind: str, recipe: Recipe, concepts: Concepts, inputs: JobInputs | None = None
    ) -> PreparedRequest:
        """Raise MinikinError for what cannot be done; fast, never waits for a batch."""

    def paint(self, rows: Sequence[Row], on_step: OnStep) -> list[Image.Image]:
        """One image per row, in the order of the rows."""

    def check(self) -> None:
        """Raise EngineLost when the engine is gone; called when there is nothing to do."""

    def max_batch(self, prepared: PreparedRequest) -> int:
        """How many images like this one fit into the memory that is free now.

        Called before every batch. Raises EngineLost when the engine is gone; no job is blamed for that.
        """

    def run(self, kind: str, prepared: PreparedRequest, inputs: JobInputs) -> Iterator[Event]:
        """Events of a job that runs alone; closing the iterator ends it within a step."""

    def facts(self, prepared: PreparedRequest) -> dict[str, Any]:
        """The record that goes into the image's metadata."""

    def describe(self) -> dict[str, Any]:
        """Base, presets, samplers and LoRAs a client may use."""

    def with_live_engine(self, recipe: Paint) -> Paint:
        """The recipe for live painting, on the fastest inference backend there is for it."""

    def warm_up(self) -> None:
        """Generate a first image, so that nobody waits for compilation; also called after EngineLost."""
