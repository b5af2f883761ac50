"""Adversarial diffusion distillation: ADD on pixels, and its latent form.

Sauer et al. 2023, arXiv:2311.17042; latent: 2024, arXiv:2403.12015. The student removes all noise of a real
image at one of a few timesteps in one call. A discriminator, trainable heads on frozen features,
tells its images from real ones (hinge loss, gradient penalty on what the heads see), and the
teacher, given the student's image noised again, says where it would move it.

    --features teacher   everything in latents, features of the teacher itself (no other weights)
    --features dinov2    ADD proper: decoded pixels, DINOv2, conditioned on prompt and real image
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized

from minikin.distillation.data import Drawn
from minikin.distillation.features import Heads, PixelFeatures, TeacherFeatures, augmented
from minikin.distillation.objective import Setting, Way, detached, fixed_turn, groups_of
from minikin.distillation.solver import guided
from minikin.distillation.student import Learner, Texts
from minikin.training.plan import Turn
from minikin.training.run import Group

T_RANGE = (0.02, 0.98)  # of the teacher's noise levels; beyond, its word on an image says little
NFSD_DOMAIN = 0.2  # below this share of the schedule, the empty prompt alone gives the domain's direction


class Batch(NamedTuple):
    """A whole batch's choices."""

    examples: Drawn
    s: Tensor  # (B,) the student's timestep
    eps: Tensor  # (B, C, h, w)
    t: Tensor  # (B,) the teacher's
    noise: Tensor
    level: Tensor  # (B,) the discriminator's, of latents
    veil: Tensor  # (B, C, h, w) the discriminator's noise, of latents
    changes: Tensor  # (2, B, 7) augmentations of real and made pixels


