"""What every method of distillation is given, and what the one loop wants of it."""

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
from minikin.distillation.initial_lora import begin, find
from minikin.distillation.sampling import few_steps, many_steps
from minikin.distillation.solver import Schedule
from minikin.distillation.student import Encoder, Kind, Learner, Network, copied, teacher, trained
from minikin.models.base import Base
from minikin.recipes import Distill
from minikin.training.plan import Turn
from minikin.training.run import Group

CHECKPOINTING_FROM = 512  # px


@dataclass(frozen=True)
class Setting:
    """One distillation: the base, its teacher, the settled recipe and the examples."""

    base: Base
    recipe: Distill
    schedule: Schedule
    teacher: Network
    encoder: Encoder
    data: Examples

    @classmethod
    def of(cls, base: Base, recipe: Distill, data: Examples, *, autocast: bool = False) -> Setting:
        schedule = Schedule.of(base)
        return cls(base, recipe, schedule, teacher(base, schedule, autocast=autocast), Encoder(base), data)

    @property
    def device(self) -> torch.device:
        return self.base.device

    def copy(self, kind: Kind, *, guidance: bool = False) -> Network:
        """A network to train that starts as the teacher; copies of one kind start exactly equal."""
        r = self.recipe
        big = self.data.shape[1] * self.base.factor >= CHECKPOINTING_FROM
        return copied(
            self.base, self.schedule, kind, rank=r.rank, alpha=r.alpha, seed=r.seed, guidance=guidance,
            autocast=self.teacher.autocast, checkpointing=big,
        )  # fmt: skip

    def student(self, kind: Kind, *, guidance: bool = False) -> Network:
        """The copy that becomes the result; it starts as the LoRA that the recipe names, if it names one."""
        student = self.copy(kind, guidance=guidance)
        if self.recipe.start:
            begin(student, self.base, find(self.base, self.recipe.start))
        return student


class Way(NamedTuple):
    """How the result paints: its timesteps, the sampler, and the guidance its embedding is given."""

    times: Sequence[int]
    renoise: bool
    scale: float = 1.0


class Objective(Protocol):
    """One method. `loss` returns means over `turn.rows`; its gradients reach each group's parameters
    from that group's own loss alone."""

    student: Network
    learner: Learner

    def groups(self) -> list[Group]: ...
    def draw(self, turn: Turn) -> Any: ...
    def loss(self, turn: Turn, drawn: Any) -> dict[str, Tensor]: ...
    def after(self, turn: Turn) -> None: ...
    def measure(self) -> dict[str, float]: ...
    def way(self) -> Way: ...


MANY, FEW = 32, 8  # captions of the reference: 8 tell two runs apart badly, but 32 are slow to paint large
SMALL = 4096  # numbers in one image's latents


class Reference:
    """How far one step of a student is from where many guided steps of its teacher end.

    The same noise and captions every time, so that it can be followed while training. It falls for
    every method; the losses themselves need not, since their targets move with the student.
    """

    def __init__(self, s: Setting) -> None:
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

    def error(self, student: Network, way: Way) -> float:
        """Mean squared distance of latents."""
        made = few_steps(
            student, self.x, self.texts, way.times[:1], renoise=False, noise=lambda: self.x, scale=way.scale
        )
        return float((made - self.end).square().mean())


def fixed_turn(batch: int) -> Turn:
    """The batch that `measure` looks at, the same at every time."""
    return Turn(0, min(batch, 16), (20_23,))


def groups_of(recipe: Distill, student: nn.Module, *sides: nn.Module) -> list[Group]:
    """The student's group, averaged in the result, and one for what is trained beside it."""
    assert recipe.rate is not None
    assert recipe.side_rate is not None
    out = [Group(trained(student), recipe.rate, recipe.clip)]
    if sides:
        out.append(Group([p for m in sides for p in trained(m)], recipe.side_rate, 1.0, averaged=False))
    return out


def detached(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters as constants, for `torch.func.functional_call`: gradients pass through, none arrive."""
    return {name: p.detach() for name, p in module.named_parameters()}


def frozen_twin(network: Network) -> Network:
    """A copy that is never trained by gradients."""
    return deepcopy(network).requires_grad_(False)
