"""Interface between a method of distillation and the training loop: context, objective, sampler spec."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from minikin.distillation.data import Examples, painting_scale
from minikin.distillation.initial_lora import apply, find
from minikin.distillation.sampling import few_steps, many_steps
from minikin.distillation.solver import Schedule
from minikin.distillation.student import Encoder, Kind, Network, copied, teacher
from minikin.models.base import Base
from minikin.recipes import Distill
from minikin.training.config import StepContext
from minikin.training.networks import TrainableNetworks, trainable_parameters
from minikin.training.trainer import ParamGroup

CHECKPOINTING_FROM = 512  # px


@dataclass(frozen=True)
class DistillationContext:
    """What a method works on: base, resolved recipe, noise schedule, teacher, caption encoder, examples."""

    base: Base
    recipe: Distill
    schedule: Schedule
    teacher: Network
    encoder: Encoder
    data: Examples

    @classmethod
    def of(cls, base: Base, recipe: Distill, data: Examples, *, autocast: bool = False) -> DistillationContext:
        schedule = Schedule.of(base)
        return cls(base, recipe, schedule, teacher(base, schedule, autocast=autocast), Encoder(base), data)

    @property
    def device(self) -> torch.device:
        return self.base.device

    def copy(self, kind: Kind, *, guidance: bool = False) -> Network:
        """A trainable network that starts equal to the teacher; copies of one kind start equal to the bit."""
        r = self.recipe
        big = self.data.shape[1] * self.base.vae_scale_factor >= CHECKPOINTING_FROM
        return copied(
            self.base,
            self.schedule,
            kind,
            rank=r.rank,
            alpha=r.alpha,
            seed=r.seed,
            guidance=guidance,
            autocast=self.teacher.autocast,
            checkpointing=big,
        )

    def student(self, kind: Kind, *, guidance: bool = False) -> Network:
        """The student; it starts from the recipe's initial LoRA, or from the teacher without one."""
        student = self.copy(kind, guidance=guidance)
        if self.recipe.start:
            apply(student, self.base, find(self.base, self.recipe.start))
        return student


class SamplerSpec(NamedTuple):
    """How images are sampled with a student.

    times    timesteps, falling
    renoise  True: LCM sampler (fresh noise after every step); False: DDIM
    scale    guidance scale for the guidance embedding; 1 without one
    """

    times: Sequence[int]
    renoise: bool
    scale: float = 1.0


class Objective(Protocol):
    """One method of distillation, as the training loop calls it.

    groups        parameter groups with their learning rates
    draw          the random choices of one batch
    loss          {"loss": total, ...}, means over the examples `ctx.rows`; each parameter group gets
                  gradients from its own term of the total alone
    after         called after every optimizer step (EMA of other networks)
    measure       evaluation metrics by name, on the same batch every time
    sampler_spec  how images are sampled with the student
    """

    student: Network
    networks: TrainableNetworks

    def groups(self) -> list[ParamGroup]: ...
    def draw(self, ctx: StepContext) -> Any: ...
    def loss(self, ctx: StepContext, batch: Any) -> dict[str, Tensor]: ...
    def after(self, ctx: StepContext) -> None: ...
    def measure(self) -> dict[str, float]: ...
    def sampler_spec(self) -> SamplerSpec: ...


MANY, FEW = 32, 8  # captions of the reference: more compare two runs better, but are slow at large sizes
SMALL = 4096  # latent values of one image, up to which MANY are used


class Reference:
    """Evaluation metric: distance of one step of the student from many guided steps of the teacher.

    Noise and captions are the same every time, so the metric can be followed while training. It falls
    for every method; the losses need not fall, since their targets move with the student.
    """

    def __init__(self, s: DistillationContext) -> None:
        self.s = s
        n = min(MANY if math.prod(s.data.shape) <= SMALL else FEW, len(s.data))
        self.texts = s.encoder([s.data.captions[i * len(s.data) // n][0] for i in range(n)])
        g = torch.Generator().manual_seed(20_23)
        self.x = torch.randn((n, *s.data.shape), generator=g).to(s.device)

    @cached_property
    def end(self) -> Tensor:
        """The teacher's latents (n, C, h, w)."""
        r, empty = self.s.recipe, self.s.encoder.empty(len(self.x))
        return many_steps(self.s.teacher, self.x, self.texts, empty, r.teacher_steps, painting_scale(r))

    def error(self, student: Network, spec: SamplerSpec) -> float:
        """Mean squared error of the student's latents after one step."""
        latents = few_steps(
            student, self.x, self.texts, spec.times[:1], renoise=False, noise=lambda: self.x, scale=spec.scale
        )
        return float((latents - self.end).square().mean())


def evaluation_context(batch: int) -> StepContext:
    """The step whose batch `measure` evaluates, the same every time."""
    return StepContext(0, min(batch, 16), (20_23,))


def groups_of(recipe: Distill, student: nn.Module, *auxiliary: nn.Module) -> list[ParamGroup]:
    """Parameter groups: the student, whose EMA is the result, and the auxiliary networks."""
    assert recipe.lr is not None
    assert recipe.aux_lr is not None
    groups = [ParamGroup(trainable_parameters(student), recipe.lr, recipe.clip)]
    if auxiliary:
        parameters = [p for network in auxiliary for p in trainable_parameters(network)]
        groups.append(ParamGroup(parameters, recipe.aux_lr, 1.0, ema=False))
    return groups


def detached(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters as constants, for `torch.func.functional_call`: gradients reach its inputs only."""
    return {name: p.detach() for name, p in module.named_parameters()}


def frozen_copy(network: Network) -> Network:
    """A copy whose parameters need no gradients."""
    return deepcopy(network).requires_grad_(False)
