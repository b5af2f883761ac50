"""Distribution matching along the student's own trajectory: TDM, and with one step DMD.

Trajectory distribution matching (Luo et al. 2025, arXiv:2503.06674), in the order of its published code.
The student takes K DDIM steps without gradient. One of them, k, is taken again with gradient, from x_k
at t_k to x_s at t_{k-1}, and fresh noise brings x_s to a time t of the interval (t_{k-1}, t_k]. There the
teacher estimates the score of real images, and a *fake score* network, trained on the student's samples
alone, that of the student's images; the student moves by the difference. Captions are the only data.
With K = 1 this is DMD (Yin et al. 2024, arXiv:2311.18828).

Two options: the weights of the fake score follow those of the student (IDA), and a discriminator with one
linear head on every block of the fake score's encoder (as in DMD2, arXiv:2405.14867), which needs images.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from minikin.distillation.data import ExampleBatch
from minikin.distillation.objective import (
    DistillationContext,
    SamplerSpec,
    detached,
    evaluation_context,
    groups_of,
)
from minikin.distillation.solver import Estimate, distance, guided
from minikin.distillation.student import Network, Texts
from minikin.errors import BadRecipe
from minikin.training.config import StepContext
from minikin.training.networks import TrainableNetworks
from minikin.training.trainer import ParamGroup


class Batch(NamedTuple):
    """The random choices of one whole batch."""

    examples: ExampleBatch
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


class DistributionMatching:
    """The objective of tdm."""

    def __init__(self, s: DistillationContext) -> None:
        self.s, r = s, s.recipe
        if r.fake_ema < 1 and (r.student, r.fake) == ("full", "lora"):
            raise BadRecipe(
                "--fake-ema lets the fake score follow the student, but a LoRA cannot follow every weight. Use "
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
        self.networks = TrainableNetworks(parts)

    def groups(self) -> list[ParamGroup]:
        sides = [self.fake] if self.heads is None else [self.fake, self.heads]
        return groups_of(self.s.recipe, self.student, *sides)

    def draw(self, ctx: StepContext) -> Batch:
        g, n, shape = ctx.generator, ctx.batch_size, (ctx.batch_size, *self.s.data.shape)
        k = len(self.times) - 1
        first = int(torch.randint(k, (1,), generator=g))
        return Batch(
            self.s.data.draw(n, g),
            torch.randn(shape, generator=g),
            (torch.arange(n) + first) % k,
            torch.rand(n, generator=g),
            torch.randn(shape, generator=g),
            torch.randn(shape, generator=g),
        )

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        s, r, rows, device = self.s, self.s.recipe, ctx.rows, self.s.device
        texts = s.encoder(batch.examples.captions[rows])
        step, noise = batch.step[rows], batch.noise[rows].to(device)
        x_k = self.trajectory(batch.start[rows].to(device), step, texts)
        t_k, t_s = self.times[step], self.times[step + 1]
        e = self.student(x_k, t_k, texts)
        t = t_s + 1 + (batch.place[rows] * (t_k - t_s)).long()  # in (t_s, t_k]
        x_t, deviation = s.schedule.noised_from(s.schedule.ddim(e, t_s), t_s, t, noise)
        fixed = x_t.detach()
        with self.fake.watching(self.blocks) as fake_features:
            fake = self.fake(fixed, t, texts)
        target, size = self.target(e.x0, Estimate(*(v.detach() for v in fake)), fixed, t, texts)
        student = (distance(e.x0, target, r.loss, r.huber) / size).mean()
        score = self.denoising(fake, noise, deviation, t).mean()
        losses = {"student": student, "fake": score}
        if self.heads is not None:
            x0 = s.data.x0(batch.examples.rows[rows], device)
            real = s.schedule.noised(x0, batch.real[rows].to(device), t)
            losses |= self._adversarial(x_t, fake_features, real, t, texts)
        weights = {"adversarial": r.gan, "heads": r.heads}
        total = sum((weights.get(k, 1.0) * v for k, v in losses.items()), torch.zeros((), device=device))
        return {"loss": total, **losses}

    # ---- the parts ---------------------------------------------------------------------------

    @torch.no_grad()
    def trajectory(self, x: Tensor, step: Tensor, texts: Texts) -> Tensor:
        """x_k (B, C, h, w): the student's input at each example's step, sampled from the noise x."""
        x = x.clone()
        for i in range(int(step.max())):
            on = (step > i).nonzero()[:, 0].to(x.device)  # the others are at their step already
            now, then = (self.times[j].expand(len(on)) for j in (i, i + 1))
            x[on] = self.s.schedule.ddim(self.student(x[on], now, texts.rows(on)), then)
        return x

    @torch.no_grad()
    def target(self, x0: Tensor, fake: Estimate, x_t: Tensor, t: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
        """Target of the student's x0, and the length (B,) by which its loss is divided.

        target = x0 + (teacher - fake) + (w - 1)(teacher - unconditional); all are x0 at (x_t, t).
        length = mean |x0 - guided teacher|, as in DMD
        """
        s, w = self.s, self.s.recipe.scales[1]
        conditional, unconditional = s.teacher(x_t, t, texts), s.teacher(x_t, t, s.encoder.empty(len(x_t)))
        target = x0 + (conditional.x0 - fake.x0) + (w - 1) * (conditional.x0 - unconditional.x0)
        length = (x0 - guided(conditional, unconditional, w).x0).abs().flatten(1).mean(1)
        return target, length.clamp(min=1e-4)

    def denoising(self, fake: Estimate, noise: Tensor, deviation: Tensor, t: Tensor) -> Tensor:
        """Loss of the fake score (B,): min(SNR, bound) |x0 - x0*|^2 times (d / sigma_t)^2.

        x_t is x_s plus noise of deviation d, so its score is -noise / d, and x0* is the x0 of that
        score. The ratio (d / sigma_t)^2, 1 in the last step, keeps the weight of a sample bounded
        where d is small. Written with eps, where every term is finite at alpha_t = 0:
        min(1, bound / SNR) |(d / sigma_t) eps - noise|^2.
        """
        _, sigma = self.s.schedule.at(t, noise)
        weight = (self.s.recipe.snr / self.s.schedule.snr(t, noise).clamp(min=1e-8)).clamp(max=1)
        return (weight * (deviation / sigma * fake.eps - noise).square()).flatten(1).mean(1)

    def _adversarial(
        self, x_t: Tensor, fake_features: list[Tensor], real: Tensor, t: Tensor, texts: Texts
    ) -> dict[str, Tensor]:
        """Non-saturating GAN losses: "heads" trains heads and fake score, "adversarial" the student."""
        assert self.heads is not None
        with self.fake.watching(self.blocks) as real_features:
            self.fake(real, t, texts)
        discriminator = (
            F.softplus(self.heads(fake_features)).mean() + F.softplus(-self.heads(real_features)).mean()
        )
        with self.fake.watching(self.blocks) as student_features:
            functional_call(self.fake, detached(self.fake), (x_t, t, texts))
        adversarial = F.softplus(-functional_call(self.heads, detached(self.heads), (student_features,))).mean()
        return {"adversarial": adversarial, "heads": discriminator}

    @torch.no_grad()
    def after(self, ctx: StepContext) -> None:
        """EMA of the fake score towards the student: fake <- share fake + (1 - share) student.

        Implicit distribution alignment (IDA) of SenseFlow, ICLR 2026.
        """
        share = self.s.recipe.fake_ema
        if share == 1:
            return
        for fake, student in follow(self.fake, self.student):
            fake.lerp_(student, 1 - share)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        ctx = evaluation_context(self.s.recipe.batch or 16)
        losses = self.loss(ctx, self.draw(ctx))
        return {k: float(losses[k]) for k in ("student", "fake")}

    def sampler_spec(self) -> SamplerSpec:
        return SamplerSpec(self.times[:-1].tolist(), False)


def follow(fake: Network, student: Network) -> list[tuple[Tensor, Tensor]]:
    """Pairs (trained parameter of the fake score, the student's), the student's LoRA merged if need be."""
    trained_parameters = {n: p for n, p in fake.unet.named_parameters() if p.requires_grad}
    student_parameters: dict[str, Tensor] = dict(student.unet.named_parameters())
    if trained_parameters.keys() <= student_parameters.keys():
        return [(p, student_parameters[n]) for n, p in trained_parameters.items()]
    merged: dict[str, Tensor] = {
        n.replace(".base_layer.", "."): p for n, p in student_parameters.items() if ".lora_" not in n
    }
    for name, module in student.unet.named_modules():
        if hasattr(module, "get_delta_weight"):
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + module.get_delta_weight("default")
    return [(p, merged[n].to(p)) for n, p in trained_parameters.items()]
