"""Minikin: teach a text-to-image model a personal concept in one small file, and paint it anywhere.

    from minikin import Studio

    studio = Studio.open("tiny")
    tom = studio.teach("photos/", name="tom", category="cat")
    tom.save("tom.safetensors")
    image = studio.paint("a photo of <tom> on the beach", seed=7)[0]

Names are loaded when they are first used: importing minikin is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from minikin.errors import MinikinError
    from minikin.images.encode import save_image as save
    from minikin.perfusion.attach import attach
    from minikin.perfusion.concept import Concept
    from minikin.recipes import Paint, Teach
    from minikin.studio import Studio

_PLACES = {
    "Concept": "minikin.perfusion.concept",
    "MinikinError": "minikin.errors",
    "Paint": "minikin.recipes",
    "Studio": "minikin.studio",
    "Teach": "minikin.recipes",
    "attach": "minikin.perfusion.attach",
    "save": "minikin.images.encode:save_image",
}

__all__ = ["Concept", "MinikinError", "Paint", "Studio", "Teach", "attach", "save"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        from importlib import import_module

        module, _, attribute = _PLACES[name].partition(":")
        return getattr(import_module(module), attribute or name)
    raise AttributeError(f"module 'minikin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
