"""Distribution matching along the student's own trajectory: TDM, and with one step DMD.

Trajectory distribution matching (Luo et al. 2025, arXiv:2503.06674), in the order of its published code.
The student walks K DDIM steps without gradient; one of them, k, is taken again with gradient, from x_k
at t_k to x_s at t_{k-1}, and fresh noise brings x_s to a time t of the interval (t_{k-1}, t_k]. There the
teacher says where images lie and a *fake score*, trained on nothing but the student's own samples, where the
student's lie; the student moves by the difference. Captions are the only data. With K = 1 this is DMD
(Yin et al. 2024, arXiv:2311.18828).

Optional: IDA (the fake score follows the student's weights), and a discriminator with one linear head
on every block of the fake score's encoder (as in DMD2, arXiv:2405.14867), which needs images.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from minikin.distillation.data import Drawn
from minikin.distillation.objective import Setting, Way, detached, fixed_turn, groups_of
from minikin.distillation.solver import Estimate, distance, guided
from minikin.distillation.student import Learner, Network, Texts
from minikin.errors import BadRecipe
from minikin.training.plan import Turn
from minikin.training.run import Group


class Batch(NamedTuple):
    """A whole batch's choices."""

    examples: Drawn
    start: Tensor  # (B, C, h, w) noise the trajectory begins with
    step: Tensor  # (B,) which of the K steps is trained, 0 the first
    place: Tensor  # (B,) in [0, 1): where in the step's interval the scores are compared
    noise: Tensor  # (B, C, h, w) that brings the sample there
    real: Tensor  # (B, C, h, w) noise on real images, for the discriminator


class Linear(nn.Module):
    """One linear score for every position of a feature map (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.score = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(self.norm(x.float()))
        return scores


class Heads(nn.Module):
    """Linear heads on several feature maps; the mean of their scores, (B,)."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Linear(c) for c in channels)

    def forward(self, features: list[Tensor]) -> Tensor:
        scores = [h(f).flatten(1).mean(1) for h, f in zip(self.heads, features, strict=True)]
        return torch.stack(scores).mean(0)


