"""Many prompts painted in batches, as Studio.paint would paint each (equal but for float rounding)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image

from minikin import Studio
from minikin.generation import sampler as painting
from minikin.generation.conditioning_schedule import course
from minikin.models.prompt import parse
from minikin.recipes import Paint

BATCH = 25


@torch.no_grad()
def paint_many(
    studio: Studio, prompts: Sequence[str], seeds: Sequence[int], half: bool = True, **recipe: Any
) -> list[Image.Image]:  # fmt: skip
    """One image for each prompt and seed; `half`: U-Net and decoder in bfloat16 over float32 weights."""
    return [p for part in _parts(studio, list(prompts), list(seeds), half, recipe) for p in part]


def _parts(
    studio: Studio, prompts: list[str], seeds: list[int], half: bool, recipe: dict[str, Any]
) -> Iterator[list[Image.Image]]:  # fmt: skip
    base, pipe = studio.base, studio.base.pipe
    for prompt in dict.fromkeys(prompts):
        studio._need(prompt)
    one: Paint = Paint.make(prompt="", base=base.name, **recipe)
    decided, wanted = studio.prepared(one, parse("", studio.concepts.categories))
    cast = torch.autocast(base.device.type, torch.bfloat16) if half else nullcontext()
    own = pipe.scheduler
    for i in range(0, len(prompts), BATCH):
        with studio.adapters.using(wanted):
            given = [course(base, decided, parse(p, studio.concepts.categories), studio.concepts.loaded, 1,
                            decided.steps).start(base) for p in prompts[i : i + BATCH]]  # fmt: skip
            embeds = [k for k in given[0] if k.endswith("_embeds")]
            more: dict[str, Any] = {k: torch.cat([one[k] for one in given]) for k in embeds}
            if decided.pinned:
                more["timesteps"] = decided.pinned
            try:
                pipe.scheduler = painting._scheduler(decided, own)
                with cast:
                    yield pipe(
                        **more,
                        num_inference_steps=decided.steps, guidance_scale=decided.guidance,
                        width=base.size_px, height=base.size_px,
                        generator=[torch.Generator().manual_seed(s) for s in seeds[i : i + BATCH]],
                    ).images  # fmt: skip
            finally:
                pipe.scheduler = own
