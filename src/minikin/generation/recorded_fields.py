"""An image's metadata as options of `minikin paint`: for forms that take a recipe over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from minikin.errors import MinikinError
from minikin.generation.schedulers import schedule_name, split
from minikin.images.metadata import Recorded
from minikin.recipes import Paint

TAKEN = (
    "prompt", "negative", "seed", "preset", "steps", "guidance", "scheduler", "schedule", "width", "height",
    "clip_skip",
)  # fmt: skip


def recipe_fields(record: Recorded, size: tuple[int, int]) -> dict[str, Any]:
    """The options that an image records, by Minikin or another program; each is valid by itself.

    size  (width, height) of the image: it is taken where the record says none
    A base, a device or a path is never among them.
    """
    recorded = record.recipe.get("recipe")
    if isinstance(recorded, dict):
        fields = Paint.current(recorded) | {"seed": record.recipe.get("seed")}
        fields |= {"width": fields.get("width") or size[0], "height": fields.get("height") or size[1]}
        fields.setdefault("preset", record.recipe.get("preset"))
    else:
        fields = _of_settings(record, size)
    return {name: fields[name] for name in TAKEN if _is_valid(name, fields.get(name))}


def _of_settings(record: Recorded, size: tuple[int, int]) -> dict[str, Any]:
    """Options from settings under A1111's names."""
    settings = record.settings
    width, _, height = settings.get("Size", "").lower().partition("x")
    fields: dict[str, Any] = {"prompt": record.prompt, "negative": record.negative}
    numbers: Mapping[str, tuple[str, Callable[[str], Any]]] = {
        "Seed": ("seed", int), "Steps": ("steps", int), "CFG scale": ("guidance", float),
        "Clip skip": ("clip_skip", int),
    }  # fmt: skip
    for name, (field, number) in numbers.items():
        with suppress(ValueError, OverflowError):
            fields[field] = number(settings.get(name, ""))
    sides = (width.strip(), height.strip())
    fields["width"], fields["height"] = (
        map(int, sides) if all(s.isdecimal() and len(s) < 6 for s in sides) else size
    )
    with suppress(MinikinError):
        fields["scheduler"], fields["schedule"] = split(settings.get("Sampler", ""))
    with suppress(MinikinError):
        fields["schedule"] = schedule_name(settings.get("Schedule type")) or fields.get("schedule")
    return fields


def _is_valid(name: str, value: Any) -> bool:
    """Whether `Paint` takes this value of an option; nothing is none."""
    if value in (None, ""):
        return False
    try:
        Paint.make(**{"prompt": "", name: value})
    except MinikinError:
        return False
    return True
