"""The Studio's image commands: text-to-image, img2img, inpainting, and the best of many."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from minikin import events
from minikin.generation import content_filter, img2img, sampler
from minikin.generation.canvas import MaskLike, read_mask
from minikin.generation.image import GeneratedImage
from minikin.generation.initial_latents import InitialLatents
from minikin.generation.live import Live
from minikin.generation.request import ImageRequest, resolve
from minikin.generation.source import ImageLike, InitImage, SourceImage, inherited
from minikin.images import xmp
from minikin.models import presets
from minikin.models.prompt import plain_words, word_for_concept
from minikin.perfusion import library
from minikin.perfusion.concept import NAME
from minikin.recipes import Best, Img2Img, Inpaint, Paint, Refine
from minikin.stream import stream
from minikin.studio.session import Session

if TYPE_CHECKING:
    from minikin.evaluation.encoders import Encoder


MAX_WORDS = 300  # of a prompt that are looked up in the library


class ImageCommands(Session):
    """The commands that make images. Each resolves its recipe once (`resolve`) and generates (`_generate`)."""

    def painting(self, recipe: Paint) -> Iterator[events.Event]:
        """Text-to-image; yields an ImageReady for each as it is ready, then Done with all of them."""
        return self.generating(recipe)

    def refining(self, recipe: Refine, image: ImageLike | SourceImage) -> Iterator[events.Event]:
        """Img2img: generate an image again from itself; events as of `painting`.

        The recipe says everything: `generation.source.inherited` makes one from the image's own.
        Raises BadPhoto, BadRecipe.
        """
        return self.generating(recipe, InitImage(SourceImage.of(image)))

    def inpainting(
        self, recipe: Inpaint, image: ImageLike | SourceImage, mask: MaskLike | None = None
    ) -> Iterator[events.Event]:
        """Generate the pixels under the mask, white or transparent, and those that `recipe.extend` adds.

        Events as of `painting`. Raises BadPhoto, BadRecipe.
        """
        source = SourceImage.of(image)
        pixels = None if mask is None else read_mask(mask, source.image.size)
        return self.generating(recipe, InitImage(source, pixels))

    def generating(self, recipe: Paint, init: InitImage | None = None) -> Iterator[events.Event]:
        """Run a recipe, on an image where it is an `Img2Img`; painting, refining and inpainting call this."""
        with self._lock:  # from the first look at the concepts: another thread may replace one
            yield from self._generate(self._resolve(recipe, init))

    # ---- resolve, then generate ----------------------------------------------------------------

    def resolve(self, recipe: Paint, init: InitImage | None = None) -> ImageRequest:
        """Resolve a recipe on this base with the concepts in use; see `generation.request`."""
        with self._lock:
            return self._resolve(recipe, init)

    def record(self, recipe: Paint) -> dict[str, Any]:
        """The metadata record of the recipe's images, but for seed and batch."""
        return self.resolve(recipe).record

    def _resolve(self, recipe: Paint, init: InitImage | None) -> ImageRequest:
        self._need(recipe.prompt, force=recipe.force)
        self._need(recipe.negative, force=recipe.force)
        request = resolve(self.base, recipe, self.concepts.loaded, self.adapters, init)
        return replace(request, warnings=(*self._words_for_concepts(recipe.prompt), *request.warnings))

    def _words_for_concepts(self, prompt: str) -> list[str]:
        """Notes for words of a prompt that are names of concepts in this folder or the library."""
        words = plain_words(prompt) - self.concepts.loaded.keys()  # those loaded are noticed where it is parsed
        names = (word for word in sorted(words)[:MAX_WORDS] if NAME.fullmatch(word) and library.locate(word))
        return [word_for_concept(name) for name in names]

    def _generate(self, request: ImageRequest) -> Iterator[events.Event]:
        """Generate a request's images batch by batch; the caller holds the lock."""
        for text in request.warnings:
            yield events.Note(text, warning=True)
        steps = sampler.start_of(self.base, request, request.strength).steps
        images: list[GeneratedImage] = []
        initial: list[InitialLatents] = []  # encoded by the worker's thread, once for all batches
        for seeds in request.batches():
            before, total = len(images) * steps, len(request.seeds) * steps
            batch = yield from self._batch(request, seeds, initial, before, total)
            for generated in self.filtering(batch) if self.filtering else batch:
                if not content_filter.is_blocked(generated.verdict):
                    xmp.with_source_type(generated.image, request.record[xmp.KEY])
                images.append(generated)
                yield _ready(generated, request.recipe)
        yield events.Done(images, request.record)

    def _batch(
        self,
        request: ImageRequest,
        seeds: tuple[int, ...],
        initial: list[InitialLatents],
        before: int,
        total: int,
    ) -> Generator[events.Event, None, list[GeneratedImage]]:
        """Generate one batch in the worker's thread.

        before, total  steps of the images before these, and of all
        """

        def run(emit: Callable[[events.Event], None]) -> list[GeneratedImage]:
            def on_step(done: int, latents: Tensor) -> None:
                preview = partial(self._preview, request, latents[0])
                emit(events.Progress("painting", before + done * len(seeds), total, preview=preview))

            with self.adapters.using(request.adapters):  # on within a batch only: nothing else meets them
                if request.canvas and not initial:
                    assert isinstance(request.recipe, Img2Img)
                    initial.append(img2img.encode(self.base, request.recipe, request.canvas))
                return sampler.generate(
                    self.base,
                    request,
                    seeds,
                    initial=initial[0] if initial else None,
                    on_step=on_step,
                    warn=lambda text: emit(events.Note(text, warning=True)),
                )

        images: list[GeneratedImage] = yield from stream(run, self._worker)
        return images

    def _preview(self, request: ImageRequest, latents: Tensor) -> Image.Image | None:
        """A preview of latents (C, h, w), pasted into the image they belong to."""
        h, w = latents.shape[-2:]
        factor = self.base.vae_scale_factor
        image = self.preview.image(latents, (w * factor, h * factor))
        return image and request.paste_back(image)

    # ---- short forms ---------------------------------------------------------------------------

    def paint(self, prompt: str, **recipe: Any) -> list[Image.Image]:
        """Text-to-image; keyword arguments are those of `recipes.Paint`.

        Raises Blocked when the content filter blocks an image; `painting` gives the others.
        """
        return self._paint_recipe(Paint.make(**{"prompt": prompt, "base": self.base.name, **recipe}))

    def refine(self, image: ImageLike | SourceImage, **recipe: Any) -> list[Image.Image]:
        """Img2img; keyword arguments are those of `recipes.Refine`.

        Options that are not given are the image's own, where it records them.
        """
        source = SourceImage.of(image)
        complete = inherited(Refine, source, {"base": self.base.name, **recipe})
        return _images(self.refining(complete, source))

    def inpaint(
        self,
        image: ImageLike | SourceImage,
        mask: MaskLike | None = None,
        prompt: str | None = None,
        **recipe: Any,
    ) -> list[Image.Image]:
        """Generate the pixels under the mask; keyword arguments are those of `recipes.Inpaint`.

        Options that are not given are the image's own, where it records them.
        """
        source = SourceImage.of(image)
        complete = inherited(Inpaint, source, {"base": self.base.name, "prompt": prompt, **recipe})
        return _images(self.inpainting(complete, source, mask))

    def _paint_recipe(self, recipe: Paint) -> list[Image.Image]:
        return _images(self.painting(recipe))

    # ---- the best of many ----------------------------------------------------------------------

    def choosing(self, recipe: Paint, best: Best, *, encoder: Encoder | None = None) -> Iterator[events.Event]:
        """Generate `best.of` images and keep the `recipe.n` best; yields those as ImageReady, the best first.

        Done has them in that order, with their scores under `chosen`, by seed. See `evaluation.best_of`.
        encoder  an opened one; by its name otherwise
        """
        from minikin.evaluation.best_of import Chooser

        with self._lock:
            self._need(recipe.prompt, force=recipe.force)
            chooser = Chooser.open(best, self.base, recipe, self.concepts.categories, encoder)
            for text in chooser.warnings:
                yield events.Note(text, warning=True)
            for event in self.painting(best.drafts(recipe)):
                if isinstance(event, events.Done):
                    best_images, scores = chooser.best(content_filter.without_blocked(event.result), recipe.n)
                    for generated in best_images:
                        generated.record["chosen"] = scores[generated.seed]
                        yield _ready(generated, recipe)
                    event = events.Done(best_images, {**event.facts, "chosen": scores})
                elif isinstance(event, events.ImageReady):
                    continue
                yield event

    # ---- around it -----------------------------------------------------------------------------

    def live(self, prompt: str = "", **recipe: Any) -> Live:
        """Generate while prompt, strengths and seed change; see `generation.live`. Arguments as for `paint`."""
        return Live(self.painting, Paint.make(**{"prompt": prompt, "base": self.base.name, **recipe}))

    def presets(self) -> list[dict[str, Any]]:
        """The presets of this base: name, description, steps, guidance, adapter, and whether it is ready."""
        recognised = presets.recognise(self.base).name
        names = dict.fromkeys([recognised, *presets.for_architecture(self.base.architecture)])
        if self.base.has_guidance_embedding:
            names = {recognised: None}
        architecture = self.base.architecture
        return [presets.describe(presets.PRESETS[n], architecture, n == recognised) for n in names]


def _ready(generated: GeneratedImage, recipe: Paint) -> events.ImageReady:
    return events.ImageReady(
        generated.image, recipe.prompt, generated.seed, generated.verdict, generated.record
    )


def _images(run: Iterator[events.Event]) -> list[Image.Image]:
    return [generated.image for generated in content_filter.without_blocked(last(run).result, strict=True)]


def last(run: Iterator[events.Event]) -> events.Done:
    """Run a command to its end; its last event."""
    done = None
    for event in run:
        done = event
    assert isinstance(done, events.Done)
    return done
