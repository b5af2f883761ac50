"""What the verbs that make images do: paint, refine, inpaint, redo. One way of showing and saving for all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minikin import events
from minikin.cli import display
from minikin.errors import BadRecipe, Blocked
from minikin.generation import lineage
from minikin.generation.canvas import read_mask
from minikin.generation.content_filter import Filtering, is_blocked, open_filtering, refusal
from minikin.generation.img2img import Job
from minikin.generation.output import Names, save_picture
from minikin.generation.sampler import Painted
from minikin.generation.source import Source, inherited
from minikin.images import metadata as recipes_inside
from minikin.images.encode import MARKED, Marking, save_image
from minikin.images.sheet import contact_sheet
from minikin.recipes import Best, Inpaint, Mode, Paint, Refine
from minikin.studio import Studio


@dataclass(frozen=True)
class Giving:
    """How images are given out: with their recipes, marked how, and what becomes of what a filter finds."""

    metadata: bool = True
    marking: Marking = MARKED
    filter: Mode | None = None


class Saver:
    """Saves images as they come, and a contact sheet of more than one at the end."""

    def __init__(self, studio: Studio, out: Path, giving: Giving, *, as_json: bool) -> None:
        self.studio, self.out, self.giving, self.as_json = studio, out, giving, as_json
        self.paths: list[Path] = []
        self.blocked = 0
        self.shown: list[tuple[Image.Image, str]] = []
        self.names: Names | None = None

    def run(self, work: Iterator[events.Event], recipe: Paint, job: Job | None = None, stem: str = "") -> None:
        """Show what a verb tells and save each image at once: an interruption loses nothing finished."""
        names = self.names = Names(recipe, self.out, stem)

        def keep(picture: events.Picture) -> None:
            facts = self.studio.facts(recipe, job)
            self._save(Painted(picture.image, picture.seed or 0, picture.verdict), recipe, facts, names)

        display.run(work, as_json=self.as_json, on_picture=keep)

    def choose(self, recipe: Paint, best: Best) -> None:
        """The best of many: saved when all are painted, with what the judge found."""
        names = self.names = Names(recipe, self.out)
        done = display.run(self.studio.choosing(recipe, best), as_json=self.as_json)
        drafts = best.drafts(recipe)
        for one in done.result:
            found = done.facts["chosen"][one.seed]
            self._save(one, drafts, {**self.studio.facts(drafts), "chosen": found}, names, found)

    def _save(
        self,
        one: Painted,
        recipe: Paint,
        facts: dict[str, Any],
        names: Names,
        found: dict[str, Any] | None = None,
    ) -> None:
        if is_blocked(one.verdict):
            self.blocked += 1
            if self.as_json:
                display.emit({"event": "picture", "path": None, "seed": one.seed, "filter": one.verdict})
            else:
                display.warn(f"seed {one.seed}: blocked by the content filter; no image was written")
            return
        path = save_picture(
            one, recipe, facts, names, metadata=self.giving.metadata, marking=self.giving.marking
        )
        self.paths.append(path)
        if names.replaced:
            display.warn(f"{path} was there and is replaced.", as_json=self.as_json)
        scores = ""
        if found:
            told = (f"{k} {found[k]:.3f}" for k in ("alignment", "likeness") if k in found)
            scores = f"  rank {found['rank']} of {found['of']}: {', '.join(told)}"
        self.shown.append((one.image, f"seed {one.seed}{scores}"))
        if one.verdict:
            scores += f"  {one.verdict['action']} by the content filter"
        if self.as_json:
            verdict = {"filter": one.verdict} if one.verdict else {}
            display.emit({"event": "picture", "path": str(path), "seed": one.seed} | (found or {}) | verdict)
        else:
            display.out.print(f"{path}  seed {one.seed}{scores}", soft_wrap=True)

    def end(self) -> list[Path]:
        """The contact sheet, and the last line. Raises Blocked when the filter let no image through."""
        if self.blocked and not self.paths:
            raise Blocked(refusal(self.blocked, self.blocked))
        sheet = None
        sizes = {image.size for image, _ in self.shown}
        if len(self.shown) > 1 and len(sizes) == 1 and self.names:
            sheet = self.names.sheet()
            images, captions = zip(*self.shown, strict=True)
            save_image(contact_sheet(images, captions), sheet, marking=self.giving.marking)
        if self.as_json:
            display.emit({"event": "done", "pictures": len(self.paths), "sheet": str(sheet) if sheet else None})
        elif sheet:
            display.out.print(f"{sheet}  contact sheet", soft_wrap=True)
        return self.paths


def paint(recipe: Paint, out: Path, giving: Giving, *, as_json: bool, best: Best | None = None) -> list[Path]:
    """Paint and save; with `best`, the best of many."""
    studio = Studios(giving.filter).of(recipe)
    saver = Saver(studio, out, giving, as_json=as_json)
    if best:
        saver.choose(recipe, best)
    else:
        saver.run(studio.painting(recipe), recipe)
    return saver.end()


def refine(
    pictures: list[Path], values: dict[str, Any], out: Path, giving: Giving, *, as_json: bool
) -> list[Path]:  # fmt: skip
    """Refine images one after the other, each by its own recipe with `values` in place of what it says."""
    if out.suffix.lower() == ".png" and len(pictures) > 1:
        raise BadRecipe(f"{len(pictures)} images cannot all become {out.name}: give --out a folder.")
    jobs = [(source, inherited(Refine, source, values)) for source in map(Source.of, pictures)]
    studios = Studios(giving.filter)
    saver = None
    for source, recipe in jobs:
        studio = studios.of(recipe)
        saver = saver or Saver(studio, out, giving, as_json=as_json)
        saver.studio = studio
        saver.run(studio.refining(recipe, source), recipe, Job(source), f"{Path(source.file).stem}-refined")
    assert saver is not None
    if len(jobs) > 1:
        saver.names = Names(jobs[0][1], out, "refined")
    return saver.end()


def inpaint(
    picture: Path, mask: Path | None, values: dict[str, Any], out: Path, giving: Giving, *, as_json: bool
) -> list[Path]:  # fmt: skip
    """Paint a part of one image."""
    source = Source.of(picture)
    job = Job(source, None if mask is None else read_mask(mask, source.image.size))
    recipe = inherited(Inpaint, source, values)
    studio = Studios(giving.filter).of(recipe)
    saver = Saver(studio, out, giving, as_json=as_json)
    saver.run(studio.inpainting(recipe, source, mask), recipe, job, f"{picture.stem}-inpainted")
    return saver.end()


class Studios:
    """A Studio for each base, opened when it is first needed."""

    def __init__(self, filter: Mode | None = None) -> None:
        self._filter = filter
        self._open: dict[tuple[str | None, ...], Studio] = {}

    def of(self, recipe: Paint) -> Studio:
        key = (recipe.base, recipe.device, recipe.dtype)
        if key not in self._open:
            how = {"device": recipe.device, "dtype": recipe.dtype}
            self._open[key] = Studio.open(recipe.base, filter=self._filter, **how)
        return self._open[key]


def redo(picture: Path, out: Path, giving: Giving, *, sources: list[Path], as_json: bool) -> Path:
    """Paint an image again, and what it was made from; prints the largest difference of any pixel.

    The content filter looks at the image alone: what it was made from is not given out, and a blurred
    draft would make another image. Raises Blocked.
    """
    found = recipes_inside.read(picture).recipe
    if "recipe" not in found:
        raise BadRecipe(
            f"{picture} was not painted by Minikin, so it cannot be repeated exactly. `minikin show` prints "
            "its prompt and settings; give them to `minikin paint`."
        )
    if out.suffix != ".png":
        out = out / f"{picture.stem}-again.png"
    if out.exists() and out.samefile(picture):
        raise BadRecipe(f"{out} is the image itself: give another --out, so that there are two to compare.")
    if out.exists():
        display.warn(f"{out} was there and is replaced.", as_json=as_json)
    studios, filters = Studios(), list[Filtering | None]()
    done: list[tuple[Paint, Job | None]] = []

    def painter(recipe: Paint, job: Job | None) -> Iterator[events.Event]:
        done.append((recipe, job))  # the last is the image's own
        studio = studios.of(recipe)
        if not filters:  # one that is not on this machine is an error of the start
            filters.append(open_filtering(giving.filter, studio.base))
        return studio.working(recipe, job)

    def work() -> Iterator[events.Event]:
        painted = yield from lineage.again(found, painter, (*sources, picture.parent))
        yield events.Done(painted, {})

    one: Painted = display.run(work(), as_json=as_json).result
    if filters and filters[0]:
        (one,) = filters[0]([one])
    if is_blocked(one.verdict):
        raise Blocked(refusal(1, 1))
    recipe, job = done[-1]
    before = np.asarray(Image.open(picture).convert("RGB"), np.int16)
    facts = studios.of(recipe).facts(recipe, job) | {k: found[k] for k in ("chosen",) if k in found}
    path = save_picture(
        one, recipe, facts, Names(recipe.model_copy(update={"n": 1}), out), marking=giving.marking
    )
    _warn_of_others(found, facts, as_json=as_json)
    after = np.asarray(Image.open(path).convert("RGB"), np.int16)
    difference = int(np.abs(before - after).max()) if before.shape == after.shape else 255
    if as_json:
        display.emit({"event": "picture", "path": str(path), "seed": one.seed})
        display.emit({"event": "redo", "largest_difference": difference})
    else:
        told = f"  {one.verdict['action']} by the content filter" if one.verdict else ""
        display.out.print(f"{path}  seed {one.seed}{told}", soft_wrap=True)
        display.out.print(
            "identical" if difference == 0 else f"largest difference of any pixel: {difference} of 255"
        )
    return path


def _warn_of_others(then: dict[str, Any], now: dict[str, Any], *, as_json: bool) -> None:
    """Concepts and LoRAs that are not those of then."""
    for kind, name_of in (("concepts", "Concept"), ("adapters", "LoRA")):
        for name, it in then.get(kind, {}).items():
            if now.get(kind, {}).get(name, {}).get("sha256") != it.get("sha256"):
                display.warn(f"{name_of} '{name}' is not the one this image was painted with; expect a "
                             "difference.", as_json=as_json)  # fmt: skip
