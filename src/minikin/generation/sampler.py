"""Sampling: noise (or an image's noised latents) to images, one denoising step after the other.

`denoise` is one step from latents to latents, and `sample` is the loop around it: conditioning schedule and
guidance interval, regions, tiles, the scheduler's step, the callback, and the paste back of inpainting.

The loop is Minikin's, operation for operation that of diffusers' stock pipelines (Stable Diffusion, XL, latent
consistency models), so that an image without a concept equals theirs to the bit; tests compare the two on every
architecture. The stock loop can do the same only through its callback, which spreads one step over several
places and relies on private attributes of the pipeline.

Each image has its own CPU generator, seeded with its seed, so that it does not depend on its batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minikin.errors import OutOfMemory
from minikin.generation import align_your_steps, schedulers
from minikin.generation.conditioning_schedule import (
    ConditioningSchedule,
    StepConditioning,
    conditioning_schedule,
)
from minikin.generation.decode import decode
from minikin.generation.image import GeneratedImage
from minikin.generation.initial_latents import EVERYTHING, InitialLatents, LatentBatch
from minikin.generation.request import ImageRequest
from minikin.generation.start_step import StartStep, start_step
from minikin.generation.tiling import TiledDiffusion, tiled_autoencoder
from minikin.generation.unet_wrappers import unet_wrappers
from minikin.models import backends
from minikin.models.base import Base
from minikin.models.memory import is_out_of_memory
from minikin.models.regions import Box, Region, in_view, region_bias_of

OnStep = Callable[[int, Tensor], None]


@torch.no_grad()
def generate(
    base: Base,
    request: ImageRequest,
    seeds: Sequence[int] | None = None,
    *,
    initial: InitialLatents | None = None,
    on_step: OnStep | None = None,
    warn: backends.Warn = backends.log.warning,
) -> list[GeneratedImage]:
    """Generate one batch.

    seeds    of its images; all of the request's by default
    initial  latents to start from (`img2img.encode`); None for text-to-image
    on_step  is called with the number of steps done and the latents (B, C, h, w); may raise events.Cancelled
    warn     hears of a backend that failed, and of too little memory to decode at once
    LoRAs are the caller's part: whatever is on the base (`Adapters.using`) takes part.
    Raises BadRecipe, OutOfMemory, NotFinite.
    """
    seeds = request.seeds if seeds is None else tuple(seeds)
    start = start_of(base, request, initial.strength if initial else 1.0)
    schedule = conditioning_schedule(base, request, len(seeds), start)
    return sample(base, request, schedule, seeds, initial=initial, on_step=on_step, warn=warn)


@torch.no_grad()
def sample(
    base: Base,
    request: ImageRequest,
    schedule: ConditioningSchedule,
    seeds: Sequence[int],
    *,
    initial: InitialLatents | None = None,
    on_step: OnStep | None = None,
    warn: backends.Warn = backends.log.warning,
) -> list[GeneratedImage]:
    """Generate one batch along a conditioning schedule; see `generate`."""
    # 1. Where sampling starts, and the scheduler's timesteps from there
    start = start_of(base, request, initial.strength if initial else 1.0)
    scheduler = scheduler_for(base, request, start.levels)
    if start.timesteps:
        scheduler.set_timesteps(timesteps=list(start.timesteps), device=base.device)
    else:
        scheduler.set_timesteps(start.steps, device=base.device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    # 2. Noise and initial latents
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = initial.size if initial else _latent_size(base, request)
    batch = LatentBatch(base, scheduler, generators, size, initial)
    latents = batch.start(start)
    constant = _constant_inputs(base, scheduler, schedule, generators, size)
    # 3. Wrappers of the denoiser
    view = initial.view if initial else EVERYTHING
    tiled = bool(initial and initial.tile)
    regions = _regions(request, schedule, view, several_steps=start.calls > 1 and not tiled)
    tiles = TiledDiffusion(size, initial.tile, regions, len(seeds)) if initial and initial.tile else None
    bias = None if tiles else region_bias_of(regions, len(seeds), size)
    # exported and compiled U-Nets do not know region biases
    backend = backends.get_backend("eager" if regions else request.recipe.backend)
    with (
        out_of_memory_advice(base, len(seeds)),
        unet_wrappers(base, backend, warn, region_bias=bias, tiles=tiles, initial=initial),
    ):
        # 4. The denoising loop
        conditionings = schedule.steps(base, len(scheduler.timesteps))
        for i, (t, conditioning) in enumerate(zip(scheduler.timesteps, conditionings, strict=True)):
            latents = denoise(base, scheduler, latents, t, conditioning, constant)
            if on_step:
                on_step(i + 1, latents)
            latents = batch.paste_back(latents, i + 1)
            if bias:
                bias.after_step((start.skipped_calls + i + 1) / (start.skipped_calls + start.calls))
        # 5. Latents to pixels
        with tiled_autoencoder(base) if initial else nullcontext():
            images = decode(base, latents, warn)
    return [
        GeneratedImage(request.paste_back(image), seed, record=request.record_of(seed, seeds))
        for image, seed in zip(images, seeds, strict=True)
    ]


def _regions(
    request: ImageRequest, schedule: ConditioningSchedule, view: Box, several_steps: bool
) -> list[Region]:
    """The regions to keep concepts in.

    They are found in several steps of a prompt that stays the same, of a whole image without tiles.
    """
    if schedule.regions and schedule.regions[0].box is None:
        whole = view == EVERYTHING and not request.prompt.edits
        return list(schedule.regions) if request.recipe.regions == "auto" and several_steps and whole else []
    return [Region(in_view(box, view), tokens) for box, tokens in schedule.regions if box]


class ConstantInputs(NamedTuple):
    """Inputs of denoiser and scheduler that are the same in all steps.

    guidance_embedding  of bases with guidance as an input (see `Base.guidance_embedding`), else None
    size                (height, width) in pixels
    step                arguments of `scheduler.step`
    """

    guidance_embedding: Tensor | None
    size: tuple[int, int]
    step: dict[str, Any]


def denoise(
    base: Base,
    scheduler: Any,
    latents: Tensor,
    t: Tensor,
    conditioning: StepConditioning,
    constant: ConstantInputs,
) -> Tensor:
    """One denoising step: latents (B, C, h, w) at timestep t to latents at the next timestep.

    The denoiser is called through its wrappers (`unet_wrappers`); with guidance for 2B rows, the first B
    unconditional.
    """
    guidance = conditioning.guidance
    x = latents if guidance is None else torch.cat([latents] * 2)
    x = scheduler.scale_model_input(x, t)
    prediction = base.predict(
        x,
        t,
        conditioning.kv,
        pooled=conditioning.pooled,
        mask=conditioning.mask,
        size=constant.size,
        guidance_embedding=constant.guidance_embedding,
    )
    if guidance is not None:  # classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598)
        unconditional, conditional = prediction.chunk(2)
        prediction = unconditional + guidance * (conditional - unconditional)
    stepped: Tensor = scheduler.step(prediction, t, latents, **constant.step, return_dict=False)[0]
    return stepped


def _constant_inputs(
    base: Base,
    scheduler: Any,
    schedule: ConditioningSchedule,
    generators: list[torch.Generator],
    size: tuple[int, int],
) -> ConstantInputs:
    arguments = inspect.signature(scheduler.step).parameters
    step = {k: v for k, v in {"eta": 0.0, "generator": generators}.items() if k in arguments}
    embedding = base.guidance_embedding(schedule.guidance, len(generators))
    height, width = (n * base.vae_scale_factor for n in size)
    return ConstantInputs(embedding, (height, width), step)


# ---- steps and schedulers -------------------------------------------------------------------------


def scheduler_for(base: Base, request: ImageRequest, levels: int | None = None) -> Any:
    """The request's scheduler, or a fresh copy of the base's; with `levels` noise levels or all."""
    name, preset = request.recipe.scheduler, request.preset
    if name is None:
        return schedulers.copy_of(base.pipe.scheduler, levels, request.recipe.schedule)
    overrides = preset.config if name == preset.scheduler else None
    return schedulers.build(name, base.pipe.scheduler, overrides, levels, request.recipe.schedule)


def start_of(base: Base, request: ImageRequest, strength: float = 1.0) -> StartStep:
    """Where sampling of a request starts at this strength."""
    custom: Sequence[int] | None = request.custom_timesteps
    if request.recipe.schedule == "Align Your Steps":
        custom = align_your_steps.timesteps(base.architecture, request.steps, base.schedule.alphas_cumprod)
    return start_step(request.steps, request.scheduler_class(base), strength, custom)


def _latent_size(base: Base, request: ImageRequest) -> tuple[int, int]:
    """Height and width in latent positions."""
    height, width = request.recipe.height or base.size_px, request.recipe.width or base.size_px
    return height // base.vae_scale_factor, width // base.vae_scale_factor


@contextmanager
def out_of_memory_advice(base: Base, n: int) -> Iterator[None]:
    """Raise OutOfMemory, which says what to do, where n images need more memory than there is."""
    try:
        yield
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        raise OutOfMemory(
            f"Not enough memory on {base.device} for {n} images at once. Try --batch {max(1, n // 2)} or a "
            "smaller size."
        ) from e
