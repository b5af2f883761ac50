"""Studio: one base, its concepts, one lock. Verbs are generators of events, with simple calls on top.

    studio = Studio.open("tiny")
    for event in studio.teaching(photos, recipe): ...     the long form
    tom = studio.teach(photos, name="tom", category="cat")  the short one

Whatever face asks (command line, page, HTTP), it makes a recipe and runs a verb here.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from minikin import events
from minikin.bases import presets
from minikin.bases.attached import Concepts
from minikin.bases.base import Base
from minikin.bases.covariance import Covariance, covariance, read_captions
from minikin.bases.editing import Loaded, load
from minikin.bases.loras import adapters
from minikin.bases.loras.adapters import Adapters
from minikin.bases.loras.lorafile import Adapter
from minikin.bases.opening.registry import open_base
from minikin.bases.prompt import UNKNOWN_HINT, Prompt, concept_tags, parse
from minikin.concepts import library
from minikin.concepts.concept import Concept, check_category, check_name
from minikin.concepts.file import store_points
from minikin.errors import BadRecipe, UnknownName
from minikin.painting import paint as painting
from minikin.painting.live import Live
from minikin.painting.operating import settle
from minikin.painting.paint import Painted
from minikin.painting.plan import Plan
from minikin.painting.plan import plan as plan_for
from minikin.painting.sheet import contact_sheet
from minikin.recipes import Baseline, Compare, Distill, Paint, Sweep, Teach, Tuned
from minikin.stream import stream
from minikin.teaching.photos import Photo, load_photos
from minikin.teaching.teach import check as check_teaching
from minikin.teaching.teach import teach

if TYPE_CHECKING:
    from minikin.judging.compare.measure import Painter
    from minikin.judging.compare.methods import Taught
    from minikin.judging.judges import Judge
    from minikin.teaching.baselines.learned import Learned

PREVIEW = 96  # pixels: 2 to 3 KB inside a concept file


class Studio:
    """One open base and the concepts in use on it.

    Calls from several threads take turns; a verb's generator holds its turn until it ends or is
    closed, so run each to its end in one thread.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self.concepts = Concepts(base)
        self.adapters = Adapters(base)
        self._lock = threading.RLock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="minikin")

    @classmethod
    def open(cls, base: str = "tiny", **how: Any) -> Studio:
        """Open a base by name, folder, file or hub id; see `bases.opening.registry.open_base`."""
        return cls(open_base(base, **how))

    def beside(self) -> Studio:
        """The same base, adapters and turns, with no concepts in use yet: names of somebody else's own."""
        other = copy(self)
        other.concepts = Concepts(self.base)
        return other

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, the base is the caller's alone."""
        with self._lock:
            yield

    # ---- concepts ----------------------------------------------------------------------------

    def add(self, concept: Concept | str | Path) -> Concept:
        """Use a concept in prompts: a Concept, a file, or a name from the library."""
        if isinstance(concept, str) and not concept.endswith(".safetensors"):
            concept = library.find(concept)
        with self._lock:  # encoding puts words into the shared text encoder
            return self.concepts.add(concept)

    def _need(self, prompt: str) -> None:
        """Load the concepts a prompt names, from the library if they are not in use yet."""
        here = library.names()
        for name in concept_tags(prompt):
            if name in self.concepts.loaded:
                continue
            if name not in here:
                raise UnknownName("concept", name, {*self.concepts.loaded, *here}, UNKNOWN_HINT)
            self.add(name)

    # ---- teaching ----------------------------------------------------------------------------

    def teaching(
        self, photos: str | Path | Sequence[Photo], recipe: Teach, *, checkpoint: Path | None = None,
        resume: bool = False, stop: threading.Event | None = None,
    ) -> Iterator[events.Event]:  # fmt: skip
        """Teach a concept; the last event is Done with the Concept, which is then in use.

        See `teaching.teach.teach` for the arguments.
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

    def teach(self, photos: str | Path | Sequence[Photo], **recipe: Any) -> Concept:
        """Teach a concept and return it; keyword arguments are those of `recipes.Teach`."""
        wanted = Teach.make(**{"base": self.base.name, **recipe})
        concept: Concept = _last(self.teaching(photos, wanted)).result
        return concept

    def _finished(
        self, done: events.Done, recipe: Teach
    ) -> Generator[events.Event, None, events.Done]:  # fmt: skip
        """Put the new concept into use, with a small picture of it inside."""
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
        """A few pictures of a concept that is still being taught; it does not come into use by that."""
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

        See `teaching.baselines.teach.teach`. Paint with the result inside `wearing`.
        """
        from minikin.teaching.baselines.teach import teach as teach_baseline

        loaded = load_photos(photos) if isinstance(photos, str | Path) else list(photos)
        with self._lock:
            yield from teach_baseline(self.base, loaded, recipe, out, resume=resume)

    @contextmanager
    def wearing(self, *learned: Learned, weight: float = 1.0) -> Iterator[None]:
        """Inside, the base has these baselines' results on; prompts for them come from `Learned.prompt`."""
        from minikin.teaching.baselines.learned import using

        with self._lock, using(self.base, [(one, weight) for one in learned]):
            yield

    # ---- distilling --------------------------------------------------------------------------

    def distilling(self, recipe: Distill, out: Path, *, resume: bool = False) -> Iterator[events.Event]:
        """Distil the base; the last event is Done with the path of the result. See `distilling.distill`."""
        from minikin.distilling.distill import distill

        with self._lock:
            yield from distill(self.base, recipe, out, resume=resume)

    # ---- sweeping ----------------------------------------------------------------------------

    def sweeping(
        self, recipe: Sweep, out: Path, *, judge: Judge | None = None
    ) -> Iterator[events.Event]:  # fmt: skip
        """Find a concept's operating points; the last event is Done with them by name.

        They are then in use, and in the concept's file when `recipe.concept` is a file or a name from
        the library rather than a concept in use. See `judging.sweep.sweep`.
        judge  opened by the caller; by its name in the recipe otherwise
        """
        from minikin.judging.sweep.opening import task
        from minikin.judging.sweep.sweep import sweep

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

    def _painted(self, recipe: Paint) -> list[Image.Image]:
        return [one.image for one in _last(self.painting(recipe)).result]

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

        See `judging.compare.measure`. The concepts in use are the same afterwards.
        judge  opened by the caller; by its name in the recipe otherwise
        """
        from minikin.judging.compare.measure import compare
        from minikin.judging.compare.methods import teach as teach_method
        from minikin.judging.compare.opening import task

        with self._lock:
            work = task(recipe, self.base, self.presets(), self.facts, judge)

            def by(wanted: Teach | Baseline, folder: Path) -> Iterator[events.Event]:
                if isinstance(wanted, Teach):
                    return self.teaching(work.photos, wanted)
                begun = (folder / "checkpoint.safetensors").exists()
                return self.teaching_baseline(work.photos, wanted, folder, resume=begun)

            before = self.concepts.loaded.copy()
            try:
                yield from compare(
                    work, out,
                    lambda method: teach_method(self.base, work.photos, recipe, method, out / "methods", by),
                    self._dressed,
                )  # fmt: skip
            finally:
                self.concepts.loaded = before

    @contextmanager
    def _dressed(self, taught: Taught | None, strength: float) -> Iterator[Painter]:
        """A painter with a method's result on: a concept in use, or a baseline worn."""
        if taught is None:
            yield self._painted
        elif isinstance(taught.result, Concept):
            name = self.add(taught.result).name
            points = {name: Tuned(strength=strength)}
            yield lambda recipe: self._painted(recipe.model_copy(update={"points": points}))
        else:
            learned: Learned = taught.result
            with self.wearing(learned, weight=strength):
                yield lambda recipe: self._painted(recipe.model_copy(update={"prompt": _said(learned, recipe)}))

    # ---- painting ----------------------------------------------------------------------------

    def painting(self, recipe: Paint) -> Iterator[events.Event]:
        """Paint; yields a Picture for each as it is ready, then Done with all of them."""
        with self._lock:  # from the first look at the concepts: another thread may replace one
            self._need(recipe.prompt)
            self._need(recipe.negative)
            prompt = parse(recipe.prompt, self.concepts.categories)
            painting.check(self.base, recipe)
            plan, wanted = self.prepared(recipe, prompt)
            for text in (*plan.warnings, *painting.cautions(self.base, plan.recipe, prompt)):
                yield events.Note(text, warning=True)
            made: list[Painted] = []
            total = recipe.n * plan.steps
            for i in range(0, recipe.n, recipe.batch):
                seeds = list(recipe.together(recipe.seed + i))
                some = yield from self._batch(plan, prompt, wanted, seeds, i * plan.steps, total)
                made += some
                for one in some:
                    yield events.Picture(one.image, recipe.prompt, one.seed)
            yield events.Done(made, self.facts(recipe))

    def prepared(self, recipe: Paint, prompt: Prompt) -> tuple[Plan, list[tuple[Adapter, float]]]:
        """How the recipe is painted, and the LoRAs it needs with their weights: the preset's, the prompt's."""
        negative = parse(recipe.negative, self.concepts.categories)
        if negative.loras:
            raise BadRecipe("A LoRA works on the whole picture: move <lora:...> to the prompt.")
        if "<lora:" in prompt.text:
            raise BadRecipe("A LoRA is written <lora:name> or <lora:name:0.8>, with one weight.")
        wanted = [(self.adapters.get(adapters.find(name)), weight) for name, weight in prompt.loras]
        students = [a.metadata for a, _ in wanted if "minikin.preset" in a.metadata]
        student = students[0] if students else None
        plan = plan_for(self.base, recipe, student)
        if plan.source:
            own = self.adapters.get(presets.locate(plan.preset, plan.source), plan.source.name)
            wanted.insert(0, (own, 1.0))
            student = {**own.metadata, "minikin.preset": plan.preset.name}
        concepts = {n: one.concept for n, one in self.concepts.loaded.items()}
        settled = settle(recipe, prompt, negative, concepts, plan.preset.name, plan.steps)
        return plan_for(self.base, settled, student), wanted

    def _batch(
        self, plan: Plan, prompt: Prompt, wanted: adapters.Wanted, seeds: list[int], before: int, total: int
    ) -> Generator[events.Event, None, list[Painted]]:  # fmt: skip
        def work(emit: Callable[[events.Event], None]) -> list[Painted]:
            with self.adapters.using(wanted):  # on within a batch only: nothing else ever meets them
                return painting.paint_batch(
                    self.base, plan, prompt, self.concepts.loaded, seeds,
                    on_step=lambda s: emit(events.Progress("painting", before + s * len(seeds), total)),
                    tell=lambda text: emit(events.Note(text, warning=True)),
                )  # fmt: skip

        painted: list[Painted] = yield from stream(work, self._worker)
        return painted

    def paint(self, prompt: str, **recipe: Any) -> list[Image.Image]:
        """Paint pictures and return them; keyword arguments are those of `recipes.Paint`."""
        wanted = Paint.make(**{"prompt": prompt, "base": self.base.name, **recipe})
        return self._painted(wanted)

    def live(self, prompt: str = "", **recipe: Any) -> Live:
        """Paint as prompt, strengths and seed change; see `painting.live`. Arguments as for `paint`."""
        return Live(self.painting, Paint.make(**{"prompt": prompt, "base": self.base.name, **recipe}))

    def presets(self) -> list[dict[str, Any]]:
        """The presets this base can be painted with: name, what it is, steps, guidance, adapter, ready."""
        made_for = presets.recognise(self.base).name
        known = dict.fromkeys([made_for, *presets.for_architecture(self.base.architecture)])
        if self.base.has_guidance_embedding:
            known = {made_for: None}
        return [presets.describe(presets.PRESETS[n], self.base.architecture, n == made_for) for n in known]

    def facts(self, recipe: Paint) -> dict[str, Any]:
        """What a picture should know about how it was made; `recipe` in it repeats the picture."""
        with self._lock:
            return self.facts_now(recipe)

    def facts_now(self, recipe: Paint) -> dict[str, Any]:
        """The same without waiting for a turn: for a Studio whose concepts nobody else changes."""
        tags = concept_tags(f"{recipe.prompt} {recipe.negative}")
        plan, wanted = self.prepared(recipe, parse(recipe.prompt, self.concepts.categories))
        concepts = {
            n: {"category": self.concepts.loaded[n].concept.category, "sha256": self.concepts.digest(n)}
            for n in tags if n in self.concepts.loaded
        }  # fmt: skip
        usual = recipe.preset is None and plan.preset.name == "quality"  # what suits the base is left to it
        repeat = plan.recipe
        if usual:
            update = {k: getattr(plan.recipe, k) for k in ("steps", "points", "interval")}
            if plan.recipe.points and recipe.points is None:
                update["guidance"] = plan.guidance
            repeat = recipe.model_copy(update=update)
        return {
            "recipe": repeat.model_dump(exclude={"device", "dtype", "batch", "n"}),
            "base": {"name": self.base.name, "fingerprint": self.base.fingerprint},
            "concepts": concepts,
            "preset": plan.preset.name,
            "sampler": plan.recipe.scheduler or "base default",
            "guidance": plan.guidance,
            "adapters": {a.name: {"weight": weight, "sha256": a.sha256} for a, weight in wanted},
        }  # fmt: skip


def _last(run: Iterator[events.Event]) -> events.Done:
    done = None
    for event in run:
        done = event
    assert isinstance(done, events.Done)
    return done


def _said(learned: Learned, recipe: Paint) -> str:
    """The recipe's prompt as a baseline reads it; a prompt without the concept stays as it is."""
    named = learned.name in concept_tags(recipe.prompt)
    return learned.prompt(recipe.prompt) if named else recipe.prompt
