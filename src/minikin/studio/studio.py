"""Studio: one base, its concepts, one lock. Commands are generators of events, with short forms on top.

    studio = Studio.open("tiny")
    for event in studio.teaching(photos, recipe): ...       the long form
    tom = studio.teach(photos, name="tom", category="cat")  the short one

Every front end (command line, page, HTTP) makes a recipe and runs a command here.
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
from minikin.generation.request import resolve
from minikin.generation.sampler import generate
from minikin.images import xmp
from minikin.images.photos import Photo, load_photos
from minikin.models.prompt import concept_tags
from minikin.perfusion import library
from minikin.perfusion.concept import Concept, check_category, check_name
from minikin.perfusion.concept_file import store_points
from minikin.perfusion.conditioning import PreparedConcept, prepare_concept
from minikin.perfusion.covariance import Covariance, covariance, read_captions
from minikin.perfusion.masks import proposed_mask
from minikin.perfusion.train import check as check_teaching
from minikin.perfusion.train import teach
from minikin.recipes import Baseline, Compare, ConceptSettings, Distill, Paint, Sweep, Teach
from minikin.stream import stream
from minikin.studio.generation import ImageCommands, last
from minikin.studio.samples import Samples

if TYPE_CHECKING:
    from minikin.baselines.result import BaselineResult
    from minikin.evaluation.compare.methods import TrainedMethod
    from minikin.evaluation.encoders import Encoder
    from minikin.evaluation.experiment import Painter

PREVIEW = 96  # pixels: 2 to 3 KB inside a concept file
SAMPLE_STEPS = 15  # of the images that show a concept while and after it is taught


class Studio(ImageCommands):
    """One open base and the concepts in use on it.

    Calls from several threads take turns; a command's generator holds the lock until it ends or is closed, so
    run each to its end in one thread.
    """

    # ---- teaching ----------------------------------------------------------------------------

    def teaching(
        self,
        photos: str | Path | Sequence[Photo],
        recipe: Teach,
        *,
        checkpoint: Path | None = None,
        resume: bool = False,
        stop: threading.Event | None = None,
    ) -> Iterator[events.Event]:
        """Teach a concept; the last event is Done with the Concept, which is then in use.

        See `perfusion.train.teach` for the arguments.
        """
        check_name(recipe.name)
        check_category(recipe.category)
        self._check_not_a_word(recipe)
        check_teaching(self.base, recipe)
        loaded = yield from _loaded(photos)
        with self._lock:
            c: Covariance | None = None
            if recipe.mode == "gated":
                c = yield from self._covariance(recipe)
            samples = Samples(self.base, loaded, self._sample)
            run = teach(
                self.base,
                loaded,
                recipe,
                c,
                checkpoint=checkpoint,
                resume=resume,
                stop=stop,
                sample=samples.sheet,
            )
            for event in samples.scored(run):
                if isinstance(event, events.Done):
                    event = yield from self._use_concept(event, recipe)
                yield event

    def masking(self, photos: Sequence[Photo], category: str) -> Iterator[events.Event]:
        """Masks of the category in photos, before teaching; an ImageReady (L) for each, then Done with all."""
        check_category(category)
        masks = []
        with self._lock:
            for k, photo in enumerate(photos):
                yield events.Progress("finding the subject", k, len(photos))
                mask = proposed_mask(self.base, Image.fromarray(photo.pixels), category)
                masks.append(xmp.with_source_type(mask, xmp.NONE))
                yield events.ImageReady(masks[-1], "mask", k)
        yield events.Done(masks, {"category": category})

    def teach(self, photos: str | Path | Sequence[Photo], **recipe: Any) -> Concept:
        """Teach a concept and return it; keyword arguments are those of `recipes.Teach`."""
        complete = Teach.make(**{"base": self.base.name, **recipe})
        concept: Concept = last(self.teaching(photos, complete)).result
        return concept

    def _use_concept(self, done: events.Done, recipe: Teach) -> Generator[events.Event, None, events.Done]:
        """Put the new concept into use, with a preview inside."""
        concept: Concept = done.result
        self.concepts.add(concept)
        if not recipe.preview or done.facts["interrupted"]:
            return done
        (image,) = self._samples(self.concepts.loaded[concept.name], [1])
        yield events.ImageReady(image, "result")
        preview = io.BytesIO()
        image.convert("RGB").resize((PREVIEW, PREVIEW)).save(preview, "JPEG", quality=80)
        return events.Done(replace(concept, preview=preview.getvalue()), done.facts)

    def _sample(self, concept: Concept) -> list[Image.Image]:
        return self._samples(prepare_concept(self.base, concept), [1, 2, 3])

    def _samples(self, concept: PreparedConcept, seeds: list[int]) -> list[Image.Image]:
        name = concept.concept.name
        recipe = Paint(
            prompt=f"a photo of <{name}>", base=self.base.name, steps=SAMPLE_STEPS, seed=1, points={}
        )
        request = resolve(self.base, recipe, {name: concept})
        return [generated.image for generated in generate(self.base, request, seeds)]

    def _covariance(self, recipe: Teach) -> Generator[events.Event, None, Covariance]:
        lines = read_captions(recipe.captions) if recipe.captions else None
        c: Covariance = yield from stream(
            lambda emit: covariance(
                self.base,
                lines,
                progress=lambda done, total: emit(events.Progress("covariance", done, total)),
            ),
            self._worker,
        )
        yield events.Note(
            f"How words are used by this text encoder: {c.n_captions:,} captions (C has condition "
            f"number {c.condition:.1e})."
        )
        return c

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
        """Teach by another method, for comparison; the last event is Done with a `BaselineResult`.

        See `baselines.train.teach`. Generate with the result inside `using_baselines`.
        """
        from minikin.baselines.train import teach as teach_baseline

        loaded = yield from _loaded(photos)
        with self._lock:
            yield from teach_baseline(self.base, loaded, recipe, out, resume=resume)

    @contextmanager
    def using_baselines(self, *results: BaselineResult, weight: float = 1.0) -> Iterator[None]:
        """Apply these baselines' results to the base inside; `BaselineResult.prompt` makes prompts for them."""
        from minikin.baselines.result import using

        with self._lock, using(self.base, [(result, weight) for result in results]):
            yield

    # ---- distilling --------------------------------------------------------------------------

    def distilling(self, recipe: Distill, out: Path, *, resume: bool = False) -> Iterator[events.Event]:
        """Distil the base; the last event is Done with the path of the result. See `distillation.distill`."""
        from minikin.distillation.distill import distill

        with self._lock:
            yield from distill(self.base, recipe, out, resume=resume)

    # ---- sweeping ----------------------------------------------------------------------------

    def sweeping(self, recipe: Sweep, out: Path, *, encoder: Encoder | None = None) -> Iterator[events.Event]:
        """Find a concept's operating points; the last event is Done with them by name.

        They are then in use, and in the concept's file when `recipe.concept` is a file or a name from
        the library rather than a concept in use. See `evaluation.sweep.sweep`.
        encoder  an opened one; by the recipe's name otherwise
        """
        from minikin.evaluation.sweep.sweep import open_task, sweep

        concept, path = self._concept_and_file(recipe.concept)
        with self._lock:
            without_points = Paint.make(
                prompt=f"<{concept.name}>",
                base=self.base.name,
                preset=recipe.preset,
                steps=recipe.steps,
                points={},
            )
            request = self.resolve(without_points)
            task = open_task(recipe, concept, self.base, request, request.record, encoder)
            for event in sweep(task, out, self._paint_recipe):
                if isinstance(event, events.Done):
                    event = yield from self._store_points(event, concept, path)
                yield event

    def _concept_and_file(self, ref: str) -> tuple[Concept, Path | None]:
        """A concept by name or file, and its file; None for one that is in use already."""
        if ref in self.concepts.loaded:
            return self.concepts.loaded[ref].concept, None
        path = library.resolve(ref)
        return self.add(path), path

    def _store_points(
        self, done: events.Done, concept: Concept, path: Path | None
    ) -> Generator[events.Event, None, events.Done]:
        """Put the points into use and, if there is one, into the file."""
        points = {**concept.points, done.facts["preset"]: done.result}
        self.concepts.add(replace(concept, points=points))
        before = path.read_bytes() if path else None
        stored = path is not None and store_points(path, points)
        if path and stored:  # a copy in the library stays one
            library.follow(path, concept.name, before, new=False)
        if path and not stored:
            yield events.Note(f"{path} has no room for more operating points; they were not kept in it.", True)
        return events.Done(done.result, {**done.facts, "stored": str(path) if stored else None})

    # ---- comparing ---------------------------------------------------------------------------

    def comparing(
        self, recipe: Compare, out: Path, *, encoder: Encoder | None = None
    ) -> Iterator[events.Event]:
        """Compare methods on the same photos; the last event is Done with the path of the report's page.

        See `evaluation.compare.compare`. The concepts in use are the same afterwards.
        encoder  an opened one; by the recipe's name otherwise
        """
        from minikin.evaluation.compare.compare import compare, open_task
        from minikin.evaluation.compare.methods import train

        with self._lock:
            task = open_task(recipe, self.base, self.presets(), self.record, encoder)

            def teach_by(
                method: Teach | Baseline, folder: Path, photos: Sequence[Photo]
            ) -> Iterator[events.Event]:
                if isinstance(method, Teach):
                    return self.teaching(photos, method)
                resume = (folder / "checkpoint.safetensors").exists()
                return self.teaching_baseline(photos, method, folder, resume=resume)

            def train_method(method: str, subject: Compare) -> Generator[events.Event, None, TrainedMethod]:
                photos = task.photos if subject is recipe else task.second_photos
                return train(self.base, photos, subject, method, out / "methods", teach_by)

            before = self.concepts.loaded.copy()
            try:
                yield from compare(task, out, train_method, self._with_method)
            finally:
                self.concepts.loaded = before

    @contextmanager
    def _with_method(self, trained: Sequence[TrainedMethod], strength: float) -> Iterator[Painter]:
        """A function that generates with a method's results: concepts in use, or baselines applied."""
        if not trained:
            yield self._paint_recipe
        elif isinstance(trained[0].result, Concept):
            points = {self.add(t.result).name: ConceptSettings(strength=strength) for t in trained}
            yield lambda recipe: self._paint_recipe(recipe.model_copy(update={"points": points}))
        else:
            results: list[BaselineResult] = [t.result for t in trained]
            with self.using_baselines(*results, weight=strength):
                yield lambda recipe: self._paint_recipe(_for_baselines(results, recipe))


def _loaded(photos: str | Path | Sequence[Photo]) -> Generator[events.Event, None, list[Photo]]:
    """The photos, read if they are a path; a note names files of the folder that are left out."""
    if not isinstance(photos, str | Path):
        return list(photos)
    notes: list[str] = []
    loaded = load_photos(photos, notes.append)
    yield from (events.Note(text, warning=True) for text in notes)
    return loaded


def _for_baselines(results: Sequence[BaselineResult], recipe: Paint) -> Paint:
    """The recipe with its prompt as baselines read it; a prompt without their concepts stays as it is."""
    text = recipe.prompt
    for result in results:
        text = result.prompt(text) if result.name in concept_tags(text) else text
    return recipe.model_copy(update={"prompt": text})
