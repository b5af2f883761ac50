"""Bases that are students themselves: distilled to few steps, and no good for teaching or distilling."""

from __future__ import annotations

from minikin.errors import BadRecipe
from minikin.models.base import Base
from minikin.models.presets import recognise

_ORIGINALS = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}


def refuse_student(base: Base, why: str, instead: str) -> None:
    """Raise BadRecipe when a base is distilled.

    why      what would go wrong, as a sentence without its end
    instead  what to do, before "the model it was made from"
    """
    made_for = "lcm" if base.has_guidance_embedding else recognise(base).name
    if made_for != "quality":
        raise BadRecipe(
            f"'{base.name}' is already distilled ({made_for}): {why}. {instead} the model it was made from, "
            f"for example --base {_ORIGINALS.get(base.architecture, 'tiny')}."
        )
