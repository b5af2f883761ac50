"""Latent consistency distillation: LCM and LCM-LoRA.

Luo et al. 2023, arXiv:2310.04378 (algorithm 1) and arXiv:2311.05556, in the form of diffusers' training
scripts. The student maps any point of the teacher's guided ODE to its end: from z at
t_{n+k} the teacher takes one guided DDIM step to t_n, and the student's value at both must agree.

    lcm       every weight or a LoRA, a guidance embedding, an averaged target network
    lcm-lora  a LoRA at one guidance scale (or range), the student itself as target
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minikin.distillation.data import Drawn
from minikin.distillation.objective import Setting, Way, fixed_turn, frozen_twin, groups_of
from minikin.distillation.solver import consistent, distance, grid, guided, lcm_times
from minikin.distillation.student import Learner, Network, Texts
from minikin.training.plan import Turn
from minikin.training.run import Group


class Batch(NamedTuple):
    """A whole batch's choices: examples, places n in the solver's grid, noise, guidance scales."""

    examples: Drawn
    n: Tensor  # (B,)
    eps: Tensor  # (B, C, h, w)
    scale: Tensor  # (B,) w + 1


class Consistency:
    """The objective of lcm and lcm-lora."""

    def __init__(self, s: Setting) -> None:
        self.s, r = s, s.recipe
        lcm = r.method == "lcm"
        self.grid = grid(s.schedule.n_train, r.skip)
        self.student = s.student(r.student or "lora", guidance=lcm)
        self.target = frozen_twin(self.student) if lcm else None
        parts: dict[str, torch.nn.Module] = {"student": self.student}
        if self.target:
            parts["target"] = self.target
        self.learner = Learner(parts, whole=("target",))

    def groups(self) -> list[Group]:
        return groups_of(self.s.recipe, self.student)

    def draw(self, turn: Turn) -> Batch:
        g, size = turn.generator, turn.size
        low, high = self.s.recipe.scales
        return Batch(
            self.s.data.draw(size, g), torch.randint(len(self.grid), (size,), generator=g),
            torch.randn((size, *self.s.data.shape), generator=g),
            low + (high - low) * torch.rand(size, generator=g),
        )  # fmt: skip

    def loss(self, turn: Turn, drawn: Batch) -> dict[str, Tensor]:
        s, rows, device = self.s, turn.rows, self.s.device
        texts = s.encoder(drawn.examples.captions[rows])
        x0 = s.data.pictures(drawn.examples.rows[rows], device)
        t = self.grid[drawn.n[rows]]
        eps, scale = drawn.eps[rows].to(device), drawn.scale[rows]
        x_t = s.schedule.noised(x0, eps, t)
        target = self._target(x_t, t, texts, scale)
        f = consistent(self.student(x_t, t, texts, scale - 1), x_t, t)
        return {"loss": distance(f, target, s.recipe.loss, s.recipe.huber).mean()}

    @torch.no_grad()
    def _target(self, x_t: Tensor, t: Tensor, texts: Texts, scale: Tensor) -> Tensor:
        """f_target at the teacher's guided step from (x_t, t)."""
        x_prev, t_prev = self.teacher_step(x_t, t, texts, scale)
        network: Network = self.target or self.student
        return consistent(network(x_prev, t_prev, texts, scale - 1), x_prev, t_prev)

    @torch.no_grad()
    def teacher_step(self, x_t: Tensor, t: Tensor, texts: Texts, scale: Tensor) -> tuple[Tensor, Tensor]:
        """x at t_n and t_n itself: one DDIM step of the guided teacher over `skip` timesteps."""
        s = self.s
        t_prev = (t - s.recipe.skip).clamp(min=0)
        yes = s.teacher(x_t, t, texts)
        no = s.teacher(x_t, t, s.encoder.empty(len(x_t)))
        return s.schedule.ddim(guided(yes, no, scale), t_prev), t_prev

    @torch.no_grad()
    def after(self, turn: Turn) -> None:
        """target <- mu target + (1 - mu) student."""
        if self.target:
            mu = self.s.recipe.target_ema or 0.0
            for mine, its in zip(self.target.parameters(), self.student.parameters(), strict=True):
                mine.lerp_(its, 1 - mu)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        turn = fixed_turn(self.s.recipe.batch or 16)
        return {"consistency": float(self.loss(turn, self.draw(turn))["loss"])}

    def way(self) -> Way:
        r = self.s.recipe
        scale = sum(r.scales) / 2 if self.s.recipe.method == "lcm" else 1.0  # in the LoRA guidance is built in
        return Way(lcm_times(self.s.schedule.n_train, r.skip, 4), True, scale)
