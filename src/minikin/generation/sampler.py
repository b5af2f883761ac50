"""Paint: a recipe and loaded concepts to images, through the stock diffusers pipeline.

Each image has its own CPU generator, seeded seed + i, so that it does not depend on the batch it
was computed in. The pipeline is given packed keys and values as `prompt_embeds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minikin.errors import BadRecipe, OutOfMemory
from minikin.generation import schedulers
from minikin.generation.conditioning_schedule import Course, course
from minikin.generation.decode import pictures
from minikin.generation.initial_latents import EVERYTHING, Ground, Overpainting
from minikin.generation.plan import Plan, plan
from minikin.generation.start_step import begin
from minikin.generation.tiling import Windows, tiled_autoencoder
from minikin.models import backends, presets
from minikin.models.base import Base
from minikin.models.memory import ran_out
from minikin.models.prompt import Prompt
from minikin.models.regions import Placed, Steering, steered, within
from minikin.perfusion.conditioning import Loaded
from minikin.recipes import WHOLE, Paint, Rework

OnStep = Callable[[int, Tensor], None]
LARGE = 1.6  # times the base's own size: from there on subjects repeat


@dataclass(frozen=True)
class Painted:
    """One image, the seed it grew from, and what the content filter found (see `filtering`)."""

    image: Image.Image
    seed: int
    verdict: dict[str, Any] | None = None


@torch.no_grad()
def paint_batch(
    base: Base, recipe: Paint | Plan, prompt: Prompt, loaded: Mapping[str, Loaded], seeds: list[int], *,
    on_step: OnStep | None = None, tell: backends.Tell = backends.log.warning, ground: Ground | None = None,
) -> list[Painted]:  # fmt: skip
    """Paint one batch.

    `on_step(done, latents (B, C, h, w))` is called after every step and may raise events.Cancelled.
    `tell` hears of an engine that failed.
    `ground` is what is painted on; nothing by default, and images are then of the recipe's size.

    Adapters are the caller's matter: whatever is on the base (`Adapters.using`) takes part.
    """
    decided = recipe if isinstance(recipe, Plan) else plan(base, recipe)
    total, whole = _calls(base, decided, ground.strength if ground else 1.0)
    way = course(base, decided, prompt, loaded, len(seeds), total, whole - total)
    return paint_course(base, decided, way, seeds, on_step=on_step, tell=tell, ground=ground)


def calls(base: Base, decided: Plan) -> int:
    """How often the U-Net is called, from nothing: once a step, twice with Heun but for the last."""
    return _calls(base, decided, 1.0)[0]


def _calls(base: Base, decided: Plan, strength: float) -> tuple[int, int]:
    """Calls that run at this strength, and those of a whole image."""
    own = base.pipe.scheduler
    beginning, order = begin(decided, _class(decided, own), strength), schedulers.order(_class(decided, own))
    total, whole = (n * order - (order - 1) for n in (beginning.steps, beginning.steps + beginning.skipped))
    return total, whole


@torch.no_grad()
def paint_course(
    base: Base, decided: Plan, way: Course, seeds: list[int], *,
    on_step: OnStep | None = None, tell: backends.Tell = backends.log.warning, ground: Ground | None = None,
) -> list[Painted]:  # fmt: skip
    """Paint one batch along its course; see `paint_batch`."""
    recipe = decided.recipe
    pipe = base.pipe
    own = pipe.scheduler
    strength = ground.strength if ground else 1.0
    beginning = begin(decided, _class(decided, own), strength)
    scheduler = _scheduler(decided, own, beginning.levels)
    total, whole = _calls(base, decided, strength)
    height, width = recipe.height or base.size_px, recipe.width or base.size_px
    if ground:
        height, width = (n * base.factor for n in ground.size)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    kwargs: dict[str, Any] = {
        **way.start(base), "num_inference_steps": beginning.steps, "width": width, "height": height,
        "generator": generators, "output_type": "latent",
    }  # fmt: skip
    if beginning.pinned:
        kwargs["timesteps"] = list(beginning.pinned)
    over = Overpainting(ground, base, scheduler, beginning, generators) if ground else None
    if over:
        kwargs |= {"latents": over.latents}
    view = ground.view if ground else EVERYTHING
    placed = [Placed(within(p.box, view), p.tokens) for p in way.stages[-1].placed]
    # the regions of the whole prompt: they hold while the category stands in for a concept, too
    size = (height // base.factor, width // base.factor)
    windows = Windows(size, ground.side, placed, len(seeds)) if ground and ground.side else None
    steering = Steering(placed, len(seeds), size) if placed and not windows else None

    def after(running: Any, index: int, _t: Any, state: dict[str, Any]) -> dict[str, Any]:
        if on_step:
            on_step(index + 1, state["latents"])
        share = (whole - total + index + 1) / whole
        if steering:
            steering.share = share
        if windows:
            windows.at(share)
        if over:
            state = over.after(index + 1, state)
        return way.after(base, running, index + 1, state)

    kwargs["callback_on_step_end"] = after
    engine = backends.engine("eager" if placed else recipe.engine)  # an exported U-Net knows nothing of regions
    looking = windows.on(base) if windows else nullcontext()
    seen = over.seen() if over else nullcontext()
    with _running(base, scheduler, len(seeds)), engine.on(base, tell), steered(base.unet, steering):
        with looking, seen:
            latents = pipe(**kwargs).images  # of a consistency model, what its last step expects
        with tiled_autoencoder(base) if over else nullcontext():
            images = pictures(base, over.latents if over else latents, tell)
    return [Painted(image, seed) for image, seed in zip(images, seeds, strict=True)]


@contextmanager
def _running(base: Base, scheduler: Any, n: int) -> Iterator[None]:
    """Inside, the pipeline has this scheduler; raises OutOfMemory when n images are too many."""
    own = base.pipe.scheduler
    base.pipe.scheduler = scheduler
    try:
        yield
    except RuntimeError as e:
        if not ran_out(e):
            raise
        raise OutOfMemory(
            f"Not enough memory on {base.device} for {n} images at once. Try --batch {max(1, n // 2)} or a "
            "smaller size."
        ) from e
    finally:
        base.pipe.scheduler = own


def steps(base: Base, decided: Plan, strength: float = 1.0) -> int:
    """How many steps run at this strength."""
    return begin(decided, _class(decided, base.pipe.scheduler), strength).steps


def _class(decided: Plan, own: Any) -> str:
    """diffusers' class name of the plan's scheduler."""
    name = decided.recipe.scheduler
    return schedulers.SCHEDULERS[name][0] if name else type(own).__name__


def _scheduler(decided: Plan, own: Any, levels: int | None = None) -> Any:
    """The plan's scheduler, or a fresh copy of the base's own; of `levels` noise levels or all."""
    name, preset = decided.recipe.scheduler, decided.preset
    if name is None:
        return schedulers.own(own, levels)
    return schedulers.build(name, own, preset.config if name == preset.scheduler else None, levels)


def cautions(base: Base, recipe: Paint, prompt: Prompt, concepts: Mapping[str, Loaded]) -> list[str]:
    """What is possible, but seldom what was meant; one sentence each."""
    found = []
    n, most = base.count_tokens(prompt.text), base.n_tokens - 2
    if n > most:
        found.append(f"The prompt has {n} tokens; this base reads the first {most} and leaves out the rest.")
    w, h = recipe.width or base.size_px, recipe.height or base.size_px
    if not isinstance(recipe, Rework) and max(w, h) > LARGE * base.size_px:
        found.append(
            f"This base was trained on images of {base.size_px} px; at {w}x{h} it tends to repeat the subject."
        )
    gates = [f"--{k}" for k in ("beta", "tau") if getattr(recipe, k) is not None]
    gates += ["--lock global"] * (recipe.lock == "global")
    if gates and all(concepts[u.name].concept.mode == "row" for u in prompt.uses):
        found.append(f"No effect of {', '.join(gates)}: no concept of the prompt has a gate (mode gated).")
    embedded = presets.PRESETS[recipe.preset].embedded if recipe.preset else base.has_guidance_embedding
    if recipe.interval not in (None, WHOLE) and ((recipe.guidance or 0) <= 1 or embedded):
        found.append("The guidance interval has no effect: no step of this image is guided by a second pass.")
    return found


def check(base: Base, recipe: Paint) -> None:
    """Raise BadRecipe when the base cannot paint images of this size or with this scheduler."""
    named = schedulers.scheduler_name(recipe.scheduler) if recipe.scheduler else ""
    if base.has_guidance_embedding and named not in ("", "LCM"):
        raise BadRecipe(
            f"'{base.name}' is a latent consistency model and paints with the LCM scheduler only, not "
            f"'{recipe.scheduler}'. Leave --scheduler out."
        )
    if isinstance(recipe, Rework):  # any size, on any U-Net
        return
    if base.is_inpainting:
        raise BadRecipe(
            f"'{base.name}' is an inpainting model: it fills masked parts of an image and paints nothing "
            "from a prompt alone. Use the ordinary model of its family, or `minikin inpaint`."
        )
    step = base.grid
    for name in ("width", "height"):
        value = getattr(recipe, name)
        if value is not None and value % step:
            near = step * max(1, round(value / step))
            raise BadRecipe(
                f"{name} must be a multiple of {step} for this base, but it is {value}; use {near}."
            )
