"""What the verbs teach and show do, around one call into the Studio each."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minikin import events, files
from minikin.cli import display
from minikin.errors import BadRecipe
from minikin.generation import lineage
from minikin.images import metadata as recipes_inside
from minikin.images.credentials import signature
from minikin.images.encode import save_image
from minikin.perfusion.concept import check_category, check_name
from minikin.perfusion.concept_file import save as save_concept
from minikin.recipes import Teach
from minikin.studio import Studio

OF_THE_GATE = {"beta", "tau", "word_rate", "positions", "captions"}  # options of teaching that mode row has not


def teach(
    photos: Path, recipe: Teach, out: Path | None, *, resume: bool, overwrite: bool, as_json: bool
) -> Path:  # fmt: skip
    """Teach and write the concept; what happens on the way goes into a folder beside it."""
    check_name(recipe.name)
    check_category(recipe.category)
    path = out or Path(f"{recipe.name}.safetensors")
    if path.suffix != ".safetensors":
        raise BadRecipe(f"--out must end in .safetensors, but it is {path}.")
    from minikin.images.photos import load_photos

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
            save_image(picture.image, beside / f"{picture.caption}.png")

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
            f"(best at {done.facts['best_step']})\nmasks, samples, result: {beside}/\n"
            f'try: minikin paint "a photo of <{recipe.name}> on the beach"'
        )
        if interrupted:
            display.out.print("Stopped early; the concept is usable. Go on with --resume.")
    if interrupted:
        raise SystemExit(130)
    return path


def advise(given: set[str], recipe: Teach, *, as_json: bool) -> None:
    """Say which of the options that were given do nothing, and what the base is when none was."""
    idle = sorted(given & OF_THE_GATE) if recipe.mode == "row" else []
    if idle:
        flags = ", ".join("--" + name.replace("_", "-") for name in idle)
        display.warn(f"No effect of {flags}: mode row has no gate. Teach with --mode gated.", as_json=as_json)
    if "base" not in given:
        display.note(
            "The base is tiny, the embedded toy model, which draws stickers. For photographs: `minikin models "
            "pull sd15`, then --base sd15.",
            as_json=as_json,
        )


def show(picture: Path, *, as_json: bool) -> None:
    """Print what an image records about itself."""
    found = recipes_inside.read(picture)
    signed = signature(picture)
    used, parents = lineage.concepts_of(found.recipe), lineage.forebears(found.recipe)
    if as_json:
        display.emit({"recipe": found.recipe, "prompt": found.prompt, "negative": found.negative,
                      "settings": found.settings, "source_type": found.source_type,
                      "concepts": used, "parents": parents, "content_credentials": signed})  # fmt: skip
        return
    prompt = found.prompt or found.recipe.get("recipe", {}).get("prompt", "")
    recorded = found.recipe or found.prompt or found.settings
    display.out.print(prompt if recorded else "No recipe: made with --no-metadata, or elsewhere.")
    if found.negative:
        display.out.print(f"negative: {found.negative}")
    for key, value in found.settings.items():
        display.out.print(f"  {key}: {value}")
    for name, sha256 in used.items():
        display.out.print(f"  Concept: {name}, content {sha256}", soft_wrap=True)
    for one in parents:
        told = one.get("file") or f"an image of pixels {one.get('pixels', '')}"
        how = f", {one['work']} {one.get('prompt')!r}, seed {one.get('seed')}" if "work" in one else ""
        display.out.print(f"  Made from: {told}{how}", soft_wrap=True)
    display.out.print(f"  Mark: {found.source_type or 'none'}")
    if signed:
        told = f"{signed['state']}, signed by {signed['by'] or 'nobody'}, {signed['program']}".rstrip(", ")
        display.out.print(f"  Content Credentials: {told}")


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
