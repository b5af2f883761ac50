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

from minikin.bases import engines
from minikin.bases.base import Base
from minikin.bases.editing import Condition, Loaded, condition
from minikin.bases.prompt import Prompt, parse
from minikin.concepts.edit import Gate
from minikin.errors import BadRecipe, OutOfMemory
from minikin.painting import schedulers
from minikin.painting.plan import Plan, plan
from minikin.recipes import Paint

LARGE = 1.6  # times the base's own size: from there on subjects repeat


@dataclass(frozen=True)
class Painted:
    """One picture and the seed it grew from."""

    image: Image.Image
    seed: int


def conditions(
    base: Base, recipe: Paint, prompt: Prompt, loaded: Mapping[str, Loaded], copies: int
) -> tuple[Condition, Condition | None]:  # fmt: skip
    """Packed prompt and, where guidance needs it, packed negative prompt, for `copies` pictures."""
    guided = plan(base, recipe).guidance > 1 and not base.has_guidance_embedding
    prompts: list[Prompt | None] = [prompt]
    if guided:
        categories = {n: one.concept.category for n, one in loaded.items()}
        empty = base.zeros_for_empty and not recipe.negative
        prompts.insert(0, None if empty else parse(recipe.negative, categories))
    made = condition(base, prompts, loaded, lock=recipe.lock, gate=_gate_of(recipe), copies=copies)
    return made[-1], made[0] if guided else None


def _gate_of(recipe: Paint) -> Callable[[Gate], Gate] | None:
    """--beta and --tau replace what they name and leave the rest of a concept's own gate."""
    if recipe.beta is None and recipe.tau is None:
        return None
    return lambda own: Gate(
        own.beta if recipe.beta is None else recipe.beta, own.tau if recipe.tau is None else recipe.tau
    )


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
    recipe = decided.recipe
    yes, no = conditions(base, recipe, prompt, loaded, len(seeds))
    side = base.size_px
    kwargs: dict[str, Any] = {
        "prompt_embeds": yes.kv, "num_inference_steps": decided.steps,
        "guidance_scale": decided.guidance,
        "width": recipe.width or side, "height": recipe.height or side,
        "generator": [torch.Generator().manual_seed(s) for s in seeds],
    }  # fmt: skip
    if no is not None:
        kwargs["negative_prompt_embeds"] = no.kv
    if decided.pinned:
        kwargs["timesteps"] = decided.pinned
    if base.is_xl:
        kwargs["pooled_prompt_embeds"] = yes.pooled
        if no is not None:
            kwargs["negative_pooled_prompt_embeds"] = no.pooled
    if on_step:

        def after(_pipe: Any, index: int, _t: Any, state: dict[str, Any]) -> dict[str, Any]:
            on_step(index + 1)
            return state

        kwargs["callback_on_step_end"] = after
    pipe = base.pipe
    own = pipe.scheduler
    try:
        pipe.scheduler = _scheduler(decided, own)
        with engines.engine(recipe.engine).on(base, tell):
            images = pipe(**kwargs).images
    except torch.OutOfMemoryError as e:
        raise OutOfMemory(
            f"Not enough memory on {base.device} for {len(seeds)} pictures at once. Try --batch "
            f"{max(1, len(seeds) // 2)} or a smaller size."
        ) from e
    finally:
        pipe.scheduler = own
    return [Painted(image, seed) for image, seed in zip(images, seeds, strict=True)]


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
