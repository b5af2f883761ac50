"""The engine that paints: a Studio for one device, with every request's concepts kept apart."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minikin.errors import MinikinError
from minikin.events import Event
from minikin.generation import batching, img2img
from minikin.generation import sampler as painting
from minikin.generation.plan import Plan
from minikin.generation.schedulers import SCHEDULERS
from minikin.models.lora import adapters
from minikin.models.prompt import Prompt, parse
from minikin.perfusion.conditioning import Loaded, load
from minikin.recipes import Paint, Recipe, Rework, Teach
from minikin.server.batch_size import Room
from minikin.server.engine import Concepts, Given, OnStep, Pinned, Prepared, Row
from minikin.server.job_types import KINDS, job_of
from minikin.studio import Studio

ON_CPU = 8  # images at once: more are no quicker there, and keep everybody waiting
READY = 512  # concepts kept ready for this base; each takes about 100 KB
_NOTHING = torch.empty(0)


class NotFinite(MinikinError):
    """The model gave numbers that are none: an image that cannot be shown."""

    code = "non_finite_output"


@dataclass(frozen=True)
class Planned:
    """How a recipe is painted here."""

    plan: Plan
    prompt: Prompt
    wanted: tuple[tuple[Any, float], ...]
    facts: dict[str, Any]


class StudioEngine:
    """See `engine.Engine`.

    quick  the engine (`models.backends`) of what is painted live with the quickest preset; whatever else is
           painted is PyTorch's, to the bit
    """

    def __init__(self, studio: Studio, quick: str = "eager") -> None:
        self.studio, self.quick = studio, quick
        self.name, self.side = studio.base.name, studio.base.size_px
        self.memory = Room.of(studio.base)
        self._door = threading.Lock()  # LoRA files and plans, one request at a time
        self._ready: OrderedDict[tuple[str, str], Loaded] = OrderedDict()

    def prepare(self, kind: str, recipe: Recipe, concepts: Concepts, given: Given | None = None) -> Prepared:
        for one in concepts.values():
            self.studio.concepts.check(one.concept)
        if isinstance(recipe, Teach):
            side = recipe.size or self.side
            if kind == "masks":
                return Prepared(recipe, concepts, None, 1, side**2)
            return Prepared(recipe, concepts, None, recipe.steps or recipe.max_steps, side**2)
        assert isinstance(recipe, Paint)
        base = self.studio.base
        job = job_of(given) if given and isinstance(recipe, Rework) else None
        with self._door:
            # planning asks concepts for their facts alone; they are encoded in the worker's thread
            view = self._view({n: Loaded(p.concept, None, _NOTHING) for n, p in concepts.items()})
            prompt = parse(recipe.prompt, view.concepts.categories)
            painting.check(base, recipe)
            plan, wanted = view.prepared(recipe, prompt)
            facts = view.facts_now(recipe, job)
        identity = tuple(sorted((n, p.sha256) for n, p in concepts.items()))
        key = batching.group(plan, prompt, wanted, identity)
        w, h = plan.recipe.width or base.size_px, plan.recipe.height or base.size_px
        said = (*plan.warnings, *painting.cautions(base, plan.recipe, prompt, view.concepts.loaded))
        own = Planned(plan, prompt, tuple(wanted), facts)
        if isinstance(recipe, Rework):  # done alone; its verb says the warnings
            work = img2img.begun(base, recipe, job)
            assert work is not None
            w, h = work.canvas.padded
            return Prepared(recipe, concepts, None, painting.steps(base, plan, recipe.strength), w * h, (), own)
        return Prepared(recipe, concepts, key, plan.steps, w * h, said, own)

    def paint(self, rows: Sequence[Row], on_step: OnStep) -> list[Image.Image]:
        base, last = self.studio.base, torch.empty(0)
        planned: list[Planned] = [row.prepared.plan for row in rows]
        pixels = planned[0].plan.recipe
        size = (pixels.width or base.size_px, pixels.height or base.size_px)

        def step(done: int, latents: Tensor) -> None:
            nonlocal last
            last = latents
            on_step(done, lambda i: self.studio.colours.show(latents[i], size))

        with (
            self.studio.turn(), self.studio.adapters.using(list(planned[0].wanted)),
            self.memory.measuring(len(rows) * rows[0].prepared.pixels),
        ):  # fmt: skip
            made = batching.paint_together(
                base,
                [
                    batching.Row(p.plan, p.prompt, self._loaded(row.prepared.concepts), row.seed)
                    for p, row in zip(planned, rows, strict=True)
                ],
                on_step=step,
            )
        if not bool(torch.isfinite(last).all()):
            raise NotFinite(
                "The model gave numbers that are not finite, so there is no image. Try other guidance or "
                "LoRA weights; in half precision, restart the server with --dtype float32."
            )
        self.studio.colours.learn(last[0], made[0].image)
        return [one.image for one in made]

    def check(self) -> None:
        pass  # it ends with this process

    def room(self, prepared: Prepared) -> int:
        fits = self.memory.fits(prepared.pixels)
        return min(ON_CPU, fits) if self.studio.base.device.type == "cpu" else fits

    def run(self, kind: str, prepared: Prepared, given: Given) -> Iterator[Event]:
        verb = KINDS[kind].verb
        assert verb is not None, kind
        with self.studio.turn():
            view = self._view(self._loaded(prepared.concepts))
            yield from verb(view, prepared.recipe, given)

    def facts(self, prepared: Prepared) -> dict[str, Any]:
        if prepared.plan is None:
            base = self.studio.base
            own = prepared.recipe.model_dump(mode="json", exclude={"device", "dtype"})
            return {"recipe": own, "base": {"name": base.name, "fingerprint": base.fingerprint}}
        facts: dict[str, Any] = prepared.plan.facts
        return facts

    def describe(self) -> dict[str, Any]:
        base = self.studio.base
        return {
            "base": {"name": base.name, "architecture": base.architecture, "fingerprint": base.fingerprint,
                     "licence": base.licence, "side": base.size_px},
            "presets": self.studio.presets(),
            "live": self.live,
            "samplers": list(SCHEDULERS),
            "loras": sorted({p.stem for p in adapters.folder().glob("*.safetensors")}),
        }  # fmt: skip

    def hastened(self, recipe: Paint) -> Paint:
        """On the quick engine where that is warm: every preset, LoRA and size is an export of its own."""
        usual = recipe.preset == self.live and not (recipe.width or recipe.height or "<lora:" in recipe.prompt)
        return recipe.model_copy(update={"engine": self.quick}) if usual else recipe

    @cached_property
    def live(self) -> str | None:
        """The preset that is ready with the fewest steps it can do with; of several the one made for few."""
        ready = [p for p in self.studio.presets() if p["ready"]]

        def order(p: dict[str, Any]) -> tuple[int, int, int]:
            return min(p["allowed"], default=p["steps"]), len(p["allowed"]), p["steps"]

        quickest = min(ready, key=order, default=None)
        return str(quickest["name"]) if quickest else None

    def warm_up(self) -> None:
        usual = Paint(prompt="a photo of a cat", base=self.name, steps=2)
        quick = self.hastened(usual.model_copy(update={"preset": self.live, "steps": None}))
        for recipe in (usual, quick) if self.quick != "eager" else (usual,):
            self.paint([Row(self.prepare("paint", recipe, {}), 0)], lambda done, preview: None)

    def _view(self, loaded: Mapping[str, Loaded]) -> Studio:
        """A Studio in which these concepts alone are in use."""
        view = self.studio.beside()
        view.concepts.loaded = dict(loaded)
        return view

    def _loaded(self, concepts: Concepts) -> dict[str, Loaded]:
        return {name: self._encoded(name, one) for name, one in concepts.items()}

    def _encoded(self, name: str, one: Pinned) -> Loaded:
        key = (one.sha256, name)
        if key not in self._ready:
            self._ready[key] = load(self.studio.base, one.concept)
            while len(self._ready) > READY:
                self._ready.popitem(last=False)
        self._ready.move_to_end(key)
        return self._ready[key]
