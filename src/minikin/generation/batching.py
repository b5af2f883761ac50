"""Several people's images in one batch: other prompts, seeds and concepts, the same steps.

Keys and values are a row of their own for every image, so rows of different prompts stand in one batch
like copies of one. Each row is packed by itself, exactly as if it were painted alone, and never sees
another row's concepts; what must agree is what the pipeline has only one of: see `group`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from minikin.generation.conditioning_schedule import Course, course
from minikin.generation.plan import Plan
from minikin.generation.sampler import OnStep, Painted, calls, paint_course
from minikin.models import backends
from minikin.models.base import Base
from minikin.models.lora.adapters import Wanted
from minikin.models.prompt import Prompt
from minikin.perfusion.conditioning import Condition, Loaded


@dataclass(frozen=True)
class Row:
    """One image of a batch: how it is painted, its prompt, its own concepts by name, its seed."""

    plan: Plan
    prompt: Prompt
    loaded: Mapping[str, Loaded]
    seed: int


def group(plan: Plan, prompt: Prompt, wanted: Wanted, concepts: Hashable) -> Hashable:
    """Rows of equal groups may share a batch: size, steps, scheduler, guidance, adapters, engine agree.

    wanted    the LoRAs that are on the base for it, with their weights
    concepts  what tells this row's concepts from others of the same names
    A prompt with regions shares a batch with itself alone: attention is steered for the whole batch.
    """
    r = plan.recipe
    worn = tuple(sorted((a.sha256, w) for a, w in wanted))
    alone = (prompt, concepts, r.beta, r.tau, r.switch, repr(r.points))
    steered = any(use.box for use in prompt.uses)
    return (
        r.width, r.height, plan.preset.name, plan.steps, plan.guidance, r.scheduler, r.interval, r.engine, worn,
        tuple(plan.pinned or ()), alone if steered else None,
    )  # fmt: skip


@torch.no_grad()
def paint_together(
    base: Base, rows: Sequence[Row], *, on_step: OnStep | None = None,
    tell: backends.Tell = backends.log.warning,
) -> list[Painted]:  # fmt: skip
    """Paint rows of one group as one batch; each image equals the one painted alone (rounding apart).

    on_step  hears the steps done and the latents (B, C, h, w); may raise events.Cancelled
    """
    first = rows[0].plan
    total = calls(base, first)
    way = merged([course(base, r.plan, r.prompt, r.loaded, 1, total) for r in rows])
    return paint_course(base, first, way, [r.seed for r in rows], on_step=on_step, tell=tell)


def merged(ways: Sequence[Course]) -> Course:
    """One course for all rows; where one changes its stage, the others go on with theirs."""
    begins = tuple(sorted({b for way in ways for b in way.begins}))
    stages = tuple(
        _stacked([way.stages[sum(own <= b for own in way.begins) - 1] for way in ways]) for b in begins
    )
    negatives = [way.negative for way in ways if way.negative is not None]
    return Course(
        begins, stages, _stacked(negatives) if negatives else None, ways[0].guided, ways[0].guidance
    )  # fmt: skip


def _stacked(parts: Sequence[Condition]) -> Condition:
    """Rows one below the other. Regions are those of the first: `group` lets no others in."""
    pooled = [p.pooled for p in parts if p.pooled is not None]
    return Condition(
        torch.cat([p.kv for p in parts]), torch.cat(pooled) if pooled else None, parts[0].placed
    )  # fmt: skip
