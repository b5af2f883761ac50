"""Images to start from: pixels, mask, and what they record about themselves.

The record of an image goes into the record of every image made from it, under `parent`: so a refined image
knows its draft, and `lineage.replay` can repeat both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from minikin.errors import BadPhoto, BadRecipe
from minikin.generation.canvas import mask_text
from minikin.generation.recorded_fields import recipe_fields
from minikin.images import metadata, xmp
from minikin.images.photos import read_bytes, read_image
from minikin.images.pixels import in_srgb, on_white
from minikin.recipes import PRESET_OPTIONS, Img2Img, Paint

ImageLike = str | Path | Image.Image
R = TypeVar("R", bound=Img2Img)
OF_OTHERS = ("prompt", "negative", "seed", "clip_skip")  # taken from the records of other programs
NOT_INHERITED = ("n", "batch", "device", "dtype", "backend", "size", "width", "height")


_BASE_NAME = re.compile(r"\w[\w.-]{0,79}(/\w[\w.-]{0,79})?")  # a name of the registry, or owner/name of the hub


@dataclass(frozen=True)
class SourceImage:
    """An image and what it records.

    image     RGB, upright
    file      its name, and sha256 its file's hash; "" for an image that is no file
    record    how Minikin generated it; {} for an image of another origin
    settings  those of OF_OTHERS that another program wrote into it
    origin    IPTC's code of its origin; None when it states none
    """

    image: Image.Image
    file: str = ""
    sha256: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    origin: str | None = None

    @classmethod
    def of(cls, image: ImageLike | SourceImage) -> SourceImage:
        """Read an image; raises BadPhoto. For one that is no file, the texts in its `info` are read."""
        if isinstance(image, SourceImage):
            return image
        if isinstance(image, Image.Image):
            texts = _recorded(lambda: metadata.recorded(metadata.texts_of(image)))
            return cls(plain(image), **texts, origin=xmp.source_type_of(image))
        path = Path(image)
        data = read_bytes(path)
        opened = read_image(data, str(path))
        texts = _recorded(lambda: metadata.recorded(opened.texts))
        rgb = on_white(opened.image)
        return cls(rgb, path.name, hashlib.sha256(data).hexdigest(), **texts, origin=opened.origin)

    @property
    def pixels(self) -> str:
        """SHA-256 of the size and the pixels, whatever file they are in."""
        return pixels_hash(self.image)

    @property
    def source_type(self) -> str:
        """IPTC's code for an image made from this one: wholly generated only where this image says it is."""
        if self.origin is None and self.record and "parent" not in self.record:
            return xmp.TRAINED  # by its record, it was generated from noise
        source_type = self.origin or self.record.get(xmp.KEY)
        return xmp.TRAINED if source_type == xmp.TRAINED else xmp.COMPOSITE

    def parent(self) -> dict[str, Any]:
        """The entry `parent` in the record of an image made from this one."""
        parent: dict[str, Any] = {"pixels": self.pixels, "size": list(self.image.size)}
        if self.file:
            parent |= {"file": self.file, "sha256": self.sha256}
        return parent | ({"made": self.record} if self.record else {})


@dataclass(frozen=True)
class InitImage:
    """The image that sampling starts from and, for inpainting, the mask (H, W) bool of what is generated."""

    source: SourceImage
    mask: np.ndarray | None = None

    def record(self) -> dict[str, Any]:
        """The part of the new image's record that repeats this one."""
        record: dict[str, Any] = {"parent": self.source.parent(), xmp.KEY: self.source.source_type}
        return record if self.mask is None else record | {"mask": {"png": mask_text(self.mask)}}


def plain(image: Image.Image) -> Image.Image:
    """RGB in sRGB, which models are trained on, on white where it is transparent; no profile, no colour key."""
    return on_white(in_srgb(image))


def _recorded(read: Callable[[], metadata.Recorded]) -> dict[str, Any]:
    """`record` and `settings` of an image's texts."""
    try:
        texts = read()
    except BadPhoto:  # it says nothing of itself
        texts = metadata.Recorded({})
    record = texts.recipe if isinstance(texts.recipe.get("recipe"), dict) else {}
    fields = {} if record else recipe_fields(texts, (0, 0))
    return {"record": record, "settings": {name: fields[name] for name in OF_OTHERS if name in fields}}


def pixels_hash(image: Image.Image) -> str:
    """SHA-256 of an image's size and RGB pixels."""
    size = f"{image.width}x{image.height} ".encode()
    return hashlib.sha256(size + image.convert("RGB").tobytes()).hexdigest()


def base_of_record(recipe: dict[str, Any]) -> str:
    """The base that a record names. Raises BadRecipe for a path: anybody's image must not open files here."""
    from minikin.models.loading.registry import PUBLISHED, entries

    base = recipe.get("base", "tiny")
    if isinstance(base, str) and base in ("tiny", *PUBLISHED, *entries()):
        return base
    if not isinstance(base, str) or not _BASE_NAME.fullmatch(base) or Path(base).exists():
        raise BadRecipe(
            f"The image names its base by a path, {str(base)[:80]!r}, which is not followed. If it is yours, "
            "give it with --base."
        )
    return base


def inherited(kind: type[R], source: SourceImage, values: dict[str, Any]) -> R:
    """A recipe from these values and, where they say nothing, from the image's own record.

    Another preset or base than the image's brings its own steps, guidance, scheduler and points, another prompt
    its own points.
    values  fields of the recipe; None is not given
    Raises BadRecipe; also when neither has a prompt.
    """
    values = {k: v for k, v in values.items() if v is not None}
    recorded = Paint.current(source.record.get("recipe", source.settings))
    old = {k: v for k, v in recorded.items() if k in Paint.model_fields and v not in (None, "")}
    if "base" in old and "base" not in values:
        old["base"] = base_of_record(old)
    if "seed" in source.record:
        old["seed"] = source.record["seed"]
    dropped = set(NOT_INHERITED)
    if any(values.get(k) not in (None, old.get(k)) for k in ("preset", "base")):
        dropped |= set(PRESET_OPTIONS)
    if values.get("prompt") not in (None, old.get("prompt")):
        dropped.add("points")
    recipe: R = kind.make(**{k: v for k, v in old.items() if k not in dropped} | values)
    if not recipe.prompt.strip():
        raise BadRecipe(
            f'{source.file or "The image"} carries no prompt, so say what it shows: --prompt "...".'
        )
    return recipe
