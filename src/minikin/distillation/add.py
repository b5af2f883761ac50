"""Adversarial diffusion distillation: ADD on pixels, and its latent form.

Sauer et al. 2023, arXiv:2311.17042; latent: 2024, arXiv:2403.12015. The student removes all noise of a real
image at one of a few timesteps in one call. A discriminator (trainable heads on frozen features)
tells its images from real ones, with a hinge loss and a gradient penalty on the features. The teacher
denoises the student's image after noise was added again, and the student moves towards the result.

    --features teacher   everything in latents, with features of the teacher itself (no other weights)
    --features dinov2    ADD proper: decoded pixels, DINOv2, conditioned on prompt and real image
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized

from minikin.distillation.data import ExampleBatch
from minikin.distillation.features import Heads, PixelFeatures, TeacherFeatures, augmented
from minikin.distillation.objective import (
    DistillationContext,
    SamplerSpec,
    detached,
    evaluation_context,
    groups_of,
)
from minikin.distillation.solver import guided
from minikin.distillation.student import Texts
from minikin.training.config import StepContext
from minikin.training.networks import TrainableNetworks
from minikin.training.trainer import ParamGroup

T_RANGE = (0.02, 0.98)  # timesteps of the teacher, as shares of the schedule; its estimate is poor at the ends
NFSD_DOMAIN = 0.2  # below this share of the schedule, the empty prompt alone gives the domain's direction


class Batch(NamedTuple):
    """The random choices of one whole batch."""

    examples: ExampleBatch
    s: Tensor  # (B,) the student's timestep
    eps: Tensor  # (B, C, h, w) the student's noise
    t: Tensor  # (B,) the teacher's timestep
    noise: Tensor  # (B, C, h, w) the teacher's noise
    level: Tensor  # (B,) the discriminator's timestep, with --features teacher
    discriminator_noise: Tensor  # (B, C, h, w) noise on its latents, with --features teacher
    changes: Tensor  # (2, B, 7) augmentations of real and generated pixels, with DINOv2


class Adversarial:
    """The objective of turbo."""

    def __init__(self, s: DistillationContext) -> None:
        self.s, r = s, s.recipe
        self.times = torch.tensor(r.student_times(s.schedule.n_train))
        self.student = s.student(r.student or "full")
        self.negative = s.encoder([r.negative])
        summary = self.negative.summary.shape[1]
        self.features: TeacherFeatures | PixelFeatures
        if r.features == "teacher":
            self.features, condition_width = TeacherFeatures(s.teacher), 2
        else:
            self.features = PixelFeatures(s.base, r.features, s.data.shape[1] * s.base.vae_scale_factor)
            condition_width = self.features.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(r.seed)
            heads = Heads(self.features.channels, summary + condition_width, self.features.dims)
        self.heads = heads.to(s.device)
        self.networks = TrainableNetworks({"student": self.student, "heads": self.heads}, whole=("heads",))

    def groups(self) -> list[ParamGroup]:
        return groups_of(self.s.recipe, self.student, self.heads)

    def draw(self, ctx: StepContext) -> Batch:
        g, n, shape = ctx.generator, ctx.batch_size, (ctx.batch_size, *self.s.data.shape)
        low, high = (share * self.s.schedule.n_train for share in T_RANGE)
        latents = isinstance(self.features, TeacherFeatures)
        return Batch(
            self.s.data.draw(n, g),
            self.times[torch.randint(len(self.times), (n,), generator=g)],
            torch.randn(shape, generator=g),
            (low + (high - low) * torch.rand(n, generator=g)).long(),
            torch.randn(shape, generator=g),
            self.features.times(n, g) if isinstance(self.features, TeacherFeatures) else torch.zeros(n),
            torch.randn(shape, generator=g) if latents else torch.zeros(n, 0),
            torch.zeros(2, n, 0) if latents else torch.rand(2, n, 7, generator=g),
        )

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        s, r, rows, device = self.s, self.s.recipe, ctx.rows, self.s.device
        self.heads.eval()  # spectral norms move once a step, in `after`, not with every part of a batch
        texts = s.encoder(batch.examples.captions[rows])
        x0 = s.data.x0(batch.examples.rows[rows], device)
        t = batch.s[rows]
        generated = self.student(s.schedule.noised(x0, batch.eps[rows].to(device), t), t, texts).x0
        real_features, fake_features, c = self._features(x0, generated, texts, batch, rows)
        adversarial = -functional_call(self.heads, detached(self.heads), (fake_features, c)).sum(1).mean()
        discriminator, penalty = self._discriminator_loss(real_features, [f.detach() for f in fake_features], c)
        losses = {"adversarial": adversarial, "heads": discriminator, "r1": penalty}
        total = adversarial + discriminator + r.r1 * penalty
        if r.distillation:
            losses["distillation"] = self.distillation(
                generated, texts, batch.t[rows], batch.noise[rows].to(device)
            ).mean()
            total = total + r.distillation * losses["distillation"]
        return {"loss": total, **losses}

    # ---- the discriminator -------------------------------------------------------------------

    def _features(
        self, x0: Tensor, generated: Tensor, texts: Texts, batch: Batch, rows: slice
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Features of real (x0) and generated images, and the heads' condition (B, S)."""
        if isinstance(self.features, TeacherFeatures):
            t, discriminator_noise = batch.level[rows], batch.discriminator_noise[rows].to(x0)
            with torch.no_grad():
                real_features = self.features(x0, t, discriminator_noise, texts)
            c = torch.cat([texts.summary.float(), self.features.level(t).to(x0)], 1)
            return real_features, self.features(generated, t, discriminator_noise, texts), c
        with torch.no_grad():
            image = self.features.decoded(x0)
            real_features = self.features(augmented(image, batch.changes[0][rows]))
            c = torch.cat([texts.summary.float(), self.features.whole(image)], 1)
        return (
            real_features,
            self.features(augmented(self.features.decoded(generated), batch.changes[1][rows])),
            c,
        )

    def _discriminator_loss(
        self, real_features: list[Tensor], fake_features: list[Tensor], c: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hinge loss, summed over the heads, and gradient penalty; both are means over the examples."""
        training = torch.is_grad_enabled()
        real_features = [f.detach().requires_grad_(training) for f in real_features]
        scores = self.heads(real_features, c)
        hinge = F.relu(1 - scores).sum(1).mean() + F.relu(1 + self.heads(fake_features, c)).sum(1).mean()
        return hinge, r1(scores, real_features) if training else torch.zeros_like(hinge)

    # ---- the teacher -------------------------------------------------------------------------

    def distillation(self, x0: Tensor, texts: Texts, t: Tensor, noise: Tensor) -> Tensor:
        """Distillation loss (B,): c(t) |x0 - sg(teacher's x0)|^2, where the teacher denoises x0 + noise.

        exponential  c = alpha_t
        sds          c = alpha_t w(t) / (2 sigma_t), w = sigma_t^2: exactly the gradient of SDS
        nfsd         the same with eps_teacher - noise replaced by the noise-free direction
                     (Katzir et al. 2023, arXiv:2310.17590)
        """
        s, r = self.s, self.s.recipe
        alpha, sigma = s.schedule.at(t, x0)
        with torch.no_grad():
            x_t = s.schedule.noised(x0, noise, t)
            conditional, unconditional = s.teacher(x_t, t, texts), s.teacher(x_t, t, s.encoder.empty(len(x0)))
            target = guided(conditional, unconditional, r.scales[1]).x0
            if r.weighting == "nfsd":
                negative = s.teacher(x_t, t, self.negative.rows(torch.zeros(len(x0), dtype=torch.long)))
                is_low_noise = (t < NFSD_DOMAIN * s.schedule.n_train).to(x0.device).view(-1, 1, 1, 1)
                domain = torch.where(is_low_noise, unconditional.eps, unconditional.eps - negative.eps)
                target = x0 - sigma / alpha * (r.scales[1] * (conditional.eps - unconditional.eps) + domain)
        weight = alpha if r.weighting == "exponential" else alpha * sigma / 2
        if isinstance(self.features, PixelFeatures):  # distances of what is seen
            with torch.no_grad():
                target = self.features.decoded(target)
            x0 = self.features.decoded(x0)
        return (weight * (x0 - target).square()).flatten(1).mean(1)

    @torch.no_grad()
    def after(self, ctx: StepContext) -> None:
        """One power iteration of the heads' spectral norms."""
        self.heads.train()
        for module in self.heads.modules():
            if is_parametrized(module):
                _ = module.weight
        self.heads.eval()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        ctx = evaluation_context(self.s.recipe.batch or 16)
        losses = self.loss(ctx, self.draw(ctx))
        return {k: float(losses[k]) for k in ("adversarial", "heads", "distillation") if k in losses}

    def sampler_spec(self) -> SamplerSpec:
        return SamplerSpec(self.times.tolist(), True)


def r1(scores: Tensor, features: list[Tensor]) -> Tensor:
    """Mean over examples of sum_k |grad_{F_k} D_k|^2; scores (B, heads), features that need gradients."""
    gradients = torch.autograd.grad(scores.sum(), features, create_graph=True)
    penalty: Tensor = torch.stack([g.square().flatten(1).sum(1) for g in gradients]).sum(0)
    return penalty.mean()
