"""Check against distilled bases, which can neither be trained on nor serve as teachers."""

from __future__ import annotations

from minikin.errors import BadRecipe
from minikin.models.base import Base
from minikin.models.presets import of_guidance_embedding, recognise

_ORIGINALS = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl", "sana": "sana"}


def refuse_student(base: Base, why: str, instead: str) -> None:
    """Raise BadRecipe if a base is distilled.

    why      the reason, as a sentence without its end
    instead  the start of the advice, before "the model it was made from"
    """
    preset = of_guidance_embedding(base) if base.has_guidance_embedding else recognise(base).name
    if preset != "quality":
        raise BadRecipe(
            f"'{base.name}' is already distilled ({preset}): {why}. {instead} the model it was made from, "
            f"for example --base {_ORIGINALS.get(base.architecture, 'tiny')}."
        )
