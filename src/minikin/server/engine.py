"""What the server needs of whoever paints: a small protocol, so that tests need no diffusion.

    prepare   at the door: everything that can be wrong with a request is said here, before it waits
    paint     one batch of rows of one group, in the worker's thread
    run       any other kind of work, as events

A `Row` carries its own concepts, pinned by content when the request was taken. Nothing is looked up by
name later, so what other clients add, replace or remove meanwhile changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from PIL import Image

from minikin.errors import MinikinError
from minikin.events import Event
from minikin.perfusion.concept import Concept
from minikin.recipes import Paint, Recipe


@dataclass(frozen=True)
class Pinned:
    """A concept of exactly this content, under the name it has in this request."""

    sha256: str
    concept: Concept


Concepts = Mapping[str, Pinned]  # by name in the prompt


@dataclass(frozen=True)
class Prepared:
    """A request that can be carried out.

    recipe    as it was asked for
    group     rows of equal groups may share a batch; None for work that is done alone
    steps     of one image; pixels of one image
    plan      the engine's own business
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
        """Of one image, in megapixel-steps."""
        return self.steps * self.pixels / 1e6


class EngineLost(MinikinError):
    """What painted is gone, with everything it had in hand; `warm_up` brings back another."""

    exit_code = 1
    code = "engine_lost"


class Row(NamedTuple):
    """One image of a batch."""

    prepared: Prepared
    seed: int


Preview = Callable[[int], Image.Image | None]  # of the row with this number, as it is now
OnStep = Callable[[int, Preview], None]  # steps done; may raise events.Cancelled


@dataclass(frozen=True)
class Given:
    """What a request brings besides its recipe: images by field name, and a folder for its work.

    images  "image", "mask"; "photos" and "masks" of teaching are lists in `many`
    stop      asks long work to end early and keep what there is
    """

    pictures: Mapping[str, Image.Image] = field(default_factory=dict)
    many: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    folder: Any = None
    stop: Any = None

    @property
    def area(self) -> int:
        """Pixels of all images in it."""
        photos = (one.pixels.shape for one in self.many.get("photos", ()))
        sides = [*(one.size for one in self.pictures.values()), *(shape[:2] for shape in photos)]
        return int(sum(a * b for a, b in sides))


class Engine(Protocol):
    """Paints for one device. `prepare` is called from any thread, the others from the worker's alone.

    Work may raise EngineLost; it is then done again, by whoever is free.
    """

    name: str
    side: int

    def prepare(self, kind: str, recipe: Recipe, concepts: Concepts, given: Given | None = None) -> Prepared:
        """Raise MinikinError for what cannot be done; quick, and never waits for a batch."""

    def paint(self, rows: Sequence[Row], on_step: OnStep) -> list[Image.Image]:
        """One image a row, in their order."""

    def check(self) -> None:
        """Raise EngineLost when what paints is gone; asked when there is nothing to do."""

    def room(self, prepared: Prepared) -> int:
        """How many images like this one may be painted at once, by the memory that is free now.

        Asked before every batch. Raises EngineLost when what paints is gone: no job has a part in that.
        """

    def run(self, kind: str, prepared: Prepared, given: Given) -> Iterator[Event]:
        """Work that is done alone; closing the iterator ends it within a step."""

    def facts(self, prepared: Prepared) -> dict[str, Any]:
        """What an image should know about how it was made."""

    def describe(self) -> dict[str, Any]:
        """Base, presets, samplers, LoRAs: what a client may ask for."""

    def hastened(self, recipe: Paint) -> Paint:
        """The recipe as it is painted live, where an image is looked at once: as quickly as can be."""

    def warm_up(self) -> None:
        """The first image, so that nobody waits for it; also after EngineLost."""
