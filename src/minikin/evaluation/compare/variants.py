"""Variants: a method with something changed, for ablations.

    perfusion-value:mask=none            a field of the method's recipe (`Teach` or `Baseline`)
    perfusion-gated:lock=global          images with the global key lock
    perfusion-value:photos=1             trained on the first photo alone
    perfusion-value:regions=on           two-subject test with region words, <mine@left>
    perfusion-gated:beta=0.6:tau=0.2     several at once

`ABLATIONS` are those of Minikin's own method, each against the first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from minikin.errors import BadRecipe, UnknownName
from minikin.recipes import Baseline, Teach

GENERATION_FIELDS = ("lock",)  # fields of `recipes.Paint` that a variant may change
PHOTOS, REGIONS = "photos", "regions"
ABLATIONS = (
    "perfusion-value", "perfusion-value:prior_weight=0", "perfusion-value:keys=trained",
    "perfusion-value:mask=none", "perfusion-value:photos=1", "perfusion-value:int8=true",
    "perfusion-value:steps=150",
    "perfusion-gated", "perfusion-gated:keys=trained", "perfusion-gated:lock=global",
    "perfusion-gated:beta=0.6", "perfusion-gated:tau=0.2", "perfusion-gated:positions=own",
    "perfusion-gated:word_lr=0",
)  # fmt: skip
RENAMED = {"perfusion-row": "perfusion-value"}  # method in 0.1 -> method now


@dataclass(frozen=True)
class Variant:
    """A method with changes to its recipe and to generation, and the number of photos (None: all)."""

    method: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    photos: int | None = None
    regions: bool = False


def current_name(name: str) -> str:
    """The name of a method or variant as it is now, from a name of 0.1."""
    method, colon, changes = name.partition(":")
    return RENAMED.get(method, method) + colon + changes


def variant(name: str) -> Variant:
    """Parse METHOD or METHOD:KEY=VALUE... of any method. Raises BadRecipe for a change that cannot be read."""
    method, *parts = current_name(name).split(":")
    changes: dict[str, str] = {}
    for part in parts:
        key, _, value = part.partition("=")
        if not key or not value:
            raise BadRecipe(f"'{name}': write changes as KEY=VALUE, for example perfusion-value:mask=none.")
        changes[key] = value
    photos = changes.pop(PHOTOS, None)
    if photos is not None and not (photos.isdigit() and int(photos) > 0):
        raise BadRecipe(f"'{name}': photos is a whole number from 1, but it is {photos}.")
    regions = changes.pop(REGIONS, None)
    if regions not in (None, "on"):
        raise BadRecipe(f"'{name}': regions can only be on; leave it out otherwise.")
    generation = {k: changes.pop(k) for k in GENERATION_FIELDS if k in changes}
    recipe = Teach.current(Baseline.current(changes))  # fields of earlier versions by their names now
    return Variant(method, recipe, generation, int(photos) if photos else None, bool(regions))


def check(name: str, fields: Collection[str]) -> None:
    """Raises UnknownName when a variant changes a field that its recipe does not have."""
    for key in variant(name).recipe:
        if key not in fields:
            choices = (*fields, *GENERATION_FIELDS, PHOTOS, REGIONS)
            raise UnknownName(f"setting of {name.split(':')[0]}", key, choices)
