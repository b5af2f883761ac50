"""Painted images to files: names that do not collide, recipes inside."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minikin import __version__
from minikin.errors import BadRecipe
from minikin.files import atomic_write
from minikin.images import xmp
from minikin.images.encode import MARKED, Marking, save_image
from minikin.images.metadata import png_info
from minikin.recipes import Paint

if TYPE_CHECKING:
    from minikin.generation.sampler import Painted

LARGEST_MASK = 30_000  # characters of base64 inside an image; a brush of 1024 px takes about a tenth


def settings(facts: dict[str, Any], seed: int, size: tuple[int, int]) -> dict[str, Any]:
    """The `Key: value` pairs of A1111's infotext for one image of this (width, height)."""
    return {
        "Steps": facts["recipe"]["steps"],
        "Sampler": facts["sampler"],
        "CFG scale": f"{facts['guidance']:g}",
        "Seed": seed,
        "Denoising strength": facts["recipe"].get("strength"),
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": facts["base"]["fingerprint"][:10],
        "Model": facts["base"]["name"],
        "RNG": "CPU",
        "Preset": facts["preset"],
        "Lora hashes": ", ".join(f"{n}: {a['sha256'][:10]}" for n, a in facts["adapters"].items()),
        "Content filter": facts.get("filter", {}).get("action"),
        "Version": f"minikin {__version__}",
    }


class Names:
    """File names for the images of one run that collide with nothing already there.

    out   a folder, or a .png name (numbered by seed when there are several images)
    stem  how names begin in a folder; the prompt's words by default
    """

    def __init__(self, recipe: Paint, out: Path, stem: str = "") -> None:
        if out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
            raise BadRecipe(f"Images are written as PNG: give --out a folder or NAME.png, not {out.name}.")
        words = re.findall(r"[a-z0-9]+", recipe.prompt.lower())
        self.single = out if out.suffix.lower() == ".png" and recipe.n == 1 else None
        named = out.suffix.lower() == ".png"
        self.folder = out.parent if named else out
        self.replaced = self.single is not None and self.single.exists()
        self.stem = out.stem if named else stem or "-".join(words)[:40].strip("-") or "picture"
        self.taken = {p.name for p in self.folder.glob(f"{self.stem}-*")} if self.folder.is_dir() else set()

    def picture(self, seed: int) -> Path:
        return self.single or self._free(str(seed))

    def sheet(self) -> Path:
        return self._free("sheet")

    def _free(self, tail: str) -> Path:
        name, k = f"{self.stem}-{tail}.png", 2
        while name in self.taken:
            name, k = f"{self.stem}-{tail}.{k}.png", k + 1
        self.taken.add(name)
        return self.folder / name


def save_picture(
    one: Painted, recipe: Paint, facts: dict[str, Any], names: Names, *, metadata: bool = True,
    marking: Marking = MARKED,
) -> Path:  # fmt: skip
    """Write one PNG with its mark and, with `metadata`, its recipe inside; returns its path."""
    path = names.picture(one.seed)
    if one.verdict:
        facts = {**facts, "filter": one.verdict}
    if metadata:
        facts = _mask_beside(facts, path)
    info = _info(recipe, facts, one) if metadata else None
    return save_image(one.image, path, marking, info=info, source_type=facts[xmp.KEY])


def _mask_beside(facts: dict[str, Any], path: Path) -> dict[str, Any]:
    """The facts with a mask that is too large for an image's record in a file of its own."""
    text = facts.get("mask", {}).get("png", "")
    if len(text) <= LARGEST_MASK:
        return facts
    data = base64.b64decode(text)
    beside = atomic_write(path.with_suffix(".mask.png"), data)
    return {**facts, "mask": {"file": beside.name, "sha256": hashlib.sha256(data).hexdigest()}}


def _info(recipe: Paint, facts: dict[str, Any], one: Painted) -> Any:
    batch = recipe.together(one.seed)  # processors round differently for batches of other sizes
    own = {**facts, "seed": one.seed, "batch": {"seed": batch[0], "n": len(batch)}}
    return png_info(own, recipe.prompt, recipe.negative, settings(facts, one.seed, one.image.size))
