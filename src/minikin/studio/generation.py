"""The Studio's painting: images from nothing, from other images, and the best of many."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from minikin import events
from minikin.errors import BadRecipe
from minikin.generation import content_filter, img2img, lineage
from minikin.generation import sampler as painting
from minikin.generation.canvas import MaskLike, read_mask
from minikin.generation.img2img import Job
from minikin.generation.live import Live
from minikin.generation.plan import Plan
from minikin.generation.plan import plan as plan_for
from minikin.generation.resolve import settle
from minikin.generation.sampler import Painted
from minikin.generation.source import PictureLike, Source, inherited
from minikin.images import xmp
from minikin.models import presets
from minikin.models.lora import adapters
from minikin.models.lora.lora_file import Adapter
from minikin.models.prompt import Prompt, concept_tags, parse
from minikin.recipes import Best, Inpaint, Paint, Refine, Rework
from minikin.stream import stream
from minikin.studio.session import Opened

if TYPE_CHECKING:
    from minikin.evaluation.encoders import Judge


class Painting(Opened):
    """The verbs that make images; all are `working` on one recipe and at most one image."""

    def painting(self, recipe: Paint) -> Iterator[events.Event]:
        """Paint; yields a Image for each as it is ready, then Done with all of them."""
        return self.working(recipe)

    def refining(self, recipe: Refine, picture: PictureLike | Source) -> Iterator[events.Event]:
        """Paint an image again from itself; events as `painting` has them.

        The recipe says everything: `generation.source.inherited` makes one from the image's own.
        Raises BadPhoto, BadRecipe.
        """
        return self.working(recipe, Job(Source.of(picture)))

    def inpainting(
        self, recipe: Inpaint, picture: PictureLike | Source, mask: MaskLike | None = None
    ) -> Iterator[events.Event]:
        """Paint what is under the mask, white or transparent, and what `recipe.extend` adds.

        Events as `painting` has them. Raises BadPhoto, BadRecipe.
        """
        source = Source.of(picture)
        return self.working(recipe, Job(source, None if mask is None else read_mask(mask, source.image.size)))

    def working(self, recipe: Paint, job: Job | None = None) -> Iterator[events.Event]:
        """Paint a recipe, on an image if it is a `Rework`; what painting, refining and inpainting share."""
        with self._lock:  # from the first look at the concepts: another thread may replace one
            self._need(recipe.prompt)
            self._need(recipe.negative)
            prompt = parse(recipe.prompt, self.concepts.categories)
            painting.check(self.base, recipe)
            plan, wanted = self.prepared(recipe, prompt)
            for text in (
                *plan.warnings,
                *painting.cautions(self.base, plan.recipe, prompt, self.concepts.loaded),
            ):
                yield events.Note(text, warning=True)
            work = img2img.begun(self.base, recipe, job)
            made: list[Painted] = []
            facts = self.facts(recipe, job)
            steps = painting.steps(self.base, plan, recipe.strength if isinstance(recipe, Rework) else 1.0)
            for i in range(0, recipe.n, recipe.batch):
                seeds = list(recipe.together(recipe.seed + i))
                some = yield from self._batch(plan, prompt, wanted, seeds, (i * steps, recipe.n * steps), work)
                for one in self.filtering(some) if self.filtering else some:
                    if not content_filter.is_blocked(one.verdict):
                        xmp.made(one.image, facts[xmp.KEY])
                    made.append(one)
                    yield events.Picture(one.image, recipe.prompt, one.seed, one.verdict)
            yield events.Done(made, facts)

    def prepared(self, recipe: Paint, prompt: Prompt) -> tuple[Plan, list[tuple[Adapter, float]]]:
        """How the recipe is painted, and the LoRAs it needs with their weights: the preset's, the prompt's."""
        negative = parse(recipe.negative, self.concepts.categories)
        if negative.loras:
            raise BadRecipe("A LoRA works on the whole image: move <lora:...> to the prompt.")
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
        self, plan: Plan, prompt: Prompt, wanted: adapters.Wanted, seeds: list[int], count: tuple[int, int],
        work: img2img.Begun | None,
    ) -> Generator[events.Event, None, list[Painted]]:  # fmt: skip
        before, total = count

        def run(emit: Callable[[events.Event], None]) -> list[Painted]:
            def step(done: int, latents: Tensor) -> None:
                now = partial(self._now, latents[0], work)
                emit(events.Progress("painting", before + done * len(seeds), total, look=now))

            with self.adapters.using(wanted):  # on within a batch only: nothing else ever meets them
                some = painting.paint_batch(
                    self.base, plan, prompt, self.concepts.loaded, seeds, on_step=step,
                    tell=lambda text: emit(events.Note(text, warning=True)),
                    ground=work.ground if work else None,
                )  # fmt: skip
            return [work.finished(one) for one in some] if work else some

        painted: list[Painted] = yield from stream(run, self._worker)
        return painted

    def _now(self, latents: Tensor, work: img2img.Begun | None) -> Image.Image | None:
        """What latents (C, h, w) look like, and on what they are painted."""
        h, w = latents.shape[-2:]
        image = self.colours.show(latents, (w * self.base.factor, h * self.base.factor))
        return work.finished(Painted(image, 0)).image if work and image else image

    def paint(self, prompt: str, **recipe: Any) -> list[Image.Image]:
        """Paint images and return them; keyword arguments are those of `recipes.Paint`.

        Raises Blocked when the content filter blocks one of them; `painting` gives the others.
        """
        wanted = Paint.make(**{"prompt": prompt, "base": self.base.name, **recipe})
        return self._painted(wanted)

    def refine(self, picture: PictureLike | Source, **recipe: Any) -> list[Image.Image]:
        """Paint an image again from itself; keyword arguments are those of `recipes.Refine`.

        What is not given is the image's own, where it is a file that records it.
        """
        source = Source.of(picture)
        wanted = inherited(Refine, source, {"base": self.base.name, **recipe})
        return _images(self.refining(wanted, source))

    def inpaint(
        self, picture: PictureLike | Source, mask: MaskLike | None = None, prompt: str | None = None,
        **recipe: Any,
    ) -> list[Image.Image]:  # fmt: skip
        """Paint what is under the mask; keyword arguments are those of `recipes.Inpaint`.

        What is not given is the image's own, where it is a file that records it.
        """
        source = Source.of(picture)
        wanted = inherited(Inpaint, source, {"base": self.base.name, "prompt": prompt, **recipe})
        return _images(self.inpainting(wanted, source, mask))

    def _painted(self, recipe: Paint) -> list[Image.Image]:
        return _images(self.painting(recipe))

    # ---- the best of many --------------------------------------------------------------------

    def choosing(self, recipe: Paint, best: Best, *, judge: Judge | None = None) -> Iterator[events.Event]:
        """Paint `best.of` images and keep the `recipe.n` best; yields those as Images, the best first.

        Done has them in that order, with what the judge found under `chosen`, by seed. See
        `evaluation.best_of`.
        judge  opened by the caller; by its name otherwise
        """
        from minikin.evaluation.best_of import Chooser

        with self._lock:
            self._need(recipe.prompt)
            chooser = Chooser.of(best, self.base, recipe, self.concepts.categories, judge)
            for text in chooser.warnings:
                yield events.Note(text, warning=True)
            for event in self.painting(best.drafts(recipe)):
                if isinstance(event, events.Done):
                    kept, found = chooser.best(content_filter.passed(event.result), recipe.n)
                    for one in kept:
                        yield events.Picture(one.image, recipe.prompt, one.seed, one.verdict)
                    event = events.Done(kept, {**event.facts, "chosen": found})
                elif isinstance(event, events.Picture):
                    continue
                yield event

    # ---- around it ---------------------------------------------------------------------------

    def live(self, prompt: str = "", **recipe: Any) -> Live:
        """Paint as prompt, strengths and seed change; see `generation.live`. Arguments as for `paint`."""
        return Live(self.painting, Paint.make(**{"prompt": prompt, "base": self.base.name, **recipe}))

    def presets(self) -> list[dict[str, Any]]:
        """The presets this base can be painted with: name, what it is, steps, guidance, adapter, ready."""
        made_for = presets.recognise(self.base).name
        known = dict.fromkeys([made_for, *presets.for_architecture(self.base.architecture)])
        if self.base.has_guidance_embedding:
            known = {made_for: None}
        return [presets.describe(presets.PRESETS[n], self.base.architecture, n == made_for) for n in known]

    def facts(self, recipe: Paint, job: Job | None = None) -> dict[str, Any]:
        """What an image should know about how it was made; `recipe` in it repeats the image.

        job  what it was painted on
        """
        with self._lock:
            return self.facts_now(recipe, job)

    def facts_now(self, recipe: Paint, job: Job | None = None) -> dict[str, Any]:
        """The same without waiting for a turn: for a Studio whose concepts nobody else changes."""
        if job and isinstance(recipe, Refine):
            recipe = recipe.sized(job.source.image.size)
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
            "work": lineage.work_of(recipe),
            xmp.KEY: xmp.TRAINED,
            "recipe": repeat.model_dump(exclude={"device", "dtype", "batch", "n"}),
            "base": {"name": self.base.name, "fingerprint": self.base.fingerprint},
            "concepts": concepts,
            "preset": plan.preset.name,
            "sampler": plan.recipe.scheduler or "base default",
            "guidance": plan.guidance,
            "adapters": {a.name: {"weight": weight, "sha256": a.sha256} for a, weight in wanted},
            **(job.record() if job else {}),
        }  # fmt: skip


def _images(run: Iterator[events.Event]) -> list[Image.Image]:
    return [one.image for one in content_filter.passed(last(run).result, all_of_them=True)]


def last(run: Iterator[events.Event]) -> events.Done:
    done = None
    for event in run:
        done = event
    assert isinstance(done, events.Done)
    return done
