"""Conditioning schedule: packed prompts and guidance of every step.

Three things may change during sampling, at no cost per step, because all prompts are packed before the first:

    prompt editing [cat:dog:0.5] and [cat|dog] (`models.prompt_editing`)
    concept start  the plain category lays out the image, the concept comes in later
                   (as Concept Sliders start late; Gandikota et al. 2023, arXiv:2311.12092)
    interval       classifier-free guidance in some steps only; a step without it costs half
                   (Kynkaanniemi et al. 2024, arXiv:2404.07724, in noise levels; here in shares of the steps)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from minikin.generation.request import ImageRequest
from minikin.generation.start_step import StartStep
from minikin.models.base import Base
from minikin.models.prompt import Prompt
from minikin.models.regions import Region
from minikin.perfusion.conditioning import Conditioning, PreparedConcept, condition
from minikin.perfusion.gate import Gate
from minikin.recipes import WHOLE, Paint


class StepConditioning(NamedTuple):
    """The denoiser's conditioning in one step.

    kv        (B, N, W), or (2B, N, W) with guidance: unconditional rows first
    pooled    SDXL's pooled embeddings of the same rows, else None
    guidance  the scale; None for a step without classifier-free guidance
    mask      of the tokens of the same rows (see `Conditioning`)
    """

    kv: Tensor
    pooled: Tensor | None
    guidance: float | None
    mask: Tensor | None = None


@dataclass(frozen=True)
class ConditioningSchedule:
    """Packed prompts, and from which step on each of them counts.

    starts     step at which each conditioning starts, rising, the first at 0
    positive   the packed prompt from each of these steps, for all images of the batch
    negative   the packed negative prompt from each of these steps; () where no step is guided
    guided     the steps with classifier-free guidance
    guidance   its scale in them
    """

    starts: tuple[int, ...]
    positive: tuple[Conditioning, ...]
    negative: tuple[Conditioning, ...]
    guided: range
    guidance: float

    @property
    def regions(self) -> tuple[Region, ...]:
        """Of the whole prompt: they hold while the category stands in for a concept, too."""
        return self.positive[-1].regions

    def steps(self, base: Base, total: int) -> Iterator[StepConditioning]:
        """The conditioning of each of `total` steps, on the base's device; equal ones are one object."""
        embedded = base.guidance_is_input  # then there is one pass
        before, conditioning = None, None
        for step in range(total):
            stage = self.stage(step)
            guided = bool(self.negative) and step in self.guided and not embedded
            if conditioning is None or (stage, guided) != before:
                before, conditioning = (stage, guided), self._step(base, stage, guided)
            yield conditioning

    def stage(self, step: int) -> int:
        """The number of the prompt that counts in this step."""
        return sum(start <= step for start in self.starts) - 1

    def _step(self, base: Base, stage: int, guided: bool) -> StepConditioning:
        rows = [self.positive[stage]]
        if guided:
            rows.insert(0, self.negative[stage])
        joined = stacked(rows)
        pooled = joined.pooled
        return StepConditioning(
            joined.kv.to(base.device, base.dtype),
            None if pooled is None else pooled.to(base.device, base.dtype),
            self.guidance if guided else None,
            None if joined.mask is None else joined.mask.to(base.device),
        )


def conditioning_schedule(
    base: Base, request: ImageRequest, copies: int, start: StartStep
) -> ConditioningSchedule:
    """The schedule of `copies` images, in calls of the U-Net.

    Shares are of a whole image even where sampling starts below pure noise, because layout and noise, which
    they are about, are.
    """
    recipe, skipped = request.recipe, start.skipped_calls
    total = start.calls
    whole = total + skipped
    names = request.prompt.all_names
    late = {n: max(0, nearest(s, whole) - skipped) for n, s in concept_starts(recipe, names).items()}
    edited = (call - skipped for call, _ in (*request.stages, *request.negative_stages))
    starts = tuple(sorted({0, *(step for step in (*late.values(), *edited) if 0 < step < total)}))
    prompts = [
        replace(p, uses=tuple(use for use in p.uses if late[use.name] <= first))
        for first in starts
        for p in [_in_step(request.stages, first + skipped)]
    ]
    negatives = [_in_step(request.negative_stages, first + skipped) for first in starts]
    positive, negative = conditionings(base, request, prompts, copies, negatives)
    low, high = recipe.interval or WHOLE
    guided = range(max(0, nearest(low, whole) - skipped), max(0, nearest(high, whole) - skipped))
    return ConditioningSchedule(starts, positive, negative, guided, request.guidance)


