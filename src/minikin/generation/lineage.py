"""Lineage: replay an image from its record, together with the images it was made from.

A record names the last task (`work`), its recipe, and its `parent`, whose own record it holds. So a draft that
was refined and then inpainted is replayed from the last image alone. A parent that Minikin did not generate
must be at hand; its hash tells whether it is the same.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from minikin import events
from minikin.errors import BadPhoto, BadRecipe
from minikin.generation.canvas import mask_of_text, read_mask
from minikin.generation.image import GeneratedImage
from minikin.generation.source import InitImage, SourceImage, base_of_record, pixels_hash
from minikin.images.metadata import MAX_ANCESTORS
from minikin.images.photos import read_bytes
from minikin.images.pixels import kind_of
from minikin.recipes import Inpaint, Paint, Refine

NOT_REPEATED = ("backend", "device")
USUAL_STEPS = 30  # for estimates, where a recipe leaves them to the preset
TASKS: dict[str, type[Paint]] = {"paint": Paint, "refine": Refine, "inpaint": Inpaint}
Generate = Callable[[Paint, InitImage | None], Iterator[events.Event]]


def task_name(recipe: Paint) -> str:
    """The name of a recipe's kind in records."""
    return next(name for name, kind in TASKS.items() if type(recipe) is kind)


def recipe_of(record: dict[str, Any], base: str | None = None) -> Paint:
    """The recipe of a recorded image and of the images of its batch.

    The whole batch, because processors round differently for other sizes; with the concepts' operating points
    of that time, or none, whatever was measured since. How and where it is computed is this machine's choice.
    base  in place of the recorded one, which must not be a path: an image may come from anybody
    Raises BadRecipe.
    """
    kind = TASKS.get(record.get("work", "paint"))
    if kind is None:
        raise BadRecipe(
            f"This image was made by '{str(record['work'])[:40]}', which this version of Minikin cannot do."
        )
    batch = record.get("batch") or {"seed": record["seed"], "n": 1}
    options = {k: v for k, v in kind.current(record["recipe"]).items() if k not in NOT_REPEATED}
    options.setdefault("regions", "prompt")  # of version 0.1, which found none
    options |= {"points": options.get("points") or {}, "seed": batch["seed"], "n": batch["n"]}
    options["base"] = base or base_of_record(options)
    return kind.make(**options | {"batch": batch["n"]})  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Cost:
    """What repeating an image takes: its bases, images, their largest size, and megapixels times steps."""

    bases: tuple[str, ...]
    images: int
    size: tuple[int, int]
    megapixel_steps: float

    def __str__(self) -> str:
        many = f"{self.images} images" if self.images > 1 else "1 image"
        return (
            f"{many} of up to {self.size[0]}x{self.size[1]} with {' and '.join(self.bases)}, "
            f"{self.megapixel_steps:,.1f} megapixel-steps"
        )


def cost(record: dict[str, Any], size: tuple[int, int], base: str | None = None) -> Cost:
    """What `replay` of a record takes. Raises what `replay` raises for records that are damaged or too long.

    size  (width, height) of the image, for recipes that leave it to the base
    """
    recipes: list[Paint] = []
    following: Any = record
    while following is not None:
        _check(following)
        recipes.append(recipe_of(following, base))
        if len(recipes) > MAX_ANCESTORS + 1:
            raise BadPhoto(
                f"The image names over {MAX_ANCESTORS} images it was made from; no Minikin keeps so many."
            )
        following = following.get("parent", {}).get("made")
    sizes = [(r.width or size[0], r.height or size[1]) for r in recipes]
    steps = sum(r.n * (r.steps or USUAL_STEPS) * w * h for r, (w, h) in zip(recipes, sizes, strict=True))
    bases = tuple(dict.fromkeys(r.base for r in recipes))
    return Cost(bases, sum(r.n for r in recipes), max(sizes), steps / 1e6)


def replay(
    record: dict[str, Any], generate: Generate, folders: tuple[Path, ...] = (), base: str | None = None
) -> Generator[events.Event, None, GeneratedImage]:
    """Generate a recorded image again, its ancestors first; returns it.

    generate  runs a recipe, on an image if there is one: `Studio.generating` of the recipe's base
    folders   or files where images and masks lie that the record does not hold
    base      of all of them, in place of the recorded ones
    Raises BadRecipe, and BadPhoto for an image that is not at hand or another one.
    """
    _check(record)
    recipe = recipe_of(record, base)
    if recipe.n > 1:
        yield events.Note(
            f"It was painted in a batch of {recipe.n}: all of them are painted again, because processors round "
            "otherwise for other batches, and this one is kept."
        )
    init = None
    if "parent" in record:
        source = yield from _parent(record["parent"], generate, folders, base)
        init = InitImage(source, _mask(record, source, folders))
    for event in generate(recipe, init):
        if isinstance(event, events.Done):
            images: list[GeneratedImage] = event.result
            return next(image for image in images if image.seed == record["seed"])
        if not isinstance(event, events.ImageReady):
            yield event
    raise AssertionError("the events of a task end with Done")


