"""Generated images to files: names that do not collide, and the record inside."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from minikin import __version__
from minikin.errors import BadRecipe
from minikin.files import atomic_write
from minikin.generation.image import GeneratedImage
from minikin.images import xmp
from minikin.images.encode import MARKED, Marking, save_image
from minikin.images.metadata import png_info
from minikin.recipes import Paint

LARGEST_MASK = 30_000  # characters of base64 inside an image; a brush of 1024 px takes about a tenth
UNSUPPORTED = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def parameters(record: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The `Key: value` pairs of A1111's infotext for one image of this record and (width, height)."""
    return {
        "Steps": record["recipe"]["steps"],
        "Sampler": record["sampler"],
        "Schedule type": record.get("schedule"),
        "CFG scale": f"{record['guidance']:g}",
        "Seed": record["seed"],
        "Clip skip": skip if (skip := record["recipe"].get("clip_skip", 1)) != 1 else None,
        "Denoising strength": record["recipe"].get("strength"),
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": record["base"]["fingerprint"][:10],
        "Model": record["base"]["name"],
        "RNG": "CPU",
        "Preset": record["preset"],
        "Lora hashes": ", ".join(f"{n}: {a['sha256'][:10]}" for n, a in record["adapters"].items()),
        "Content filter": record.get("filter", {}).get("action"),
        "Version": f"minikin {__version__}",
    }


def png_texts(record: dict[str, Any], size: tuple[int, int]) -> PngInfo:
    """The texts of a PNG: our JSON record, and A1111's infotext."""
    recipe = record["recipe"]
    return png_info(record, recipe["prompt"], recipe["negative"], parameters(record, size))


class Names:
    """File names for the images of one run that collide with nothing already there.

    out   a folder, or a .png name (numbered by seed when there are several images)
    stem  how names begin in a folder; the prompt's words by default
    """

    def __init__(self, recipe: Paint, out: Path, stem: str = "") -> None:
        if out.suffix.lower() in UNSUPPORTED:
            raise BadRecipe(f"Images are written as PNG: give --out a folder or NAME.png, not {out.name}.")
        is_file = out.suffix.lower() == ".png"
        self.single = out if is_file and recipe.n == 1 else None
        self.folder = out.parent if is_file else out
        self.replaced = self.single is not None and self.single.exists()
        self.stem = out.stem if is_file else stem or stem_of(recipe.prompt)
        self.used = {p.name for p in self.folder.glob(f"{self.stem}-*")} if self.folder.is_dir() else set()

    def image(self, seed: int) -> Path:
        return self.single or self._free(str(seed))

    def sheet(self) -> Path:
        return self._free("sheet")

    def _free(self, tail: str) -> Path:
        name, k = f"{self.stem}-{tail}.png", 2
        while name in self.used:
            name, k = f"{self.stem}-{tail}.{k}.png", k + 1
        self.used.add(name)
        return self.folder / name


def stem_of(prompt: str) -> str:
    """How the file names of a prompt's images begin: its words."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return "-".join(words)[:40].strip("-") or "picture"  # word: names of files stay


def save_generated(
    generated: GeneratedImage, names: Names, *, metadata: bool = True, marking: Marking = MARKED
) -> Path:
    """Write one PNG with its mark and, with `metadata`, its record inside; returns its path."""
    path, record = names.image(generated.seed), generated.record
    info = png_texts(_with_mask_file(record, path), generated.image.size) if metadata else None
    return save_image(generated.image, path, marking, info=info, source_type=record[xmp.KEY])


def _with_mask_file(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """The record; a mask that is too large for it goes into a file beside the image."""
    text = record.get("mask", {}).get("png", "")
    if len(text) <= LARGEST_MASK:
        return record
    data = base64.b64decode(text)
    mask_file = atomic_write(path.with_suffix(".mask.png"), data)
    return {**record, "mask": {"file": mask_file.name, "sha256": hashlib.sha256(data).hexdigest()}}
