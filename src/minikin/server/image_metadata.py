"""What goes into an image, and what a request brought: both as files that name nobody."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minikin.generation.output import LARGEST_MASK, settings
from minikin.images.encode import save_image
from minikin.images.metadata import JSON_KEY, parameters_text, png_info
from minikin.images.photos import Photo
from minikin.images.xmp import NONE, source_type_of
from minikin.recipes import Paint, Recipe
from minikin.server.engine import Given


def inside(facts: dict[str, Any], recipe: Recipe, image: Image.Image, seed: int | None) -> tuple[Any, str]:
    """The PNG's texts, and A1111's infotext by itself."""
    prompt, negative = getattr(recipe, "prompt", ""), getattr(recipe, "negative", "") or ""
    told: dict[str, Any] = {"Seed": seed, "Size": f"{image.width}x{image.height}"}
    if isinstance(recipe, Paint) and "sampler" in facts:
        told = settings(facts, seed or 0, image.size)
    own = {**_short(facts), "seed": seed, "batch": {"seed": seed, "n": 1}}
    return png_info(own, prompt, negative, told), parameters_text(prompt, negative, told)


def _short(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts without a mask that is too large for an image's record: its hash alone."""
    text = facts.get("mask", {}).get("png", "")
    if len(text) <= LARGEST_MASK:
        return facts
    return {**facts, "mask": {"sha256": hashlib.sha256(base64.b64decode(text)).hexdigest()}}


def _texts(image: Image.Image) -> PngInfo | None:
    """What an image records of how it was made; None where it records nothing."""
    kept, info = {k: image.info.get(k) for k in ("parameters", JSON_KEY)}, PngInfo()
    for key, text in kept.items():
        if isinstance(text, str):
            info.add_itxt(key, text)
    return info if any(kept.values()) else None


def keep_inputs(given: Given) -> None:
    """Write a request's images into its folder, rebuilt from their pixels: no metadata of photos,
    but for the texts that record how an image was painted."""
    folder: Path = given.folder
    for name, image in given.pictures.items():
        origin = source_type_of(image) or NONE  # what it was sent with, nothing of ours
        save_image(image, folder / f"{name}.png", info=_texts(image), source_type=origin)
    for k, photo in enumerate(given.many.get("photos", ())):
        save_image(Image.fromarray(photo.pixels), folder / "photos" / f"{k:03}.png", source_type=NONE)
        if photo.mask is not None:
            grey = (photo.mask * 255).round().astype(np.uint8)
            save_image(Image.fromarray(grey), folder / "photos" / "masks" / f"{k:03}.png", source_type=NONE)


def inputs(folder: Path, takes: Sequence[str]) -> Given:
    """The same, read back after a restart."""
    pictures = {n: Image.open(folder / f"{n}.png").copy() for n in takes if (folder / f"{n}.png").exists()}
    photos: list[Photo] = []
    if (folder / "photos").is_dir():
        from minikin.images.photos import load_photos

        photos = load_photos(folder / "photos")
    return Given(pictures, {"photos": photos} if photos else {}, folder, threading.Event())