def _in_step(stages: Sequence[tuple[int, Prompt]], call: int) -> Prompt:
    """The prompt of a call of the U-Net."""
    return next(prompt for first, prompt in reversed(stages) if first <= call)


def conditionings(
    base: Base,
    request: ImageRequest,
    prompts: Sequence[Prompt],
    copies: int,
    negatives: Sequence[Prompt] = (),
) -> tuple[tuple[Conditioning, ...], tuple[Conditioning, ...]]:
    """Packed prompts and, where guidance needs them, packed negative prompts, for `copies` images.

    negatives  one for each prompt; the request's by default. Equal prompts are packed once
    """
    recipe = request.recipe
    guided = request.guidance > 1 and not request.preset.embedded
    zeros = base.zeros_for_empty and not recipe.negative
    before: list[Prompt | None] = [None] if zeros else list(dict.fromkeys(negatives or [request.negative]))
    packed = [*(before if guided else []), *dict.fromkeys(prompts)]
    concepts = _with_point_gates(request.concepts, recipe)
    rows = condition(
        base,
        packed,
        concepts,
        lock=recipe.lock,
        gate=_gate_override(recipe),
        copies=copies,
        chunks=request.chunks,
        clip_skip=recipe.clip_skip,
    )
    n = len(before) if guided else 0
    by_prompt = dict(zip(packed[n:], rows[n:], strict=True))
    by_negative = dict(zip(before, rows[:n], strict=False))
    each_negative = [None if zeros else p for p in negatives or [request.negative] * len(prompts)]
    return tuple(by_prompt[p] for p in prompts), tuple(by_negative[p] for p in each_negative) if guided else ()


def merge_schedules(schedules: Sequence[ConditioningSchedule]) -> ConditioningSchedule:
    """One schedule for images of one batch; where one image changes its prompt, the others keep theirs."""
    starts = tuple(sorted({start for schedule in schedules for start in schedule.starts}))
    positive = tuple(stacked([s.positive[s.stage(start)] for s in schedules]) for start in starts)
    first = schedules[0]
    steps = starts if first.negative else ()
    negative = tuple(stacked([s.negative[s.stage(start)] for s in schedules]) for start in steps)
    return ConditioningSchedule(starts, positive, negative, first.guided, first.guidance)


def stacked(rows: Sequence[Conditioning]) -> Conditioning:
    """Rows one below the other. Regions are the first row's: a batch with regions has equal rows."""
    pooled = [row.pooled for row in rows if row.pooled is not None]
    masks = [row.mask for row in rows if row.mask is not None]
    return Conditioning(
        torch.cat([row.kv for row in rows]),
        torch.cat(pooled) if pooled else None,
        rows[0].regions,
        torch.cat(masks) if masks else None,
    )


def concept_starts(recipe: Paint, names: Sequence[str]) -> dict[str, float]:
    """For each concept the share of the steps in which its category stands in for it."""
    if recipe.concept_start is not None:
        return dict.fromkeys(names, recipe.concept_start)
    points = recipe.points or {}
    return {name: points[name].concept_start if name in points else 0.0 for name in names}


def nearest(share: float, total: int) -> int:
    """The number of steps, of `total`, that is nearest to this share of them; a half counts as one."""
    return int(share * total + 0.5)


def _with_point_gates(concepts: Mapping[str, PreparedConcept], recipe: Paint) -> Mapping[str, PreparedConcept]:
    """The concepts with the gate temperatures of their operating points."""
    changed = dict(concepts)
    for name, point in (recipe.points or {}).items():
        if name in changed and point.tau is not None:
            concept = changed[name].concept
            gate = Gate(concept.gate.beta, point.tau)
            changed[name] = replace(changed[name], concept=replace(concept, gate=gate))
    return changed


def _gate_override(recipe: Paint) -> Callable[[Gate], Gate] | None:
    """--beta and --tau replace one number each; the other stays the concept's."""
    if recipe.beta is None and recipe.tau is None:
        return None
    return lambda gate: Gate(
        gate.beta if recipe.beta is None else recipe.beta, gate.tau if recipe.tau is None else recipe.tau
    )
