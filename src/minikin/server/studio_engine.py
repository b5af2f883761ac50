"""The server's engine on a Studio: one base on one device, with the concepts of each request separated."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minikin.errors import NanOrInf
from minikin.events import Event
from minikin.generation import sampler
from minikin.generation.batching import BatchRow, batch_key, generate_together
from minikin.generation.request import ImageRequest, resolve
from minikin.generation.schedulers import SCHEDULERS, SCHEDULES
from minikin.models.lora import adapters
from minikin.models.presets import PREFERENCE
from minikin.perfusion.conditioning import PreparedConcept, prepare_concept
from minikin.recipes import Img2Img, Paint, Recipe, Teach
from minikin.server.batch_size import BatchSizer
from minikin.server.engine import Concepts, JobInputs, OnStep, PinnedConcept, PreparedRequest, Row
from minikin.server.job_types import JOB_TYPES, init_image
from minikin.studio import Studio

CPU_BATCH = 8  # images at once: more are no faster there, and keep other jobs waiting
MAX_PREPARED = 512  # concepts encoded for this base, about 100 KB each
_NOTHING = torch.empty(0)


class StudioEngine:
    """See `engine.Engine`.

    live_engine  inference backend (`models.backends`) of live generation with the fastest preset; everything
                 else runs in eager PyTorch, bit for bit as in diffusers
    """

    def __init__(self, studio: Studio, live_engine: str = "eager") -> None:
        self.studio, self.live_engine = studio, live_engine
        self.name, self.side = studio.base.name, studio.base.size_px
        self.memory = BatchSizer.for_base(studio.base)
        self._prepare_lock = threading.Lock()  # LoRA files and plans, one request at a time
        self._prepared: OrderedDict[tuple[str, str], PreparedConcept] = OrderedDict()

    def prepare(
        self, kind: str, recipe: Recipe, concepts: Concepts, inputs: JobInputs | None = None
    ) -> PreparedRequest:
        for concept in concepts.values():
            self.studio.concepts.check(concept.concept)
        if isinstance(recipe, Teach):
            side = recipe.size or self.side
            if kind == "masks":
                return PreparedRequest(recipe, concepts, None, 1, side**2)
            return PreparedRequest(recipe, concepts, None, recipe.steps or recipe.max_steps, side**2)
        assert isinstance(recipe, Paint)
        base = self.studio.base
        init = init_image(inputs) if inputs and isinstance(recipe, Img2Img) else None
        with self._prepare_lock:
            # resolving needs facts of concepts alone; their tensors are prepared in the worker's thread
            placeholders = {n: PreparedConcept(p.concept, None, _NOTHING) for n, p in concepts.items()}
            request = resolve(base, recipe, placeholders, self.studio.adapters, init)
        if request.canvas:  # runs alone, resolves again when it runs, and yields its warnings then
            width, height = request.canvas.padded
            steps = sampler.start_of(base, request, request.strength).steps
            without_pixels = replace(request, init=None, canvas=None)  # jobs wait, and are remembered
            return PreparedRequest(recipe, concepts, None, steps, width * height, (), without_pixels)
        identity = tuple(sorted((n, p.sha256) for n, p in concepts.items()))
        width, height = request.recipe.width or base.size_px, request.recipe.height or base.size_px
        key = batch_key(request, identity)
        return PreparedRequest(recipe, concepts, key, request.steps, width * height, request.warnings, request)

    def paint(self, rows: Sequence[Row], on_step: OnStep) -> list[Image.Image]:
        base, last = self.studio.base, torch.empty(0)
        requests: list[ImageRequest] = [row.prepared.plan for row in rows]
        pixels = requests[0].recipe
        size = (pixels.width or base.size_px, pixels.height or base.size_px)

        def step(done: int, latents: Tensor) -> None:
            nonlocal last
            last = latents
            on_step(done, lambda i: self.studio.preview.image(latents[i], size))

        with (
            self.studio.turn(), self.studio.adapters.using(requests[0].adapters),
            self.memory.measuring(len(rows) * rows[0].prepared.pixels),
        ):  # fmt: skip
            results = generate_together(
                base,
                [
                    BatchRow(request.with_concepts(self._loaded(row.prepared.concepts)), row.seed)
                    for request, row in zip(requests, rows, strict=True)
                ],
                on_step=step,
            )
        if not bool(torch.isfinite(last).all()):
            raise NanOrInf(
                "The model returned NaN or Inf, so there is no image. Try other guidance or LoRA weights. "
                "In half precision, restart the server with --dtype float32."
            )
        self.studio.preview.fit(last[0], results[0].image)
        return [item.image for item in results]

    def check(self) -> None:
        pass  # lives as long as this process

    def max_batch(self, prepared: PreparedRequest) -> int:
        fits = self.memory.fits(prepared.pixels)
        return min(CPU_BATCH, fits) if self.studio.base.device.type == "cpu" else fits

    def run(self, kind: str, prepared: PreparedRequest, inputs: JobInputs) -> Iterator[Event]:
        runner = JOB_TYPES[kind].run
        assert runner is not None, kind
        with self.studio.turn():
            studio = self._view(self._loaded(prepared.concepts))
            yield from runner(studio, prepared.recipe, inputs)

    def facts(self, prepared: PreparedRequest) -> dict[str, Any]:
        if prepared.plan is None:
            base = self.studio.base
            recipe = prepared.recipe.model_dump(mode="json", exclude={"device", "dtype"})
            return {"recipe": recipe, "base": {"name": base.name, "fingerprint": base.fingerprint}}
        facts: dict[str, Any] = prepared.plan.record
        return facts

    def describe(self) -> dict[str, Any]:
        base = self.studio.base
        return {
            "base": {"name": base.name, "architecture": base.architecture, "fingerprint": base.fingerprint,
                     "licence": base.licence, "side": base.size_px},
            "presets": self.studio.presets(),
            "live": self.live_preset,
            "samplers": list(SCHEDULERS), "schedules": list(SCHEDULES),
            "loras": sorted({p.stem for p in adapters.folder().glob("*.safetensors")}),
        }  # fmt: skip

    def with_live_engine(self, recipe: Paint) -> Paint:
        """On the live engine where it is warm: every preset, LoRA and size needs its own export."""
        default = recipe.preset == self.live_preset and not (
            recipe.width or recipe.height or "<lora:" in recipe.prompt
        )
        return recipe.model_copy(update={"backend": self.live_engine}) if default else recipe

    @cached_property
    def live_preset(self) -> str | None:
        """The first in `models.presets.PREFERENCE` of the ready presets that paint in one or two steps.

        Where there is none, the one with the fewest steps.
        """
        ready = [p for p in self.studio.presets() if p["ready"]]

        def order(p: dict[str, Any]) -> tuple[int, int]:
            return max(2, min(p["allowed"], default=p["steps"])), PREFERENCE.index(p["name"])

        fastest = min(ready, key=order, default=None)
        return str(fastest["name"]) if fastest else None

    def warm_up(self) -> None:
        default = Paint(prompt="a photo of a cat", base=self.name, steps=2)
        live_engine = self.with_live_engine(
            default.model_copy(update={"preset": self.live_preset, "steps": None})
        )
        for recipe in (default, live_engine) if self.live_engine != "eager" else (default,):
            self.paint([Row(self.prepare("paint", recipe, {}), 0)], lambda done, preview: None)

    def _view(self, loaded: Mapping[str, PreparedConcept]) -> Studio:
        """A Studio in which only these concepts are loaded."""
        view = self.studio.beside()
        view.concepts.loaded = dict(loaded)
        return view

    def _loaded(self, concepts: Concepts) -> dict[str, PreparedConcept]:
        return {name: self._prepared_concept(name, pinned) for name, pinned in concepts.items()}

    def _prepared_concept(self, name: str, pinned: PinnedConcept) -> PreparedConcept:
        key = (pinned.sha256, name)
        if key not in self._prepared:
            self._prepared[key] = prepare_concept(self.studio.base, pinned.concept)
            while len(self._prepared) > MAX_PREPARED:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(key)
        return self._prepared[key]
