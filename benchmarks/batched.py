"""Images of many different prompts in batches, as Studio.paint would generate each (equal but for rounding)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image

from minikin import Studio
from minikin.generation.batching import BatchRow, generate_together
from minikin.recipes import Paint

BATCH = 25


@torch.no_grad()
def generate_batched(
    studio: Studio, prompts: Sequence[str], seeds: Sequence[int], half: bool = True, **recipe: Any
) -> list[Image.Image]:
    """One image for each prompt and seed; `half`: U-Net and decoder in bfloat16 over float32 weights."""
    base = studio.base
    cast = torch.autocast(base.device.type, torch.bfloat16) if half else nullcontext()
    requests = [studio.resolve(Paint.make(prompt=p, base=base.name, **recipe)) for p in prompts]
    rows = [BatchRow(request, seed) for request, seed in zip(requests, seeds, strict=True)]
    images: list[Image.Image] = []
    for i in range(0, len(rows), BATCH):
        with studio.adapters.using(requests[0].adapters), cast:
            images += [generated.image for generated in generate_together(base, rows[i : i + BATCH])]
    return images
