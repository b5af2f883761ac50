"""What the verbs teach, paint, show and redo do, around one call into the Studio each."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minikin import events, files
from minikin.cli import display
from minikin.concepts.concept import check_category, check_name
from minikin.concepts.file import save as save_concept
from minikin.errors import BadRecipe
from minikin.painting import metadata as recipes_inside
from minikin.painting.output import Names, save_picture
from minikin.painting.paint import Painted
from minikin.painting.sheet import contact_sheet
from minikin.recipes import Paint, Teach
from minikin.studio import Studio


def teach(
    photos: Path, recipe: Teach, out: Path | None, *, resume: bool, overwrite: bool, as_json: bool
) -> Path:  # fmt: skip
    """Teach and write the concept; what happens on the way goes into a folder beside it."""
    check_name(recipe.name)
    check_category(recipe.category)
    path = out or Path(f"{recipe.name}.safetensors")
    if path.suffix != ".safetensors":
        raise BadRecipe(f"--out must end in .safetensors, but it is {path}.")
    from minikin.teaching.photos import load_photos

    loaded = load_photos(photos)
    beside = path.with_name(f"{path.stem}-teaching")
    checkpoint = beside / "checkpoint.safetensors"
    if path.exists() and not overwrite and not (resume and checkpoint.exists()):
        raise BadRecipe(
            f"{path} already exists. Choose another --out, replace it with --overwrite"
            + (", or go on with --resume." if checkpoint.exists() else ".")
        )
    with files.lock(path.with_name(f".{path.name}.lock"), str(path)), _stop_on_ctrl_c() as stop:
        studio = Studio.open(recipe.base, device=recipe.device, dtype=recipe.dtype)

        def keep(picture: events.Picture) -> None:
            beside.mkdir(parents=True, exist_ok=True)
            files.save_image(picture.image, beside / f"{picture.caption}.png")

        work = studio.teaching(loaded, recipe, checkpoint=checkpoint, resume=resume, stop=stop)
        done = display.run(work, as_json=as_json, on_picture=keep)
        save_concept(done.result, path, int8=recipe.int8)
    interrupted = done.facts["interrupted"]
    if not interrupted:
        checkpoint.unlink(missing_ok=True)
    facts = {"event": "done", "concept": str(path), "bytes": path.stat().st_size, **done.facts}
    if as_json:
        display.emit(facts)
    else:
        steps, seconds = done.facts["steps"], done.facts["seconds"]
        display.out.print(
            f"{path}  {facts['bytes']:,} bytes  {steps} steps in {seconds:.0f} s  "
            f"(best at {done.facts['best_step']})\nmasks and samples: {beside}/\n"
            f'try: minikin paint "a photo of <{recipe.name}> on the beach"'
        )
        if interrupted:
            display.out.print("Stopped early; the concept is usable. Go on with --resume.")
    if interrupted:
        raise SystemExit(130)
    return path


def paint(recipe: Paint, out: Path, *, metadata: bool, as_json: bool, only: int | None = None) -> list[Path]:
    """Paint and save, with a contact sheet for more than one picture; of one seed alone, if `only` names it."""
    studio = Studio.open(recipe.base, device=recipe.device, dtype=recipe.dtype)
    names = Names(recipe if only is None else recipe.model_copy(update={"n": 1}), out)
    paths: list[Path] = []

    def keep(picture: events.Picture) -> None:  # at once: an interruption loses nothing finished
        if only not in (None, picture.seed):
            return
        one = Painted(picture.image, picture.seed or 0)
        paths.append(save_picture(one, recipe, studio.facts(recipe), names, metadata=metadata))
        if as_json:
            display.emit({"event": "picture", "path": str(paths[-1]), "seed": one.seed})
        else:
            display.out.print(f"{paths[-1]}  seed {one.seed}", soft_wrap=True)

    done = display.run(studio.painting(recipe), as_json=as_json, on_picture=keep)
    sheet = None
    if len(paths) > 1:
        sheet = names.sheet()
        seeds = [f"seed {p.seed}" for p in done.result]
        files.save_image(contact_sheet([p.image for p in done.result], seeds), sheet)
    if as_json:
        display.emit({"event": "done", "pictures": len(paths), "sheet": str(sheet) if sheet else None})
    elif sheet:
        display.out.print(f"{sheet}  contact sheet", soft_wrap=True)
    return paths


def show(picture: Path, *, as_json: bool) -> None:
    """Print what a picture records about itself."""
    found = recipes_inside.read(picture)
    if as_json:
        display.emit({"recipe": found.recipe, "prompt": found.prompt, "negative": found.negative,
                      "settings": found.settings})  # fmt: skip
        return
    display.out.print(found.prompt or found.recipe.get("recipe", {}).get("prompt", ""), markup=False)
    if found.negative:
        display.out.print(f"negative: {found.negative}", markup=False)
    for key, value in found.settings.items():
        display.out.print(f"  {key}: {value}", markup=False)


def redo(picture: Path, out: Path, *, as_json: bool) -> Path:
    """Paint a picture again, in a batch like its own; prints the largest difference of any pixel."""
    found = recipes_inside.read(picture)
    if "recipe" not in found.recipe:
        raise BadRecipe(
            f"{picture} was not painted by Minikin, so it cannot be repeated exactly. `minikin show` prints "
            "its prompt and settings; give them to `minikin paint`."
        )
    points = found.recipe["recipe"].get("points") or {}  # those of then, or none, whatever was measured since
    seed = found.recipe["seed"]
    batch = found.recipe.get("batch") or {"seed": seed, "n": 1}
    settings = {**found.recipe["recipe"], "points": points, "seed": batch["seed"], "n": batch["n"]}
    recipe = Paint.make(**settings, batch=batch["n"])
    if out.suffix != ".png":
        out = out / f"{picture.stem}-again.png"
    (path,) = paint(recipe, out, metadata=True, as_json=as_json, only=seed)
    now = recipes_inside.read(path).recipe.get("concepts", {})
    for name, then in found.recipe.get("concepts", {}).items():
        if now.get(name, {}).get("sha256") != then.get("sha256"):
            display.warn(f"Concept '{name}' is not the one this picture was painted with; expect a difference.",
                         as_json=as_json)  # fmt: skip
    _warn_of_other_adapters(found.recipe, recipes_inside.read(path).recipe, as_json=as_json)
    before, after = (np.asarray(Image.open(p).convert("RGB"), np.int16) for p in (picture, path))
    difference = int(np.abs(before - after).max()) if before.shape == after.shape else 255
    if as_json:
        display.emit({"event": "redo", "largest_difference": difference})
    else:
        display.out.print(
            "identical" if difference == 0 else f"largest difference of any pixel: {difference} of 255"
        )
    return path


def _warn_of_other_adapters(then: dict[str, Any], now: dict[str, Any], *, as_json: bool) -> None:
    for name, adapter in then.get("adapters", {}).items():
        if now.get("adapters", {}).get(name, {}).get("sha256") != adapter.get("sha256"):
            display.warn(f"LoRA '{name}' is not the one this picture was painted with; expect a difference.",
                         as_json=as_json)  # fmt: skip


@contextmanager
def _stop_on_ctrl_c() -> Iterator[threading.Event]:
    """While inside, the first Ctrl-C sets the event; the second interrupts at once."""
    stop = threading.Event()

    def first(_signal: int, _frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)
        display.err.print("Finishing this step and saving; press Ctrl-C again to stop at once.")

    try:
        before = signal.signal(signal.SIGINT, first)
    except ValueError:  # not in the main thread
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
