"""The course of an image: what the U-Net is given at every step.

Two things may change on the way, at no cost per step, because all prompts are packed before the first:

    switch     the plain category goes first and lays out the image, the concept comes in later
               (as Concept Sliders start late; Gandikota et al. 2023, arXiv:2311.12092)
    interval   guidance in some steps only; a step without it costs half
               (Kynkaanniemi et al. 2024, arXiv:2404.07724, in noise levels; here in shares of the steps)

diffusers' pipelines let the callback at the end of a step replace the embeddings of the next, and read
their guidance scale anew in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from minikin.generation import resolve
from minikin.generation.plan import Plan
from minikin.models.base import Base
from minikin.models.prompt import Prompt, parse
from minikin.perfusion.conditioning import Condition, Loaded, condition
from minikin.perfusion.edit import Gate
from minikin.recipes import WHOLE, Paint


@dataclass(frozen=True)
class Course:
    """Packed prompts, and from which step on each of them counts.

    begins    step at which each stage of the prompt begins, rising, the first at 0
    stages    the packed prompt of each, for all images of the batch
    negative  the packed negative prompt; None where there is no guidance at all
    guided    the steps with guidance
    guidance  its scale in them
    """

    begins: tuple[int, ...]
    stages: tuple[Condition, ...]
    negative: Condition | None
    guided: range
    guidance: float

    def start(self, base: Base) -> dict[str, Any]:
        """What a pipeline is called with: the embeddings and guidance of the first step."""
        yes, no = self._given(0)
        given: dict[str, Any] = {"prompt_embeds": yes.kv, "guidance_scale": self._scale(0)}
        if no is not None:
            given["negative_prompt_embeds"] = no.kv
        if base.is_xl:
            given["pooled_prompt_embeds"] = yes.pooled
            given["callback_on_step_end_tensor_inputs"] = ["latents", "add_time_ids"]
            if no is not None:
                given["negative_pooled_prompt_embeds"] = no.pooled
        return given

    def after(self, base: Base, pipe: Any, done: int, state: dict[str, Any]) -> dict[str, Any]:
        """A callback's answer after `done` steps; sets the pipeline's guidance for the next."""
        if done >= pipe.num_timesteps or self._at(done) == self._at(done - 1):
            return state
        yes, no = self._given(done)
        rows = [yes] if no is None else [no, yes]
        pipe._guidance_scale = self._scale(done)  # as diffusers' own guide to callbacks does
        given = {**state, "prompt_embeds": torch.cat([c.kv for c in rows]).to(base.device, base.dtype)}
        if base.is_xl:
            pooled = torch.cat([c.pooled for c in rows if c.pooled is not None])
            given["add_text_embeds"] = pooled.to(base.device, base.dtype)
            given["add_time_ids"] = state["add_time_ids"][:1].expand(len(pooled), -1)  # rows are all equal
        return given

    def _at(self, step: int) -> tuple[int, bool]:
        """Number of the stage, and whether there is guidance."""
        stage = sum(begin <= step for begin in self.begins) - 1
        return stage, self.negative is not None and step in self.guided

    def _given(self, step: int) -> tuple[Condition, Condition | None]:
        stage, guided = self._at(step)
        return self.stages[stage], self.negative if guided else None

    def _scale(self, step: int) -> float:
        """1 switches guidance off; a base without it may still want its scale (full LCM's, as an input)."""
        return self.guidance if self.negative is None or step in self.guided else 1.0


def course(
    base: Base, decided: Plan, prompt: Prompt, loaded: Mapping[str, Loaded], copies: int, total: int,
    skipped: int = 0,
) -> Course:  # fmt: skip
    """The course of `copies` images in `total` steps.

    skipped  steps of a whole image that lie before these, where painting begins below pure noise: shares
             are of a whole image, because what they are about, its layout and its noise, is
    """
    recipe = decided.recipe
    whole = total + skipped
    shares = resolve.shares(recipe, prompt.names)
    late = {n: max(0, nearest(s, whole) - skipped) for n, s in shares.items()}
    begins = tuple(sorted({0, *(k for k in late.values() if k < total)}))
    prompts = [replace(prompt, uses=tuple(u for u in prompt.uses if late[u.name] <= b)) for b in begins]
    stages, negative = conditions(base, decided, prompts, loaded, copies)
    low, high = recipe.interval or WHOLE
    guided = range(max(0, nearest(low, whole) - skipped), max(0, nearest(high, whole) - skipped))
    return Course(begins, stages, negative, guided, decided.guidance)


def conditions(
    base: Base, decided: Plan, prompts: list[Prompt], loaded: Mapping[str, Loaded], copies: int
) -> tuple[tuple[Condition, ...], Condition | None]:
    """Packed prompts and, where guidance needs it, packed negative prompt, for `copies` images."""
    recipe = decided.recipe
    known = recipe.points or {}
    wanted: list[Prompt | None] = [resolve.tuned(p, known) for p in prompts]
    guided = decided.guidance > 1 and not decided.preset.embedded
    if guided:
        categories = {n: one.concept.category for n, one in loaded.items()}
        empty = base.zeros_for_empty and not recipe.negative
        negative = resolve.tuned(parse(recipe.negative, categories), known)
        wanted.insert(0, None if empty else negative)
    softened = resolve.softened(loaded, known)
    made = condition(base, wanted, softened, lock=recipe.lock, gate=_gate_of(recipe), copies=copies)
    return tuple(made[1:] if guided else made), made[0] if guided else None


def nearest(share: float, total: int) -> int:
    """So many of `total` steps are this share of them; a half counts as one."""
    return int(share * total + 0.5)


def _gate_of(recipe: Paint) -> Callable[[Gate], Gate] | None:
    """--beta and --tau replace what they name and leave the rest of a concept's own gate."""
    if recipe.beta is None and recipe.tau is None:
        return None
    return lambda own: Gate(
        own.beta if recipe.beta is None else recipe.beta, own.tau if recipe.tau is None else recipe.tau
    )
