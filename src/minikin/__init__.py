"""Minikin: teach a text-to-image model a personal concept in one small file, and paint it anywhere.

    from minikin import Studio

    studio = Studio.open("tiny")
    tom = studio.teach("photos/", name="tom", category="cat")
    tom.save("tom.safetensors")
    picture = studio.paint("a photo of <tom> on the beach", seed=7)[0]

Names are loaded when they are first used: importing minikin is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from minikin.bases.attached import attach
    from minikin.concepts.concept import Concept
    from minikin.errors import MinikinError
    from minikin.marking.encode import save
    from minikin.recipes import Paint, Teach
    from minikin.studio import Studio

_PLACES = {
    "Concept": "minikin.concepts.concept",
    "MinikinError": "minikin.errors",
    "Paint": "minikin.recipes",
    "Studio": "minikin.studio",
    "Teach": "minikin.recipes",
    "attach": "minikin.bases.attached",
    "save": "minikin.marking.encode",
}

__all__ = ["Concept", "MinikinError", "Paint", "Studio", "Teach", "attach", "save"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'minikin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
