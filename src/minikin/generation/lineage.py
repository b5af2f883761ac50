"""Chains: an image painted again from its record, with the images it was made from.

A record says what was done last (`work`), with which recipe, and on which `parent`, whose own record it
holds. So a draft that was refined and then inpainted comes back from the last image alone. A parent
that Minikin did not paint has to be at hand; its hash tells whether it is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from minikin import events
from minikin.errors import BadPhoto, BadRecipe
from minikin.generation.canvas import mask_of_text, read_mask
from minikin.generation.img2img import Job
from minikin.generation.sampler import Painted
from minikin.generation.source import Source, pixels_hash
from minikin.recipes import Inpaint, Paint, Refine

WORKS: dict[str, type[Paint]] = {"paint": Paint, "refine": Refine, "inpaint": Inpaint}
Painter = Callable[[Paint, Job | None], Iterator[events.Event]]


def work_of(recipe: Paint) -> str:
    """The name of a kind of work, as records have it."""
    return next(name for name, kind in WORKS.items() if type(recipe) is kind)


def recipe_of(made: dict[str, Any]) -> Paint:
    """The recipe of a recorded image together with those computed in its batch.

    In a batch like its own, because processors round differently for others; with the concepts' points
    of then, or none, whatever was measured since. Raises BadRecipe.
    """
    kind = WORKS.get(made.get("work", "paint"))
    if kind is None:
        raise BadRecipe(f"This image was made by '{made['work']}', which this version of Minikin cannot do.")
    batch = made.get("batch") or {"seed": made["seed"], "n": 1}
    points = made["recipe"].get("points") or {}
    told = {**made["recipe"], "points": points, "seed": batch["seed"], "n": batch["n"]}
    recipe: Paint = kind.make(**told, batch=batch["n"])
    return recipe


def again(
    made: dict[str, Any], painter: Painter, folders: tuple[Path, ...] = ()
) -> Generator[events.Event, None, Painted]:
    """Paint a recorded image again, its forebears first; returns it.

    painter  paints a recipe, on an image if there is one: `Studio.working` of the recipe's base
    folders  or files where images and masks lie that the record does not hold
    Raises BadRecipe, and BadPhoto for an image that is not at hand or another one.
    """
    _check(made)
    recipe = recipe_of(made)
    if recipe.n > 1:
        yield events.Note(
            f"It was painted in a batch of {recipe.n}: all of them are painted again, because processors round "
            "otherwise for other batches, and this one is kept."
        )
    job = None
    if "parent" in made:
        parent = made["parent"]
        source = yield from _parent(parent, painter, folders)
        job = Job(source, _mask(made, source, folders))
    for event in painter(recipe, job):
        if isinstance(event, events.Done):
            found: Painted = next(one for one in event.result if one.seed == made["seed"])
            return found
        if not isinstance(event, events.Picture):
            yield event
    raise AssertionError("a painter ends with Done")


def _check(made: Any) -> None:
    """Raise BadPhoto for a record that no Minikin wrote."""
    told = made if isinstance(made, dict) else {}
    seed, parent = told.get("seed"), told.get("parent", {"pixels": ""})
    batch = told.get("batch") or {"seed": seed, "n": 1}
    tables = [told.get("mask") or {}]  # of settings, by name: dicts of dicts
    for kind in ("concepts", "adapters"):
        by_name = told.get(kind) or {}
        tables += [by_name, *(by_name.values() if isinstance(by_name, dict) else ())]
    sound = (
        isinstance(told.get("recipe"), dict) and isinstance(seed, int)
        and isinstance(told.get("work", "paint"), str) and all(isinstance(t, dict) for t in tables)
        and isinstance(batch, dict) and all(isinstance(batch.get(k), int) for k in ("seed", "n"))
        and batch["seed"] <= seed < batch["seed"] + batch["n"]
        and isinstance(parent, dict) and isinstance(parent.get("pixels"), str)
    )  # fmt: skip
    if not sound:
        raise BadPhoto("The image's record is damaged or not Minikin's: it cannot be painted again by it.")


def forebears(made: dict[str, Any]) -> list[dict[str, Any]]:
    """What a recorded image was made from, the nearest first; whoever wrote the record.

    file, sha256, pixels  of the image, where they are recorded
    work, prompt, seed, concepts  how it was made itself; left out for an image of elsewhere
    """
    found = []
    while isinstance(parent := made.get("parent"), dict):
        made = inside if isinstance(inside := parent.get("made"), dict) else {}
        recipe = inside if isinstance(inside := made.get("recipe"), dict) else {}
        told = {k: parent.get(k) for k in ("file", "sha256", "pixels")}
        if made:
            told |= {
                "work": made.get("work", "paint"), "prompt": recipe.get("prompt"), "seed": made.get("seed"),
                "concepts": concepts_of(made),
            }  # fmt: skip
        found.append({k: v for k, v in told.items() if v is not None})
    return found


def concepts_of(made: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the concepts in a record by name; whoever wrote it."""
    told = made.get("concepts")
    return {
        name: str(it.get("sha256", "")) for name, it in (told if isinstance(told, dict) else {}).items()
        if isinstance(it, dict)
    }  # fmt: skip


def _parent(
    parent: dict[str, Any], painter: Painter, folders: tuple[Path, ...]
) -> Generator[events.Event, None, Source]:
    if "made" not in parent:
        return _found(parent, folders)
    painted = yield from again(parent["made"], painter, folders)
    source = Source(
        painted.image.convert("RGB"), parent.get("file", ""), parent.get("sha256", ""), parent["made"]
    )
    if source.pixels != parent["pixels"]:
        yield events.Note(
            f"{source.file or 'The picture it was made from'} came out otherwise than then; expect a "
            "difference.",
            warning=True,
        )
    return source


def _found(parent: dict[str, Any], folders: tuple[Path, ...]) -> Source:
    """A parent that has no record here, from a file of its name with its pixels."""
    name = parent.get("file", "")
    for path in _places(name, folders):
        source = Source.of(path)
        # its pixels as they are read now, the file itself, or its pixels without regard to a colour profile
        if parent["pixels"] == source.pixels or source.sha256 == parent.get("sha256"):
            return source
        with Image.open(path) as opened:
            raw = ImageOps.exif_transpose(opened).convert("RGB")
        if pixels_hash(raw) == parent["pixels"]:
            return replace(source, image=raw)
    why = "its record was too long to be kept" if parent.get("left_out") else "Minikin did not paint that"
    raise BadPhoto(
        f"This image was made from {name or 'a picture that was no file'} "
        f"({parent['pixels'][:12]}), and {why}. No file with those pixels is at hand: give it with --source."
    )


def _mask(made: dict[str, Any], source: Source, folders: tuple[Path, ...]) -> Any:
    told = made.get("mask")
    if not told:
        return None
    if "png" in told:
        return mask_of_text(told["png"], source.image.size)
    for path in _places(told.get("file", ""), folders):
        if hashlib.sha256(path.read_bytes()).hexdigest() == told["sha256"]:
            return read_mask(path, source.image.size)
    raise BadPhoto(
        f"The mask {told.get('file')} ({told['sha256'][:12]}) is too large to be inside the image, and no "
        "file of that name and content is at hand: put it beside the image, or give it with --source."
    )


def _places(name: str, folders: tuple[Path, ...]) -> Iterator[Path]:
    """Files that may be the one of this name: those given, and those of the name in folders given."""
    for place in folders:
        if place.is_file():
            yield place
        elif name and (place / Path(name).name).is_file():
            yield place / Path(name).name