class Matching:
    """The objective of tdm."""

    def __init__(self, s: Setting) -> None:
        self.s, r = s, s.recipe
        if r.ida < 1 and (r.student, r.fake) == ("full", "lora"):
            raise BadRecipe(
                "--ida lets the fake score follow the student, but a LoRA cannot follow every weight. Use "
                "--fake full, or --student lora."
            )
        self.times = torch.tensor([*r.student_times(s.schedule.n_train), -1])  # -1: the clean image
        self.student = s.student(r.student or "lora")
        self.fake = s.copy(r.fake or "lora")
        parts: dict[str, nn.Module] = {"student": self.student, "fake": self.fake}
        self.heads: Heads | None = None
        self.blocks: list[Any] = []  # of the fake score's encoder, that the heads look at
        if r.gan:
            unet: Any = self.fake.unet
            self.blocks = [*unet.down_blocks, unet.mid_block]
            unet.disable_gradient_checkpointing()  # it would compute again without functional_call's weights
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(r.seed)
                self.heads = Heads([int(b.resnets[-1].out_channels) for b in self.blocks]).to(s.device)
            parts["heads"] = self.heads
        self.learner = Learner(parts)

    def groups(self) -> list[Group]:
        sides = [self.fake] if self.heads is None else [self.fake, self.heads]
        return groups_of(self.s.recipe, self.student, *sides)

    def draw(self, turn: Turn) -> Batch:
        g, n, shape = turn.generator, turn.size, (turn.size, *self.s.data.shape)
        k = len(self.times) - 1
        first = int(torch.randint(k, (1,), generator=g))
        return Batch(
            self.s.data.draw(n, g), torch.randn(shape, generator=g), (torch.arange(n) + first) % k,
            torch.rand(n, generator=g), torch.randn(shape, generator=g), torch.randn(shape, generator=g),
        )  # fmt: skip

    def loss(self, turn: Turn, drawn: Batch) -> dict[str, Tensor]:
        s, r, rows, device = self.s, self.s.recipe, turn.rows, self.s.device
        texts = s.encoder(drawn.examples.captions[rows])
        step, noise = drawn.step[rows], drawn.noise[rows].to(device)
        x_k = self.trajectory(drawn.start[rows].to(device), step, texts)
        t_k, t_s = self.times[step], self.times[step + 1]
        e = self.student(x_k, t_k, texts)
        t = t_s + 1 + (drawn.place[rows] * (t_k - t_s)).long()  # in (t_s, t_k]
        x_t, deviation = s.schedule.noised_from(s.schedule.ddim(e, t_s), t_s, t, noise)
        fixed = x_t.detach()
        with self.fake.watching(self.blocks) as own:
            fake = self.fake(fixed, t, texts)
        target, size = self.target(e.x0, Estimate(*(v.detach() for v in fake)), fixed, t, texts)
        student = (distance(e.x0, target, r.loss, r.huber) / size).mean()
        score = self.denoising(fake, noise, deviation, t).mean()
        losses = {"student": student, "fake": score}
        if self.heads is not None:
            x0 = s.data.pictures(drawn.examples.rows[rows], device)
            real = s.schedule.noised(x0, drawn.real[rows].to(device), t)
            losses |= self._adversarial(x_t, own, real, t, texts)
        weights = {"adversarial": r.gan, "heads": r.heads}
        total = sum((weights.get(k, 1.0) * v for k, v in losses.items()), torch.zeros((), device=device))
        return {"loss": total, **losses}

    # ---- the parts ---------------------------------------------------------------------------

    @torch.no_grad()
    def trajectory(self, x: Tensor, step: Tensor, texts: Texts) -> Tensor:
        """x_k: what the student is given at each example's step when it walks there from noise x."""
        x = x.clone()
        for i in range(int(step.max())):
            on = (step > i).nonzero()[:, 0].to(x.device)  # the others have arrived
            now, then = (self.times[j].expand(len(on)) for j in (i, i + 1))
            x[on] = self.s.schedule.ddim(self.student(x[on], now, texts.rows(on)), then)
        return x

    @torch.no_grad()
    def target(self, x0: Tensor, fake: Estimate, x_t: Tensor, t: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
        """Where the student's x0 should be, and the length (B,) its loss is divided by.

        target = x0 + (teacher - fake) + (w - 1)(teacher - unconditional); all are x0 at (x_t, t).
        length = mean |x0 - guided teacher|, as in DMD
        """
        s, w = self.s, self.s.recipe.scales[1]
        yes, no = s.teacher(x_t, t, texts), s.teacher(x_t, t, s.encoder.empty(len(x_t)))
        moved = x0 + (yes.x0 - fake.x0) + (w - 1) * (yes.x0 - no.x0)
        length = (x0 - guided(yes, no, w).x0).abs().flatten(1).mean(1)
        return moved, length.clamp(min=1e-4)

    def denoising(self, fake: Estimate, noise: Tensor, deviation: Tensor, t: Tensor) -> Tensor:
        """(B,) The fake score's loss: min(SNR, bound) |x0 - x0*|^2 times (d / sigma_t)^2.

        x_t was made from x_s by noise of deviation d, so its score is -noise / d, and x0* is what that
        says in terms of x0. The ratio (d / sigma_t)^2, 1 in the last step, keeps the weight of a
        sample bounded where d is small. Written with eps, where all is finite at alpha_t = 0:
        min(1, bound / SNR) |(d / sigma_t) eps - noise|^2.
        """
        _, sigma = self.s.schedule.at(t, noise)
        weight = (self.s.recipe.snr / self.s.schedule.snr(t, noise).clamp(min=1e-8)).clamp(max=1)
        return (weight * (deviation / sigma * fake.eps - noise).square()).flatten(1).mean(1)

    def _adversarial(
        self, x_t: Tensor, own: list[Tensor], real: Tensor, t: Tensor, texts: Texts
    ) -> dict[str, Tensor]:
        """Non-saturating losses; the discriminator's reach heads and fake score, the other the student."""
        assert self.heads is not None
        with self.fake.watching(self.blocks) as of_real:
            self.fake(real, t, texts)
        judged = F.softplus(self.heads(own)).mean() + F.softplus(-self.heads(of_real)).mean()
        with self.fake.watching(self.blocks) as through:
            functional_call(self.fake, detached(self.fake), (x_t, t, texts))
        fooled = F.softplus(-functional_call(self.heads, detached(self.heads), (through,))).mean()
        return {"adversarial": fooled, "heads": judged}

    @torch.no_grad()
    def after(self, turn: Turn) -> None:
        """IDA: fake <- lambda fake + (1 - lambda) student (SenseFlow, ICLR 2026)."""
        keep = self.s.recipe.ida
        if keep == 1:
            return
        for mine, its in follow(self.fake, self.student):
            mine.lerp_(its, 1 - keep)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        turn = fixed_turn(self.s.recipe.batch or 16)
        found = self.loss(turn, self.draw(turn))
        return {k: float(found[k]) for k in ("student", "fake")}

    def way(self) -> Way:
        return Way(self.times[:-1].tolist(), False)


def follow(fake: Network, student: Network) -> list[tuple[Tensor, Tensor]]:
    """Pairs (the fake score's trained parameter, what the student has there); LoRA merged if need be."""
    mine = {n: p for n, p in fake.unet.named_parameters() if p.requires_grad}
    its: dict[str, Tensor] = dict(student.unet.named_parameters())
    if mine.keys() <= its.keys():
        return [(p, its[n]) for n, p in mine.items()]
    merged: dict[str, Tensor] = {n.replace(".base_layer.", "."): p for n, p in its.items() if ".lora_" not in n}
    for name, module in student.unet.named_modules():
        if hasattr(module, "get_delta_weight"):
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + module.get_delta_weight("default")
    return [(p, merged[n].to(p)) for n, p in mine.items()]
