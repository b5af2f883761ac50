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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from minikin import events
from minikin.bases.attached import Concepts
from minikin.bases.base import Base
from minikin.bases.covariance import Covariance, covariance, read_captions
from minikin.bases.prompt import UNKNOWN_HINT, concept_tags, parse
from minikin.bases.registry import open_base
from minikin.concepts import library
from minikin.concepts.concept import Concept, check_category, check_name
from minikin.errors import BadRecipe, UnknownName
from minikin.painting import paint as painting
from minikin.painting.paint import Painted
from minikin.painting.sheet import contact_sheet
from minikin.recipes import Paint, Teach
from minikin.stream import stream
from minikin.teaching.photos import Photo, load_photos
from minikin.teaching.teach import teach

PREVIEW = 96  # pixels: 2 to 3 KB inside a concept file


class Studio:
    """One open base and the concepts in use on it.

    Calls from several threads take turns; a verb's generator holds its turn until it ends or is
    closed, so run each to its end in one thread.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self.concepts = Concepts(base)
        self._lock = threading.RLock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="minikin")

    @classmethod
    def open(cls, base: str = "tiny", **how: Any) -> Studio:
        """Open a base by name, folder, file or hub id; see `bases.registry.open_base`."""
        return cls(open_base(base, **how))

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
                    event = self._finished(event, recipe)
                yield event

    def teach(self, photos: str | Path | Sequence[Photo], **recipe: Any) -> Concept:
        """Teach a concept and return it; keyword arguments are those of `recipes.Teach`."""
        wanted = Teach.make(**{"base": self.base.name, **recipe})
        concept: Concept = _last(self.teaching(photos, wanted)).result
        return concept

    def _finished(self, done: events.Done, recipe: Teach) -> events.Done:
        """Put the new concept into use, with a small picture of it inside."""
        concept: Concept = done.result
        self.concepts.add(concept)
        if not recipe.preview or done.facts["interrupted"]:
            return done
        (picture,) = self._look(concept, [1])
        small = io.BytesIO()
        picture.convert("RGB").resize((PREVIEW, PREVIEW)).save(small, "JPEG", quality=80)
        return events.Done(replace(concept, preview=small.getvalue()), done.facts)

    def _sample(self, concept: Concept) -> Image.Image:
        """A few pictures of a concept that is still being taught."""
        return contact_sheet(self._look(concept, [1, 2, 3]), columns=3)

    def _look(self, concept: Concept, seeds: list[int]) -> list[Image.Image]:
        self.concepts.add(concept)
        recipe = Paint(prompt=f"a photo of <{concept.name}>", base=self.base.name, steps=15, seed=1)
        prompt = parse(recipe.prompt, self.concepts.categories)
        made = painting.paint_batch(self.base, recipe, prompt, self.concepts.loaded, seeds)
        return [one.image for one in made]

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
            f"C of {found.n_captions:,} captions, {found.n_tokens:,} tokens: condition number "
            f"{found.condition:.1e}, ridge {found.ridge:g}."
        )
        return found

    def _check_not_a_word(self, recipe: Teach) -> None:
        if recipe.name == recipe.category.lower():
            raise BadRecipe(
                f"The concept's name '{recipe.name}' is its category's own word. Give it a name of its "
                f"own, for example my_{recipe.name}."
            )

    # ---- painting ----------------------------------------------------------------------------

    def painting(self, recipe: Paint) -> Iterator[events.Event]:
        """Paint; yields a Picture for each as it is ready, then Done with all of them."""
        self._need(recipe.prompt)
        self._need(recipe.negative)
        prompt = parse(recipe.prompt, self.concepts.categories)
        if prompt.loras:
            raise BadRecipe("<lora:...> tags are not supported yet; remove them from the prompt.")
        painting.check(self.base, recipe)
        with self._lock:
            made: list[Painted] = []
            total = recipe.n * recipe.steps
            for i in range(0, recipe.n, recipe.batch):
                seeds = [recipe.seed + k for k in range(i, min(i + recipe.batch, recipe.n))]
                some = yield from self._batch(recipe, prompt, seeds, i * recipe.steps, total)
                made += some
                for one in some:
                    yield events.Picture(one.image, recipe.prompt, one.seed)
            yield events.Done(made, self.facts(recipe))

    def _batch(
        self, recipe: Paint, prompt: Any, seeds: list[int], before: int, total: int
    ) -> Generator[events.Event, None, list[Painted]]:
        work = stream(
            lambda emit: painting.paint_batch(
                self.base, recipe, prompt, self.concepts.loaded, seeds,
                on_step=lambda s: emit(events.Progress("painting", before + s * len(seeds), total)),
            ),
            self._worker,
        )  # fmt: skip
        painted: list[Painted] = yield from work
        return painted

    def paint(self, prompt: str, **recipe: Any) -> list[Image.Image]:
        """Paint pictures and return them; keyword arguments are those of `recipes.Paint`."""
        wanted = Paint.make(**{"prompt": prompt, "base": self.base.name, **recipe})
        return [p.image for p in _last(self.painting(wanted)).result]

    def facts(self, recipe: Paint) -> dict[str, Any]:
        """What a picture should know about how it was made."""
        used = [n for n in concept_tags(f"{recipe.prompt} {recipe.negative}") if n in self.concepts.loaded]
        return {
            "recipe": recipe.model_dump(exclude={"device", "dtype", "batch", "n"}),
            "base": {"name": self.base.name, "fingerprint": self.base.fingerprint},
            "concepts": {
                n: {"category": self.concepts.loaded[n].concept.category, "sha256": self.concepts.digest(n)}
                for n in used
            },
            "guidance": painting.guidance_for(self.base, recipe.guidance),
        }  # fmt: skip


def _last(run: Iterator[events.Event]) -> events.Done:
    done = None
    for event in run:
        done = event
    assert isinstance(done, events.Done)
    return done
