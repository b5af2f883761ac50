"""The commands teach and show."""

from __future__ import annotations

from pathlib import Path

from minikin import events, files
from minikin.cli import display
from minikin.cli.flags import flag
from minikin.errors import BadRecipe, MinikinError
from minikin.generation import lineage
from minikin.images import metadata
from minikin.images.credentials import signature
from minikin.images.encode import save_image
from minikin.perfusion import library
from minikin.perfusion.concept import check_category, check_name
from minikin.perfusion.concept_file import save as save_concept
from minikin.recipes import Teach
from minikin.studio import Studio
from minikin.training.signals import interruptible

GATED_OPTIONS = {"beta", "tau", "word_lr", "positions", "captions"}  # without effect in mode value


def teach(
    photos: Path, recipe: Teach, out: Path | None, *, resume: bool, overwrite: bool, as_json: bool
) -> Path:  # fmt: skip
    """Teach a concept and write its file; masks, samples and the checkpoint go into NAME-teaching/."""
    check_name(recipe.name)
    check_category(recipe.category)
    path = out or Path(f"{recipe.name}.safetensors")
    if path.suffix != ".safetensors":
        raise BadRecipe(f"--out must end in .safetensors, but it is {path}.")
    from minikin.images.photos import load_photos

    loaded = load_photos(photos, lambda text: display.warn(text, as_json=as_json))
    beside = path.with_name(f"{path.stem}-teaching")
    checkpoint = beside / "checkpoint.safetensors"
    if path.exists() and not overwrite and not (resume and checkpoint.exists()):
        raise BadRecipe(
            f"{path} already exists. Choose another --out, replace it with --overwrite"
            + (", or go on with --resume." if checkpoint.exists() else ".")
        )
    with files.lock(path.with_name(f".{path.name}.lock"), str(path)), interruptible(_note_stop) as stop:
        studio = Studio.open(recipe.base, device=recipe.device, dtype=recipe.dtype)

        def save(event: events.ImageReady) -> None:
            beside.mkdir(parents=True, exist_ok=True)
            save_image(event.image, beside / f"{event.caption}.png")

        work = studio.teaching(loaded, recipe, checkpoint=checkpoint, resume=resume, stop=stop)
        done = display.run(work, as_json=as_json, on_image=save)
        before = path.read_bytes() if path.exists() else None
        save_concept(done.result, path, int8=recipe.int8)
        _into_library(path, recipe.name, before, as_json=as_json)
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


def _into_library(path: Path, name: str, before: bytes | None, *, as_json: bool) -> None:
    """Put the concept into the library, where the page and other folders find it; a problem is a note."""
    try:
        if library.follow(path, name, before):
            return
        text = (
            f"Your library has another concept '{name}', which the page and other folders go on using. To use "
            f"this one there: minikin concepts remove {name}, then minikin concepts add {path}"
        )
    except MinikinError as e:
        text = f"The concept is in {path} alone, because your library cannot be written: {e}"
    display.warn(text, as_json=as_json)


def advise(options: set[str], recipe: Teach, *, as_json: bool) -> None:
    """Warn of options that have no effect, and name the base when no option did."""
    unused = sorted(options & GATED_OPTIONS) if recipe.mode == "value" else []
    if unused:
        flags = ", ".join(flag(name) for name in unused)
        display.warn(f"No effect of {flags}: mode value has no gate. Teach with --mode gated.", as_json=as_json)
    if "base" not in options:
        display.note(
            "The base is tiny, the embedded toy model, which draws stickers. For photographs: `minikin models "
            "pull sd15`, then --base sd15.",
            as_json=as_json,
        )


def show(path: Path, *, as_json: bool) -> None:
    """Print the recipe in an image, the images it was made from, its mark and its signature."""
    image = metadata.read(path)
    signed = signature(path)
    used, parents = lineage.concepts_of(image.recipe), lineage.ancestors(image.recipe)
    if as_json:
        display.emit({"recipe": image.recipe, "prompt": image.prompt, "negative": image.negative,
                      "settings": image.settings, "source_type": image.source_type,
                      "concepts": used, "parents": parents, "content_credentials": signed})  # fmt: skip
        return
    prompt = image.prompt or image.recipe.get("recipe", {}).get("prompt", "")
    has_recipe = image.recipe or image.prompt or image.settings
    display.out.print(prompt if has_recipe else "No recipe: made with --no-metadata, or by another program.")
    if image.negative:
        display.out.print(f"negative: {image.negative}")
    for key, value in image.settings.items():
        display.out.print(f"  {key}: {value}")
    for name, sha256 in used.items():
        display.out.print(f"  Concept: {name}, content {sha256}", soft_wrap=True)
    for parent in parents:
        name = parent.get("file") or f"an image of pixels {parent.get('pixels', '')}"
        work = (
            f", {parent['work']} {parent.get('prompt')!r}, seed {parent.get('seed')}"
            if "work" in parent
            else ""
        )
        display.out.print(f"  Made from: {name}{work}", soft_wrap=True)
    display.out.print(f"  Mark: {image.source_type or 'none'}")
    if signed:
        text = f"{signed['state']}, signed by {signed['by'] or 'nobody'}, {signed['program']}".rstrip(", ")
        display.out.print(f"  Content Credentials: {text}")


def _note_stop() -> None:
    display.err.print("Finishing this step and saving; press Ctrl-C again to stop at once.")
