"""Metadata of the server's images, and the inputs of a job as files that a restart finds again."""

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

from minikin.files import atomic_write
from minikin.generation.output import LARGEST_MASK, parameters
from minikin.images.encode import save_image
from minikin.images.metadata import parameters_text, png_info, texts_of
from minikin.images.photos import load_photos
from minikin.images.xmp import NONE, source_type_of
from minikin.recipes import Paint, Recipe
from minikin.server.engine import JobInputs


def image_texts(facts: dict[str, Any], recipe: Recipe, image: Image.Image, seed: int | None) -> tuple[Any, str]:
    """The PNG's text chunks, and A1111's infotext by itself."""
    prompt, negative = getattr(recipe, "prompt", ""), getattr(recipe, "negative", "") or ""
    record = {**_without_large_mask(facts), "seed": seed, "batch": {"seed": seed, "n": 1}}
    infotext: dict[str, Any] = {"Seed": seed, "Size": f"{image.width}x{image.height}"}
    if isinstance(recipe, Paint) and "sampler" in facts:
        infotext = parameters(record, image.size)
    return png_info(record, prompt, negative, infotext), parameters_text(prompt, negative, infotext)


def _without_large_mask(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts; of a mask that is too large for an image's metadata only its hash."""
    png = facts.get("mask", {}).get("png", "")
    if len(png) <= LARGEST_MASK:
        return facts
    return {**facts, "mask": {"sha256": hashlib.sha256(base64.b64decode(png)).hexdigest()}}


def _generation_texts(image: Image.Image) -> PngInfo | None:
    """The metadata that records how an image was generated; None where there is none."""
    texts, info = texts_of(image), PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    return info if texts else None


def save_inputs(inputs: JobInputs) -> None:
    """Write a request's images into its folder, re-encoded from pixels: no metadata of photos,
    except for the texts that record how an image was generated."""
    assert inputs.folder is not None
    folder = inputs.folder
    for name, image in inputs.images.items():
        source_type = source_type_of(image) or NONE  # as it was sent, without our mark
        save_image(image, folder / f"{name}.png", info=_generation_texts(image), source_type=source_type)
    for k, photo in enumerate(inputs.photos):
        save_image(Image.fromarray(photo.pixels), folder / "photos" / f"{k:03}.png", source_type=NONE)
        if photo.caption:
            atomic_write(folder / "photos" / f"{k:03}.txt", photo.caption.encode())
        if photo.mask is not None:
            grey = (photo.mask * 255).round().astype(np.uint8)
            save_image(Image.fromarray(grey), folder / "photos" / "masks" / f"{k:03}.png", source_type=NONE)


def load_inputs(folder: Path, names: Sequence[str]) -> JobInputs:
    """The inputs of a job that was accepted before a restart; names are those of its images."""
    images = {}
    for name in names:
        paths = [folder / f"{name}.png"]
        if name == "image":
            paths.append(folder / "picture.png")  # word: the name of the file in 0.1
        for path in paths:
            if path.exists():
                images[name] = Image.open(path).copy()
                break
    photos = load_photos(folder / "photos") if (folder / "photos").is_dir() else []
    return JobInputs(images, photos, folder, threading.Event())