class Adversarial:
    """The objective of turbo."""

    def __init__(self, s: Setting) -> None:
        self.s, r = s, s.recipe
        self.times = torch.tensor(r.student_times(s.schedule.n_train))
        self.student = s.student(r.student or "full")
        self.negative = s.encoder([r.negative])
        summary = self.negative.summary.shape[1]
        self.features: TeacherFeatures | PixelFeatures
        if r.features == "teacher":
            self.features, more = TeacherFeatures(s.teacher), 2
        else:
            self.features = PixelFeatures(s.base, r.features, s.data.shape[1] * s.base.factor)
            more = self.features.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(r.seed)
            heads = Heads(self.features.channels, summary + more, self.features.dims)
        self.heads = heads.to(s.device)
        self.learner = Learner({"student": self.student, "heads": self.heads}, whole=("heads",))

    def groups(self) -> list[Group]:
        return groups_of(self.s.recipe, self.student, self.heads)

    def draw(self, turn: Turn) -> Batch:
        g, n, shape = turn.generator, turn.size, (turn.size, *self.s.data.shape)
        low, high = (share * self.s.schedule.n_train for share in T_RANGE)
        latents = isinstance(self.features, TeacherFeatures)
        return Batch(
            self.s.data.draw(n, g), self.times[torch.randint(len(self.times), (n,), generator=g)],
            torch.randn(shape, generator=g), (low + (high - low) * torch.rand(n, generator=g)).long(),
            torch.randn(shape, generator=g),
            self.features.times(n, g) if isinstance(self.features, TeacherFeatures) else torch.zeros(n),
            torch.randn(shape, generator=g) if latents else torch.zeros(n, 0),
            torch.zeros(2, n, 0) if latents else torch.rand(2, n, 7, generator=g),
        )  # fmt: skip

    def loss(self, turn: Turn, drawn: Batch) -> dict[str, Tensor]:
        s, r, rows, device = self.s, self.s.recipe, turn.rows, self.s.device
        self.heads.eval()  # spectral norms move once a step, in `after`, not with every piece of a batch
        texts = s.encoder(drawn.examples.captions[rows])
        x0 = s.data.pictures(drawn.examples.rows[rows], device)
        now = drawn.s[rows]
        made = self.student(s.schedule.noised(x0, drawn.eps[rows].to(device), now), now, texts).x0
        real, mine, c = self._seen(x0, made, texts, drawn, rows)
        fooled = -functional_call(self.heads, detached(self.heads), (mine, c)).sum(1).mean()
        judged, penalty = self._judged(real, [f.detach() for f in mine], c)
        losses = {"adversarial": fooled, "heads": judged, "r1": penalty}
        total = fooled + judged + r.r1 * penalty
        if r.distillation:
            losses["distillation"] = self.distillation(
                made, texts, drawn.t[rows], drawn.noise[rows].to(device)
            ).mean()  # fmt: skip
            total = total + r.distillation * losses["distillation"]
        return {"loss": total, **losses}

    # ---- the discriminator -------------------------------------------------------------------

    def _seen(
        self, x0: Tensor, made: Tensor, texts: Texts, drawn: Batch, rows: slice
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Features of the real and the made images, and the heads' condition (B, S)."""
        if isinstance(self.features, TeacherFeatures):
            t, veil = drawn.level[rows], drawn.veil[rows].to(x0)
            with torch.no_grad():
                real = self.features(x0, t, veil, texts)
            c = torch.cat([texts.summary.float(), self.features.level(t).to(x0)], 1)
            return real, self.features(made, t, veil, texts), c
        with torch.no_grad():
            picture = self.features.decoded(x0)
            real = self.features(augmented(picture, drawn.changes[0][rows]))
            c = torch.cat([texts.summary.float(), self.features.whole(picture)], 1)
        return real, self.features(augmented(self.features.decoded(made), drawn.changes[1][rows])), c

    def _judged(self, real: list[Tensor], made: list[Tensor], c: Tensor) -> tuple[Tensor, Tensor]:
        """Hinge loss of the heads, summed over them, and their gradient penalty; means over examples."""
        learning = torch.is_grad_enabled()
        real = [f.detach().requires_grad_(learning) for f in real]
        said = self.heads(real, c)
        hinge = F.relu(1 - said).sum(1).mean() + F.relu(1 + self.heads(made, c)).sum(1).mean()
        return hinge, r1(said, real) if learning else torch.zeros_like(hinge)

    # ---- the teacher -------------------------------------------------------------------------

    def distillation(self, made: Tensor, texts: Texts, t: Tensor, noise: Tensor) -> Tensor:
        """(B,): c(t) |made - sg(teacher's image)|^2, mean over numbers; the teacher sees it noised.

        exponential  c = alpha_t
        sds          c = alpha_t w(t) / (2 sigma_t), w = sigma_t^2: exactly the gradient of SDS
        nfsd         the same with eps_teacher - noise replaced by the noise-free direction
                     (Katzir et al. 2023, arXiv:2310.17590)
        """
        s, r = self.s, self.s.recipe
        alpha, sigma = s.schedule.at(t, made)
        with torch.no_grad():
            x_t = s.schedule.noised(made, noise, t)
            yes, no = s.teacher(x_t, t, texts), s.teacher(x_t, t, s.encoder.empty(len(made)))
            target = guided(yes, no, r.scales[1]).x0
            if r.weighting == "nfsd":
                bad = s.teacher(x_t, t, self.negative.rows(torch.zeros(len(made), dtype=torch.long)))
                low = (t < NFSD_DOMAIN * s.schedule.n_train).to(made.device).view(-1, 1, 1, 1)
                domain = torch.where(low, no.eps, no.eps - bad.eps)
                target = made - sigma / alpha * (r.scales[1] * (yes.eps - no.eps) + domain)
        weight = alpha if r.weighting == "exponential" else alpha * sigma / 2
        if isinstance(self.features, PixelFeatures):  # distances of what is seen
            with torch.no_grad():
                target = self.features.decoded(target)
            made = self.features.decoded(made)
        return (weight * (made - target).square()).flatten(1).mean(1)

    @torch.no_grad()
    def after(self, turn: Turn) -> None:
        """One power iteration of the heads' spectral norms."""
        self.heads.train()
        for module in self.heads.modules():
            if is_parametrized(module):
                _ = module.weight
        self.heads.eval()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        turn = fixed_turn(self.s.recipe.batch or 16)
        found = self.loss(turn, self.draw(turn))
        return {k: float(found[k]) for k in ("adversarial", "heads", "distillation") if k in found}

    def way(self) -> Way:
        return Way(self.times.tolist(), True)


def r1(scores: Tensor, features: list[Tensor]) -> Tensor:
    """Mean over examples of sum_k |grad_{F_k} D_k|^2; scores (B, heads), features that need gradients."""
    gradients = torch.autograd.grad(scores.sum(), features, create_graph=True)
    penalty: Tensor = torch.stack([g.square().flatten(1).sum(1) for g in gradients]).sum(0)
    return penalty.mean()
