"""Paint: a recipe and loaded concepts to pictures, through the stock diffusers pipeline.

Each picture has its own CPU generator, seeded seed + i, so that it does not depend on the batch it
was computed in. The pipeline is given packed keys and values as `prompt_embeds`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minikin.bases import engines
from minikin.bases.base import Base
from minikin.bases.editing import Loaded
from minikin.bases.prompt import Prompt
from minikin.bases.regions import Steering, steered
from minikin.errors import BadRecipe, OutOfMemory
from minikin.painting import schedulers
from minikin.painting.course import Course, course
from minikin.painting.plan import Plan, plan
from minikin.recipes import WHOLE, Paint

LARGE = 1.6  # times the base's own size: from there on subjects repeat


@dataclass(frozen=True)
class Painted:
    """One picture and the seed it grew from."""

    image: Image.Image
    seed: int


@torch.no_grad()
def paint_batch(
    base: Base, recipe: Paint | Plan, prompt: Prompt, loaded: Mapping[str, Loaded], seeds: list[int], *,
    on_step: Callable[[int], None] | None = None, tell: engines.Tell = engines.log.warning,
) -> list[Painted]:  # fmt: skip
    """Paint one batch. `on_step(done)` is called after every step and may raise events.Cancelled.

    `tell` hears of an engine that failed.

    Adapters are the caller's matter: whatever is on the base (`Adapters.using`) takes part.
    """
    decided = recipe if isinstance(recipe, Plan) else plan(base, recipe)
    way = course(base, decided, prompt, loaded, len(seeds), calls(base, decided))
    told = (lambda done, _: on_step(done)) if on_step else None
    return paint_course(base, decided, way, seeds, on_step=told, tell=tell)


def calls(base: Base, decided: Plan) -> int:
    """How often the U-Net is called: once a step, twice with Heun but for the last."""
    order: int = _scheduler(decided, base.pipe.scheduler).order
    return decided.steps * order - (order - 1)


@torch.no_grad()
def paint_course(
    base: Base, decided: Plan, way: Course, seeds: list[int], *,
    on_step: Callable[[int, Tensor], None] | None = None, tell: engines.Tell = engines.log.warning,
) -> list[Painted]:  # fmt: skip
    """Paint one batch along its course. `on_step(done, latents (B, C, h, w))` may raise events.Cancelled."""
    recipe = decided.recipe
    pipe = base.pipe
    own = pipe.scheduler
    scheduler = _scheduler(decided, own)
    total = calls(base, decided)
    side = base.size_px
    kwargs: dict[str, Any] = {
        **way.start(base), "num_inference_steps": decided.steps,
        "width": recipe.width or side, "height": recipe.height or side,
        "generator": [torch.Generator().manual_seed(s) for s in seeds],
    }  # fmt: skip
    if decided.pinned:
        kwargs["timesteps"] = decided.pinned

    steering = _steering(base, way, len(seeds), kwargs["height"], kwargs["width"])

    def after(running: Any, index: int, _t: Any, state: dict[str, Any]) -> dict[str, Any]:
        if on_step:
            on_step(index + 1, state["latents"])
        if steering:
            steering.share = (index + 1) / total
        return way.after(base, running, index + 1, state)

    kwargs["callback_on_step_end"] = after
    try:
        pipe.scheduler = scheduler
        # an exported U-Net knows nothing of regions
        engine = engines.engine("eager" if steering else recipe.engine)
        with engine.on(base, tell), steered(base.unet, steering):
            images = pipe(**kwargs).images
    except torch.OutOfMemoryError as e:
        raise OutOfMemory(
            f"Not enough memory on {base.device} for {len(seeds)} pictures at once. Try --batch "
            f"{max(1, len(seeds) // 2)} or a smaller size."
        ) from e
    finally:
        pipe.scheduler = own
    return [Painted(image, seed) for image, seed in zip(images, seeds, strict=True)]


def _steering(base: Base, way: Course, copies: int, height: int, width: int) -> Steering | None:
    """The regions of the whole prompt: they hold while the category stands in for a concept, too."""
    placed = way.stages[-1].placed
    return Steering(placed, copies, (height // base.factor, width // base.factor)) if placed else None


def _scheduler(decided: Plan, own: Any) -> Any:
    """The plan's scheduler, or a fresh copy of the base's own."""
    name, preset = decided.recipe.scheduler, decided.preset
    if name is None:
        return type(own).from_config(own.config)
    return schedulers.build(name, own, preset.config if name == preset.scheduler else None)


def cautions(base: Base, recipe: Paint, prompt: Prompt) -> list[str]:
    """What is possible, but seldom what was meant; one sentence each."""
    found = []
    n, most = base.count_tokens(prompt.text), base.n_tokens - 2
    if n > most:
        found.append(f"The prompt has {n} tokens; this base reads the first {most} and leaves out the rest.")
    w, h = recipe.width or base.size_px, recipe.height or base.size_px
    if max(w, h) > LARGE * base.size_px:
        found.append(
            f"This base was trained on pictures of {base.size_px} px; at {w}x{h} it tends to repeat the "
            "subject."
        )
    if recipe.interval not in (None, WHOLE) and ((recipe.guidance or 0) <= 1 or base.has_guidance_embedding):
        found.append("The guidance interval has no effect: no step of this picture is guided by a second pass.")
    return found


def check(base: Base, recipe: Paint) -> None:
    """Raise BadRecipe when the base cannot paint pictures of this size or with this scheduler."""
    if base.is_inpainting:
        raise BadRecipe(
            f"'{base.name}' is an inpainting model: it fills masked parts of a picture and paints nothing "
            "from a prompt alone. Use the ordinary model of its family."
        )
    named = schedulers.scheduler_name(recipe.scheduler) if recipe.scheduler else ""
    if base.has_guidance_embedding and named not in ("", "LCM"):
        raise BadRecipe(
            f"'{base.name}' is a latent consistency model and paints with the LCM scheduler only, not "
            f"'{recipe.scheduler}'. Leave --scheduler out."
        )
    step = base.factor * 2 ** (len(base.unet.config.block_out_channels) - 1)
    for name in ("width", "height"):
        value = getattr(recipe, name)
        if value is not None and value % step:
            near = step * max(1, round(value / step))
            raise BadRecipe(
                f"{name} must be a multiple of {step} for this base, but it is {value}; use {near}."
            )
