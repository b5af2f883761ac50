"""Variants: a method with something changed, for ablations.

    perfusion-row:mask=none              a field of the method's recipe (`Teach` or `Baseline`)
    perfusion-gated:lock=global          painted with the global key lock
    perfusion-row:photos=1               taught from the first photo alone
    perfusion-row:regions=on             two things in one image: with region words, <mine@left>
    perfusion-gated:beta=0.6:tau=0.2     several at once

`ABLATIONS` are those of Minikin's own method, each against the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minikin.errors import BadRecipe, UnknownName

PAINTED = ("lock",)  # fields of `recipes.Paint` that a variant may change
PHOTOS, REGIONS = "photos", "regions"
ABLATIONS = (
    "perfusion-row", "perfusion-row:keep=0", "perfusion-row:keys=trained", "perfusion-row:mask=none",
    "perfusion-row:photos=1", "perfusion-row:int8=true", "perfusion-row:steps=150",
    "perfusion-gated", "perfusion-gated:keys=trained", "perfusion-gated:lock=global",
    "perfusion-gated:beta=0.6", "perfusion-gated:tau=0.2", "perfusion-gated:positions=own",
    "perfusion-gated:word_rate=0",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A method and what is changed: of its recipe, of painting, how many photos it sees (None: all)."""

    method: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    paint: Mapping[str, Any] = field(default_factory=dict)
    photos: int | None = None
    regions: bool = False


def variant(name: str) -> Variant:
    """METHOD or METHOD:KEY=VALUE..., whatever the method. Raises BadRecipe for a change that is none."""
    method, *changes = name.split(":")
    found: dict[str, str] = {}
    for change in changes:
        key, _, value = change.partition("=")
        if not key or not value:
            raise BadRecipe(f"'{name}': write changes as KEY=VALUE, for example perfusion-row:mask=none.")
        found[key] = value
    photos = found.pop(PHOTOS, None)
    if photos is not None and not (photos.isdigit() and int(photos) > 0):
        raise BadRecipe(f"'{name}': photos is a whole number from 1, but it is {photos}.")
    regions = found.pop(REGIONS, None)
    if regions not in (None, "on"):
        raise BadRecipe(f"'{name}': regions can only be on; leave it out otherwise.")
    paint = {k: found.pop(k) for k in PAINTED if k in found}
    return Variant(method, found, paint, int(photos) if photos else None, regions == "on")


def check(name: str, fields: Mapping[str, Any]) -> None:
    """Raises UnknownName when a variant changes what its recipe does not have."""
    for key in variant(name).recipe:
        if key not in fields:
            raise UnknownName(f"setting of {name.split(':')[0]}", key, (*fields, *PAINTED, PHOTOS, REGIONS))
