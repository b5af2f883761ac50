"""The commands that make images: paint, refine, inpaint, redo. All of them show and save images in one way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minikin import events
from minikin.cli import display
from minikin.cli.options import ImageOptions
from minikin.errors import BadRecipe, Blocked
from minikin.generation import lineage
from minikin.generation.content_filter import Filtering, is_blocked, open_filtering, refusal
from minikin.generation.image import GeneratedImage
from minikin.generation.output import Names, save_generated
from minikin.generation.source import InitImage, SourceImage, inherited
from minikin.images import metadata
from minikin.images.encode import Marking, save_image
from minikin.images.photos import read_image
from minikin.images.sheet import contact_sheet
from minikin.recipes import Best, FilterMode, Inpaint, Paint, Refine
from minikin.studio import Studio

MAX_MEGAPIXEL_STEPS = 500.0  # of `redo` without --yes: 10 images of 1024 px in 50 steps
_SCORES = ("alignment", "likeness")  # word: keys in image metadata


def _event(path: Path | None, seed: int) -> dict[str, Any]:
    """The JSON output for one image."""
    return {"event": "picture", "path": str(path) if path else None, "seed": seed}  # word: JSON output of 0.1


class Saver:
    """Saves images as they are generated, and at the end a contact sheet of more than one.

    options  how images are written; marking: opened from them before any image is generated
    """

    def __init__(
        self, studio: Studio, out: Path, options: ImageOptions, marking: Marking, as_json: bool
    ) -> None:
        self.studio, self.out, self.options, self.marking = studio, out, options, marking
        self.as_json = as_json
        self.paths: list[Path] = []
        self.blocked = 0
        self.images: list[tuple[Image.Image, str]] = []  # with their captions
        self.names: Names | None = None

    def run(self, work: Iterator[events.Event], recipe: Paint, stem: str = "") -> None:
        """Run a command and save each image when it is ready: an interruption loses no finished image."""
        names = self.names = Names(recipe, self.out, stem)

        def save(event: events.ImageReady) -> None:
            self._save(GeneratedImage(event.image, event.seed or 0, event.verdict, event.record or {}), names)

        display.run(work, as_json=self.as_json, on_image=save)

    def choose(self, recipe: Paint, best: Best) -> None:
        """Save the best of many images, with their scores, when all are generated."""
        names = self.names = Names(recipe, self.out)
        done = display.run(self.studio.choosing(recipe, best), as_json=self.as_json)
        for image in done.result:
            self._save(image, names, image.record["chosen"])

    def _save(self, generated: GeneratedImage, names: Names, scores: dict[str, Any] | None = None) -> None:
        verdict = generated.verdict
        if is_blocked(verdict):
            self.blocked += 1
            if self.as_json:
                display.emit(_event(None, generated.seed) | {"filter": verdict})
            else:
                display.warn(f"seed {generated.seed}: blocked by the content filter; no image was written")
            return
        path = save_generated(generated, names, metadata=self.options.metadata, marking=self.marking)
        self.paths.append(path)
        if names.replaced:
            display.warn(f"{path} existed and was replaced.", as_json=self.as_json)
        text = ""
        if scores:
            values = (f"{k} {scores[k]:.3f}" for k in _SCORES if k in scores)
            text = f"  rank {scores['rank']} of {scores['of']}: {', '.join(values)}"
        self.images.append((generated.image, f"seed {generated.seed}{text}"))
        if self.as_json:
            row = _event(path, generated.seed) | (scores or {})
            display.emit(row | ({"filter": verdict} if verdict else {}))
        else:
            if verdict:
                text += f"  {verdict['action']} by the content filter"
            display.out.print(f"{path}  seed {generated.seed}{text}", soft_wrap=True)

    def end(self) -> list[Path]:
        """Write the contact sheet and print the last line. Raises Blocked when every image was blocked."""
        if self.blocked and not self.paths:
            raise Blocked(refusal(self.blocked, self.blocked))
        sheet = None
        images, captions = [image for image, _ in self.images], [caption for _, caption in self.images]
        if len(images) > 1 and len({image.size for image in images}) == 1 and self.names:
            sheet = self.names.sheet()
            save_image(contact_sheet(images, captions), sheet, marking=self.marking)
        if self.as_json:
            n = {"pictures": len(self.paths)}  # word: the JSON output of 0.1
            display.emit({"event": "done", **n, "sheet": str(sheet) if sheet else None})
        elif sheet:
            display.out.print(f"{sheet}  contact sheet", soft_wrap=True)
        return self.paths


def paint(
    recipe: Paint, out: Path, options: ImageOptions, *, as_json: bool, best: Best | None = None
) -> list[Path]:  # fmt: skip
    """Generate images and save them; with `best`, save the best of many."""
    marking = options.marking()
    studio = Studios(options.filter).of(recipe)
    saver = Saver(studio, out, options, marking, as_json)
    if best:
        saver.choose(recipe, best)
    else:
        saver.run(studio.painting(recipe), recipe)
    return saver.end()


def refine(
    paths: list[Path], values: dict[str, Any], out: Path, options: ImageOptions, *, as_json: bool
) -> list[Path]:  # fmt: skip
    """Refine images one after the other. `values` replaces options of the recipe that each image carries."""
    if out.suffix.lower() == ".png" and len(paths) > 1:
        raise BadRecipe(f"{len(paths)} images cannot all be saved as {out.name}: give --out a folder.")
    marking = options.marking()
    jobs = [(source, inherited(Refine, source, values)) for source in map(SourceImage.of, paths)]
    studios = Studios(options.filter)
    saver = None
    for source, recipe in jobs:
        studio = studios.of(recipe)
        saver = saver or Saver(studio, out, options, marking, as_json)
        saver.studio = studio
        saver.run(studio.refining(recipe, source), recipe, f"{Path(source.file).stem}-refined")
    assert saver is not None
    if len(jobs) > 1:
        saver.names = Names(jobs[0][1], out, "refined")
    return saver.end()


def inpaint(
    path: Path, mask: Path | None, values: dict[str, Any], out: Path, options: ImageOptions, *, as_json: bool
) -> list[Path]:  # fmt: skip
    """Inpaint one image under its mask."""
    marking = options.marking()
    source = SourceImage.of(path)
    recipe = inherited(Inpaint, source, values)
    studio = Studios(options.filter).of(recipe)
    saver = Saver(studio, out, options, marking, as_json)
    saver.run(studio.inpainting(recipe, source, mask), recipe, f"{path.stem}-inpainted")
    return saver.end()


class Studios:
    """A Studio for each base, opened when it is first needed."""

    def __init__(self, filter: FilterMode | None = None) -> None:
        self._filter = filter
        self._open: dict[tuple[str | None, ...], Studio] = {}

    def of(self, recipe: Paint) -> Studio:
        key = (recipe.base, recipe.device, recipe.dtype)
        if key not in self._open:
            how = {"device": recipe.device, "dtype": recipe.dtype}
            self._open[key] = Studio.open(recipe.base, filter=self._filter, **how)
        return self._open[key]


def redo(
    path: Path, out: Path, options: ImageOptions, *, sources: list[Path], base: str | None = None,
    yes: bool = False, as_json: bool,
) -> Path:  # fmt: skip
    """Repeat an image and the images it was made from; prints the largest difference of any pixel.

    The content filter checks the last image alone: the others are not written, and a blurred draft would lead
    to another image. Raises BadRecipe for an image of another program, or one that takes more than usual work
    without `yes`, and Blocked.
    """
    record = metadata.read(path).recipe
    if "recipe" not in record:
        raise BadRecipe(
            f"{path} was not painted by Minikin, so it cannot be repeated exactly. `minikin show` prints "
            "its prompt and settings; give them to `minikin paint`."
        )
    before = np.asarray(read_image(path).image.convert("RGB"), np.int16)
    cost = lineage.cost(record, (before.shape[1], before.shape[0]), base)
    if cost.megapixel_steps > MAX_MEGAPIXEL_STEPS and not yes:
        raise BadRecipe(f"The image's recipe asks for {cost}. If you trust it and have the time, add --yes.")
    display.note(f"Repeats {cost}.", as_json=as_json)
    _note_other_machine(record["recipe"], as_json=as_json)
    if out.suffix != ".png":
        out = out / f"{path.stem}-again.png"
    if out.exists() and out.samefile(path):
        raise BadRecipe(f"{out} is the image itself: give another --out, so that there are two to compare.")
    marking = options.marking()
    if out.exists():
        display.warn(f"{out} exists and will be replaced.", as_json=as_json)
    studios, filters = Studios(), list[Filtering | None]()

    def generate(recipe: Paint, init: InitImage | None) -> Iterator[events.Event]:
        studio = studios.of(recipe)
        if not filters:  # a filter that is not on this machine is an error before the first image
            filters.append(open_filtering(options.filter, studio.base))
        return studio.generating(recipe, init)

    def work() -> Iterator[events.Event]:
        repeated = yield from lineage.replay(record, generate, (*sources, path.parent), base)
        yield events.Done(repeated, {})

    image: GeneratedImage = display.run(work(), as_json=as_json).result
    if filters and filters[0]:
        (image,) = filters[0]([image])
    if is_blocked(image.verdict):
        raise Blocked(refusal(1, 1))
    image.record.update({k: record[k] for k in ("chosen",) if k in record})
    names = Names(lineage.recipe_of(record, base).model_copy(update={"n": 1}), out)
    new_path = save_generated(image, names, marking=marking)
    _warn_of_others(record, image.record, as_json=as_json)
    after = np.asarray(read_image(new_path).image.convert("RGB"), np.int16)
    difference = int(np.abs(before - after).max()) if before.shape == after.shape else 255
    _report_repeated(new_path, image, difference, as_json=as_json)
    return new_path


def _report_repeated(path: Path, image: GeneratedImage, difference: int, *, as_json: bool) -> None:
    """Print where the repeated image is, and its largest difference from the original (0 to 255)."""
    if as_json:
        display.emit(_event(path, image.seed))
        display.emit({"event": "redo", "largest_difference": difference})
        return
    action = f"  {image.verdict['action']} by the content filter" if image.verdict else ""
    display.out.print(f"{path}  seed {image.seed}{action}", soft_wrap=True)
    display.out.print(
        "identical" if difference == 0 else f"largest difference of any pixel: {difference} of 255"
    )


def _note_other_machine(recipe: dict[str, Any], *, as_json: bool) -> None:
    """Say that the recorded backend or device is not used: both are this machine's choice."""
    recorded = Paint.current(recipe)
    others = [
        f"{name} {recorded[name]}"
        for name in lineage.NOT_REPEATED
        if recorded.get(name) not in (None, "", "eager")
    ]
    if others:
        text = (
            f"It was painted with {' and '.join(others)}; here the usual is used, so expect small differences."
        )
        display.note(text, as_json=as_json)


def _warn_of_others(recorded: dict[str, Any], now: dict[str, Any], *, as_json: bool) -> None:
    """Warn of concepts and LoRAs that are not the recorded ones."""
    for kind, title in (("concepts", "Concept"), ("adapters", "LoRA")):
        for name, entry in recorded.get(kind, {}).items():
            if now.get(kind, {}).get(name, {}).get("sha256") != entry.get("sha256"):
                text = f"{title} '{name}' is not the one this image was painted with; expect a difference."
                display.warn(text, as_json=as_json)
