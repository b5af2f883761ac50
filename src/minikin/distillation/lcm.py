"""Latent consistency distillation: LCM and LCM-LoRA.

Luo et al. 2023, arXiv:2310.04378 (algorithm 1) and arXiv:2311.05556, in the form of diffusers' training
scripts. The student maps any point of the teacher's guided ODE to its end: from x_t at t_{n+k} the
teacher takes one guided DDIM step to t_n, and the student's output at both points must agree.

    lcm       every weight or a LoRA, a guidance embedding, an averaged target network
    lcm-lora  a LoRA at one guidance scale (or range), the student itself as target
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minikin.distillation.data import ExampleBatch
from minikin.distillation.objective import (
    DistillationContext,
    SamplerSpec,
    evaluation_context,
    frozen_copy,
    groups_of,
)
from minikin.distillation.solver import consistent, distance, grid, guided, lcm_times
from minikin.distillation.student import Network, Texts
from minikin.training.config import StepContext
from minikin.training.networks import TrainableNetworks
from minikin.training.trainer import ParamGroup


class Batch(NamedTuple):
    """The random choices of one whole batch."""

    examples: ExampleBatch
    n: Tensor  # (B,) index into the solver's timesteps
    eps: Tensor  # (B, C, h, w) noise
    scale: Tensor  # (B,) guidance scale, w + 1


class Consistency:
    """The objective of lcm and lcm-lora."""

    def __init__(self, s: DistillationContext) -> None:
        self.s, r = s, s.recipe
        lcm = r.method == "lcm"
        self.grid = grid(s.schedule.n_train, r.skip)
        self.student = s.student(r.student or "lora", guidance=lcm)
        self.target = frozen_copy(self.student) if lcm else None
        parts: dict[str, torch.nn.Module] = {"student": self.student}
        if self.target:
            parts["target"] = self.target
        self.networks = TrainableNetworks(parts, whole=("target",))

    def groups(self) -> list[ParamGroup]:
        return groups_of(self.s.recipe, self.student)

    def draw(self, ctx: StepContext) -> Batch:
        g, size = ctx.generator, ctx.batch_size
        low, high = self.s.recipe.scales
        return Batch(
            self.s.data.draw(size, g),
            torch.randint(len(self.grid), (size,), generator=g),
            torch.randn((size, *self.s.data.shape), generator=g),
            low + (high - low) * torch.rand(size, generator=g),
        )

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        s, rows, device = self.s, ctx.rows, self.s.device
        texts = s.encoder(batch.examples.captions[rows])
        x0 = s.data.x0(batch.examples.rows[rows], device)
        t = self.grid[batch.n[rows]]
        eps, scale = batch.eps[rows].to(device), batch.scale[rows]
        x_t = s.schedule.noised(x0, eps, t)
        target = self._target(x_t, t, texts, scale)
        f = consistent(self.student(x_t, t, texts, scale - 1), x_t, t)
        return {"loss": distance(f, target, s.recipe.loss, s.recipe.huber).mean()}

    @torch.no_grad()
    def _target(self, x_t: Tensor, t: Tensor, texts: Texts, scale: Tensor) -> Tensor:
        """Consistency function of the target network after the teacher's guided step from (x_t, t)."""
        x_prev, t_prev = self.teacher_step(x_t, t, texts, scale)
        network: Network = self.target or self.student
        return consistent(network(x_prev, t_prev, texts, scale - 1), x_prev, t_prev)

    @torch.no_grad()
    def teacher_step(self, x_t: Tensor, t: Tensor, texts: Texts, scale: Tensor) -> tuple[Tensor, Tensor]:
        """x at t_n, and t_n (B,): one DDIM step of the guided teacher over `skip` timesteps."""
        s = self.s
        t_prev = (t - s.recipe.skip).clamp(min=0)
        conditional = s.teacher(x_t, t, texts)
        unconditional = s.teacher(x_t, t, s.encoder.empty(len(x_t)))
        return s.schedule.ddim(guided(conditional, unconditional, scale), t_prev), t_prev

    @torch.no_grad()
    def after(self, ctx: StepContext) -> None:
        """EMA of the target network: target <- mu target + (1 - mu) student."""
        if self.target:
            mu = self.s.recipe.target_ema or 0.0
            for target, student in zip(self.target.parameters(), self.student.parameters(), strict=True):
                target.lerp_(student, 1 - mu)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        ctx = evaluation_context(self.s.recipe.batch or 16)
        return {"consistency": float(self.loss(ctx, self.draw(ctx))["loss"])}

    def sampler_spec(self) -> SamplerSpec:
        r = self.s.recipe
        scale = sum(r.scales) / 2 if self.s.recipe.method == "lcm" else 1.0  # in the LoRA guidance is built in
        return SamplerSpec(lcm_times(self.s.schedule.n_train, r.skip, 4), True, scale)
