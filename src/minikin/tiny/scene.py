"""Description of a scene of the sticker world: pure data, from which captions and pixels follow."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

RESOLUTION = 128
Rng = np.random.Generator


def pick(rng: Rng, items: tuple[str, ...] | list[str]) -> str:
    """One of the items, each with the same probability."""
    return items[int(rng.integers(len(items)))]


@dataclass(frozen=True)
class Look:
    """Colours of one object: as drawn, in one named colour, or in a two-colour pattern."""

    colour: str | None = None
    pattern: str | None = None
    rgb: tuple[tuple[int, int, int], ...] = ()  # the colours of the pattern
    colour_names: tuple[str, str] | None = None  # of both colours of the pattern, if they have names
    direction: int = 0  # of stripes: 0 diagonal, 1 vertical, 2 horizontal
    scale: float = 1.0  # of the pattern


@dataclass(frozen=True)
class Thing:
    """One object of a scene: category, drawing, look and position in pixels of a 128 px image."""

    category: str
    art: str
    code: str
    look: Look
    centre_x: float
    bottom: float  # y of the lowest visible pixel
    size: float  # side of the square drawing
    flip: bool = False
    shadow: bool = True
    identity: str | None = None


@dataclass(frozen=True)
class Scene:
    """Complete description of one image."""

    seed: int
    index: int
    layout: str  # a name of vocabulary.LAYOUTS
    background: str  # a painted background, or "plain_COLOUR"
    art: str
    things: tuple[Thing, ...]
    size: str | None = None  # tiny, huge or None; of a single subject
    count: int = 1
    sticker: bool = False
    treatment: str | None = None
    backdrop: tuple[int, int, int, bool] = field(default=(0, 0, 0, False))  # which, x, y, flip

    @property
    def is_plain(self) -> bool:
        return self.background.startswith("plain_")

    @property
    def objects(self) -> tuple[str, ...]:
        """The categories in the image, each once, in drawing order."""
        return tuple(dict.fromkeys(t.category for t in self.things))
