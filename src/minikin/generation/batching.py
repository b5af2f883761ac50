"""Images of several requests in one batch: other prompts, seeds and concepts, the same steps.

Keys and values are one row for each image, so rows of different prompts stand in one batch like copies of one.
Each row is packed by itself, exactly as if it were alone, and never sees another row's concepts. `batch_key`
says what requests must have in common.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from minikin.generation.conditioning_schedule import conditioning_schedule, merge_schedules
from minikin.generation.image import GeneratedImage
from minikin.generation.request import ImageRequest
from minikin.generation.sampler import OnStep, sample, start_of
from minikin.models import backends
from minikin.models.base import Base


@dataclass(frozen=True)
class BatchRow:
    """One image of a batch: its request and its seed."""

    request: ImageRequest
    seed: int


def batch_key(request: ImageRequest, concepts: Hashable) -> Hashable:
    """Rows of equal keys may share a batch: size, steps, scheduler, guidance, LoRAs and backend agree.

    concepts  identifies the content of the request's concepts
    A prompt with regions, written or found, shares a batch with itself alone: all rows have its tokens.
    """
    r = request.recipe
    adapters = tuple(sorted((adapter.sha256, weight) for adapter, weight in request.adapters))
    identity = (
        request.prompt,
        concepts,
        r.beta,
        r.tau,
        r.concept_start,
        repr(r.points),
        r.regions,
        r.clip_skip,
    )
    has_regions = any(use.box for use in request.prompt.uses) or len(request.prompt.names) > 1
    return (
        r.width, r.height, request.preset.name, request.steps, request.guidance, r.scheduler, r.schedule,
        r.interval, r.backend, adapters, tuple(request.custom_timesteps or ()),
        identity if has_regions else None, request.chunks,
    )  # fmt: skip


@torch.no_grad()
def generate_together(
    base: Base,
    rows: Sequence[BatchRow],
    *,
    on_step: OnStep | None = None,
    warn: backends.Warn = backends.log.warning,
) -> list[GeneratedImage]:
    """Generate rows of one batch key as one batch; each image equals the one generated alone, rounding apart.

    on_step  is called with the number of steps done and the latents (B, C, h, w); may raise events.Cancelled
    """
    first = rows[0].request
    start = start_of(base, first)
    schedule = merge_schedules([conditioning_schedule(base, row.request, 1, start) for row in rows])
    images = sample(base, first, schedule, [row.seed for row in rows], on_step=on_step, warn=warn)
    return [
        GeneratedImage(image.image, image.seed, record=row.request.record_of(row.seed, [row.seed]))
        for image, row in zip(images, rows, strict=True)
    ]
