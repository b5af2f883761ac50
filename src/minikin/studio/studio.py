"""Studio: one base, its concepts, one lock. Verbs are generators of events, with simple calls on top.

    studio = Studio.open("tiny")
    for event in studio.teaching(photos, recipe): ...     the long form
    tom = studio.teach(photos, name="tom", category="cat")  the short one

Whatever face asks (command line, page, HTTP), it makes a recipe and runs a verb here.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from minikin import events
from minikin.errors import BadRecipe
from minikin.generation import sampler as painting
from minikin.images import xmp
from minikin.images.photos import Photo, load_photos
from minikin.images.sheet import contact_sheet
from minikin.models.prompt import concept_tags, parse
from minikin.perfusion import library
from minikin.perfusion.concept import Concept, check_category, check_name
from minikin.perfusion.concept_file import store_points
from minikin.perfusion.conditioning import Loaded, load
from minikin.perfusion.covariance import Covariance, covariance, read_captions
from minikin.perfusion.masks import proposed_mask
from minikin.perfusion.train import check as check_teaching
from minikin.perfusion.train import teach
from minikin.recipes import Baseline, Compare, Distill, Paint, Sweep, Teach, Tuned
from minikin.stream import stream
from minikin.studio.generation import Painting, last

if TYPE_CHECKING:
    from minikin.baselines.result import Learned
    from minikin.evaluation.compare.compare import Painter
    from minikin.evaluation.compare.methods import Taught
    from minikin.evaluation.encoders import Judge

PREVIEW = 96  # pixels: 2 to 3 KB inside a concept file


class Studio(Painting):
    """One open base and the concepts in use on it.

    Calls from several threads take turns; a verb's generator holds its turn until it ends or is
    closed, so run each to its end in one thread.
    """

    # ---- teaching ----------------------------------------------------------------------------

    def teaching(
        self, photos: str | Path | Sequence[Photo], recipe: Teach, *, checkpoint: Path | None = None,
        resume: bool = False, stop: threading.Event | None = None,
    ) -> Iterator[events.Event]:  # fmt: skip
        """Teach a concept; the last event is Done with the Concept, which is then in use.

        See `perfusion.train.teach` for the arguments.
        """
        check_name(recipe.name)
        check_category(recipe.category)
        self._check_not_a_word(recipe)
        check_teaching(self.base, recipe)
        loaded = load_photos(photos) if isinstance(photos, str | Path) else list(photos)
        with self._lock:
            c: Covariance | None = None
            if recipe.mode == "gated":
                c = yield from self._covariance(recipe)
            for event in teach(
                self.base, loaded, recipe, c, checkpoint=checkpoint, resume=resume, stop=stop,
                sample=self._sample,
            ):  # fmt: skip
                if isinstance(event, events.Done):
                    event = yield from self._finished(event, recipe)
                yield event

    def masking(self, photos: Sequence[Photo], category: str) -> Iterator[events.Event]:
        """Where the category is in photos, before it is taught; a Image (L) for each, then Done with all."""
        check_category(category)
        made = []
        with self._lock:
            for k, photo in enumerate(photos):
                yield events.Progress("finding the subject", k, len(photos))
                mask = proposed_mask(self.base, Image.fromarray(photo.pixels), category)
                made.append(xmp.made(mask, xmp.NONE))
                yield events.Picture(made[-1], "mask", k)
        yield events.Done(made, {"category": category})

    def teach(self, photos: str | Path | Sequence[Photo], **recipe: Any) -> Concept:
        """Teach a concept and return it; keyword arguments are those of `recipes.Teach`."""
        wanted = Teach.make(**{"base": self.base.name, **recipe})
        concept: Concept = last(self.teaching(photos, wanted)).result
        return concept

    def _finished(
        self, done: events.Done, recipe: Teach
    ) -> Generator[events.Event, None, events.Done]:  # fmt: skip
        """Put the new concept into use, with a small image of it inside."""
        concept: Concept = done.result
        self.concepts.add(concept)
        if not recipe.preview or done.facts["interrupted"]:
            return done
        (picture,) = self._look(self.concepts.loaded[concept.name], [1])
        yield events.Picture(picture, "result")
        small = io.BytesIO()
        picture.convert("RGB").resize((PREVIEW, PREVIEW)).save(small, "JPEG", quality=80)
        return events.Done(replace(concept, preview=small.getvalue()), done.facts)

    def _sample(self, concept: Concept) -> Image.Image:
        """A few images of a concept that is still being taught; it does not come into use by that."""
        return contact_sheet(self._look(load(self.base, concept), [1, 2, 3]), columns=3)

    def _look(self, one: Loaded, seeds: list[int]) -> list[Image.Image]:
        name = one.concept.name
        recipe = Paint(prompt=f"a photo of <{name}>", base=self.base.name, steps=15, seed=1)
        prompt = parse(recipe.prompt, {name: one.concept.category})
        made = painting.paint_batch(self.base, recipe, prompt, {name: one}, seeds)
        return [painted.image for painted in made]

    def _covariance(self, recipe: Teach) -> Generator[events.Event, None, Covariance]:
        lines = read_captions(recipe.captions) if recipe.captions else None
        work = stream(
            lambda emit: covariance(
                self.base, lines,
                progress=lambda done, total: emit(events.Progress("covariance", done, total)),
            ),
            self._worker,
        )  # fmt: skip
        found: Covariance = yield from work
        yield events.Note(
            f"How words are used by this text encoder: {found.n_captions:,} captions (C has condition "
            f"number {found.condition:.1e})."
        )
        return found

    def _check_not_a_word(self, recipe: Teach) -> None:
        if recipe.name == recipe.category.lower():
            raise BadRecipe(
                f"The concept's name '{recipe.name}' is its category's own word. Give it a name of its "
                f"own, for example my_{recipe.name}."
            )

    # ---- baselines ---------------------------------------------------------------------------

    def teaching_baseline(
        self, photos: str | Path | Sequence[Photo], recipe: Baseline, out: Path, *, resume: bool = False
    ) -> Iterator[events.Event]:
        """Teach by another method, for comparison; the last event is Done with what was `Learned`.

        See `baselines.train.teach`. Paint with the result inside `wearing`.
        """
        from minikin.baselines.train import teach as teach_baseline

        loaded = load_photos(photos) if isinstance(photos, str | Path) else list(photos)
        with self._lock:
            yield from teach_baseline(self.base, loaded, recipe, out, resume=resume)

    @contextmanager
    def wearing(self, *learned: Learned, weight: float = 1.0) -> Iterator[None]:
        """Inside, the base has these baselines' results on; prompts for them come from `Learned.prompt`."""
        from minikin.baselines.result import using

        with self._lock, using(self.base, [(one, weight) for one in learned]):
            yield

    # ---- distilling --------------------------------------------------------------------------

    def distilling(self, recipe: Distill, out: Path, *, resume: bool = False) -> Iterator[events.Event]:
        """Distil the base; the last event is Done with the path of the result. See `distillation.distill`."""
        from minikin.distillation.distill import distill

        with self._lock:
            yield from distill(self.base, recipe, out, resume=resume)

    # ---- sweeping ----------------------------------------------------------------------------

    def sweeping(
        self, recipe: Sweep, out: Path, *, judge: Judge | None = None
    ) -> Iterator[events.Event]:  # fmt: skip
        """Find a concept's operating points; the last event is Done with them by name.

        They are then in use, and in the concept's file when `recipe.concept` is a file or a name from
        the library rather than a concept in use. See `evaluation.sweep.sweep`.
        judge  opened by the caller; by its name in the recipe otherwise
        """
        from minikin.evaluation.sweep.sweep import sweep
        from minikin.evaluation.sweep.task import task

        concept, path = self._swept(recipe.concept)
        with self._lock:
            looked = Paint.make(
                prompt=f"<{concept.name}>", base=self.base.name, preset=recipe.preset, steps=recipe.steps,
                points={},
            )  # fmt: skip
            plan, _ = self.prepared(looked, parse(looked.prompt, self.concepts.categories))
            work = task(recipe, concept, self.base, plan, self.facts(looked), judge)
            for event in sweep(work, out, self._painted):
                if isinstance(event, events.Done):
                    event = yield from self._pointed(event, concept, path)
                yield event

    def _swept(self, ref: str) -> tuple[Concept, Path | None]:
        """A concept by name or file, and its file; None for one that is in use already."""
        if ref in self.concepts.loaded:
            return self.concepts.loaded[ref].concept, None
        path = library.resolve(ref)
        return self.add(path), path

    def _pointed(
        self, done: events.Done, concept: Concept, path: Path | None
    ) -> Generator[events.Event, None, events.Done]:
        """Put the points into use and, if there is one, into the file."""
        points = {**concept.points, done.facts["preset"]: done.result}
        self.concepts.add(replace(concept, points=points))
        stored = path is not None and store_points(path, points)
        if path and not stored:
            yield events.Note(f"{path} has no room for more operating points; they were not kept in it.", True)
        return events.Done(done.result, {**done.facts, "stored": str(path) if stored else None})

    # ---- comparing ---------------------------------------------------------------------------

    def comparing(
        self, recipe: Compare, out: Path, *, judge: Judge | None = None
    ) -> Iterator[events.Event]:  # fmt: skip
        """Compare methods on the same photos; the last event is Done with the path of the report's page.

        See `evaluation.compare.compare`. The concepts in use are the same afterwards.
        judge  opened by the caller; by its name in the recipe otherwise
        """
        from minikin.evaluation.compare.compare import compare
        from minikin.evaluation.compare.methods import teach as teach_method
        from minikin.evaluation.compare.task import task

        with self._lock:
            work = task(recipe, self.base, self.presets(), self.facts, judge)

            def by(wanted: Teach | Baseline, folder: Path, photos: Sequence[Photo]) -> Iterator[events.Event]:
                if isinstance(wanted, Teach):
                    return self.teaching(photos, wanted)
                begun = (folder / "checkpoint.safetensors").exists()
                return self.teaching_baseline(photos, wanted, folder, resume=begun)

            before = self.concepts.loaded.copy()
            try:
                yield from compare(
                    work, out,
                    lambda method, wanted: teach_method(
                        self.base, work.photos if wanted is recipe else work.second_photos, wanted, method,
                        out / "methods", by,
                    ),
                    self._dressed,
                )  # fmt: skip
            finally:
                self.concepts.loaded = before

    @contextmanager
    def _dressed(self, taught: Sequence[Taught], strength: float) -> Iterator[Painter]:
        """A painter with a method's results on: concepts in use, or baselines worn."""
        if not taught:
            yield self._painted
        elif isinstance(taught[0].result, Concept):
            points = {self.add(one.result).name: Tuned(strength=strength) for one in taught}
            yield lambda recipe: self._painted(recipe.model_copy(update={"points": points}))
        else:
            learned: list[Learned] = [one.result for one in taught]
            with self.wearing(*learned, weight=strength):
                yield lambda recipe: self._painted(recipe.model_copy(update={"prompt": _said(learned, recipe)}))


def _said(learned: Sequence[Learned], recipe: Paint) -> str:
    """The recipe's prompt as baselines read it; a prompt without their concepts stays as it is."""
    text = recipe.prompt
    for one in learned:
        text = one.prompt(text) if one.name in concept_tags(text) else text
    return text