def _check(record: Any) -> None:
    """Raise BadPhoto for a record that no Minikin wrote."""
    values = record if isinstance(record, dict) else {}
    seed, parent = values.get("seed"), values.get("parent", {"pixels": ""})
    batch = values.get("batch") or {"seed": seed, "n": 1}
    mask = values.get("mask") or {}
    tables = [mask]  # of settings, by name: dicts of dicts
    for kind in ("concepts", "adapters"):
        by_name = values.get(kind) or {}
        tables += [by_name, *(by_name.values() if isinstance(by_name, dict) else ())]
    sound = (
        isinstance(values.get("recipe"), dict) and type(seed) is int
        and isinstance(values.get("work", "paint"), str) and all(isinstance(t, dict) for t in tables)
        and isinstance(batch, dict) and all(type(batch.get(k)) is int for k in ("seed", "n"))
        and batch["seed"] <= seed < batch["seed"] + batch["n"]
        and isinstance(parent, dict) and isinstance(parent.get("pixels"), str)
        and all(isinstance(t.get(k, ""), str) for t in (parent, mask) for k in ("file", "sha256", "png"))
        and isinstance(parent.get("made", {}), dict)
    )  # fmt: skip
    if not sound:
        raise BadPhoto("The image's record is damaged or not Minikin's: it cannot be painted again by it.")


def ancestors(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The images that a recorded image was made from, the nearest first; whoever wrote the record.

    file, sha256, pixels          of the image, where they are recorded
    work, prompt, seed, concepts  how it was generated; left out for an image of another origin
    """
    lineage = []
    while isinstance(parent := record.get("parent"), dict):
        record = inside if isinstance(inside := parent.get("made"), dict) else {}
        recipe = inside if isinstance(inside := record.get("recipe"), dict) else {}
        entry = {k: parent.get(k) for k in ("file", "sha256", "pixels")}
        if record:
            entry |= {
                "work": record.get("work", "paint"), "prompt": recipe.get("prompt"), "seed": record.get("seed"),
                "concepts": concepts_of(record),
            }  # fmt: skip
        lineage.append({k: v for k, v in entry.items() if v is not None})
    return lineage


def concepts_of(record: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the concepts in a record by name; whoever wrote it."""
    concepts = record.get("concepts")
    return {
        name: str(entry.get("sha256", ""))
        for name, entry in (concepts if isinstance(concepts, dict) else {}).items()
        if isinstance(entry, dict)
    }


def _parent(
    parent: dict[str, Any], generate: Generate, folders: tuple[Path, ...], base: str | None
) -> Generator[events.Event, None, SourceImage]:
    if "made" not in parent:
        return _from_files(parent, folders)
    generated = yield from replay(parent["made"], generate, folders, base)
    source = SourceImage(
        generated.image.convert("RGB"), parent.get("file", ""), parent.get("sha256", ""), parent["made"]
    )
    if source.pixels != parent["pixels"]:
        yield events.Note(
            f"{source.file or 'The image it was made from'} came out otherwise than then; expect a difference.",
            warning=True,
        )
    return source


def _from_files(parent: dict[str, Any], folders: tuple[Path, ...]) -> SourceImage:
    """A parent that has no record here, from a file of its name with its pixels."""
    name = parent.get("file", "")
    for path in _candidates(name, folders):
        source = SourceImage.of(path)
        # its pixels as they are read now, the file itself, or its pixels without regard to a colour profile
        if parent["pixels"] == source.pixels or source.sha256 == parent.get("sha256"):
            return source
        data = read_bytes(path)
        with Image.open(io.BytesIO(data), formats=(kind_of(data),)) as opened:
            raw = ImageOps.exif_transpose(opened).convert("RGB")
        if pixels_hash(raw) == parent["pixels"]:
            return replace(source, image=raw)
    why = "its record was too long to be kept" if parent.get("left_out") else "Minikin did not paint that"
    raise BadPhoto(
        f"This image was made from {name or 'an image that was no file'} "
        f"({parent['pixels'][:12]}), and {why}. No file with those pixels is at hand: give it with --source."
    )


def _mask(record: dict[str, Any], source: SourceImage, folders: tuple[Path, ...]) -> Any:
    mask = record.get("mask")
    if not mask:
        return None
    if "png" in mask:
        return mask_of_text(mask["png"], source.image.size)
    for path in _candidates(mask.get("file", ""), folders):
        if hashlib.sha256(read_bytes(path)).hexdigest() == mask.get("sha256"):
            return read_mask(path, source.image.size)
    raise BadPhoto(
        f"The mask {mask.get('file')} ({mask.get('sha256', '')[:12]}) is too large to be inside the image, and "
        "no file of that name and content is at hand: put it beside the image, or give it with --source."
    )


def _candidates(name: str, folders: tuple[Path, ...]) -> Iterator[Path]:
    """Files that may be the one of this name: those given, and those of the name in folders given."""
    for place in folders:
        if place.is_file():
            yield place
        elif name and os.path.isfile(place / Path(name).name):  # False for names that are too long
            yield place / Path(name).name
