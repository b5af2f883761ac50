"""Formulas of distillation against closed forms, in float64 where precision matters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from minikin.distillation import solver
from minikin.distillation.add import Adversarial, r1
from minikin.distillation.lcm import Consistency
from minikin.distillation.solver import Estimate, Schedule
from minikin.distillation.tdm import DistributionMatching
from minikin.errors import BadRecipe
from minikin.models.base import Base
from minikin.recipes import Distill
from minikin.training.config import StepContext
from tests.helpers.distillings import context

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def schedule(prediction: str = "epsilon", zero_snr: bool = False) -> Schedule:
    scheduler = diffusers.DDPMScheduler(**SD, rescale_betas_zero_snr=zero_snr)
    return Schedule(scheduler.alphas_cumprod, prediction)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class FixedNetwork(nn.Module):
    """Stub network that returns fixed estimates and records its inputs."""

    def __init__(self, *answers: Any) -> None:
        super().__init__()
        self.answers = list(answers)
        self.inputs: list[tuple[Tensor, Tensor]] = []
        self.unet = nn.Module()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, texts: Any, w: Any = None) -> Estimate:
        self.inputs.append((x, t))
        answer: Estimate = self.answers[(len(self.inputs) - 1) % len(self.answers)]
        return Estimate(answer.x0 + 0 * self.weight, answer.eps + 0 * self.weight)

    def watching(self, modules: Any) -> Any:
        from contextlib import nullcontext

        return nullcontext([])


# ---- one step of the solver ------------------------------------------------------------------------


def test_lcm_target_is_the_closed_form(bases: dict[str, Base]) -> None:
    """z + (1 + w) Psi(c) - w Psi(empty) of the LCM paper, to float64's precision, at both ends too."""
    s = context(bases["sd15"], method="lcm-lora", guidance="3-15")
    sd_schedule, n = schedule(), 5
    z, eps_c, eps_u = (noise(n, 4, 8, 8, seed=k) for k in range(3))
    t = torch.tensor([19, 39, 499, 979, 999])
    w = torch.tensor([2.0, 7.5, 14.0, 0.0, 3.0], dtype=torch.float64)
    teacher = FixedNetwork(sd_schedule.estimate(eps_c, z, t), sd_schedule.estimate(eps_u, z, t))
    consistency = Consistency(s)
    consistency.s = replace(s, schedule=sd_schedule, teacher=teacher)  # type: ignore[arg-type]
    x_prev, t_prev = consistency.teacher_step(z, t, s.encoder(["a cat"] * n), w + 1)
    assert t_prev.tolist() == [0, 19, 479, 959, 979]

    def psi(eps: Tensor) -> Tensor:
        (a, sig), (a_n, sig_n) = sd_schedule.at(t, z), sd_schedule.at(t_prev, z)
        return (a_n / a) * z - sig_n * (sig * a_n / (a * sig_n) - 1) * eps - z

    ww = w.view(-1, 1, 1, 1)
    expected = z + (1 + ww) * psi(eps_c) - ww * psi(eps_u)
    assert (x_prev - expected).abs().max() < 1e-11


def test_guided_ddim_step_is_that_of_diffusers() -> None:
    """Guidance of x0 and noise together equals guidance of the prediction, followed by a DDIM step."""
    for prediction in ("epsilon", "v_prediction"):
        ddim = diffusers.DDIMScheduler(
            **SD, prediction_type=prediction, clip_sample=False, timestep_spacing="trailing"
        )
        ddim.alphas_cumprod = ddim.alphas_cumprod.double()
        ddim.set_timesteps(50)
        sd_schedule = Schedule(ddim.alphas_cumprod, prediction)
        z, yes, no = (noise(2, 4, 8, 8, seed=k) for k in range(3))
        t = torch.tensor([499, 499])
        theirs = ddim.step(no + 7.5 * (yes - no), 499, z).prev_sample
        both = solver.guided(sd_schedule.estimate(yes, z, t), sd_schedule.estimate(no, z, t), 7.5)
        assert (sd_schedule.ddim(both, t - 20) - theirs).abs().max() < 1e-11


def test_boundary_condition() -> None:
    """f(x, 0) = x exactly; at other times diffusers' scalings; from t = 19 on c_skip is nearly 0."""
    lcm = diffusers.LCMScheduler(**SD)
    x, other = noise(4, 4, 8, 8), noise(4, 4, 8, 8, seed=1)
    t = torch.tensor([0, 19, 499, 999])
    c_skip, c_out = solver.boundary(t, x)
    for k in range(4):
        theirs = lcm.get_scalings_for_boundary_condition_discrete(t[k].double())
        assert [float(c_skip[k]), float(c_out[k])] == pytest.approx([float(v) for v in theirs], rel=1e-12)
    assert float(c_skip[1]) == pytest.approx(7e-6, rel=0.02)
    assert torch.equal(solver.consistent(Estimate(other, other), x, t)[0], x[0])


def test_both_prediction_types_give_equal_estimates(bases: dict[str, Base]) -> None:
    """x_t = alpha x0 + sigma eps for both, also at alpha = 0, where eps-prediction is refused."""
    x0, eps = noise(3, 4, 8, 8), noise(3, 4, 8, 8, seed=1)
    t = torch.tensor([19, 500, 999])
    v_like = schedule("v_prediction", zero_snr=True)
    alpha, sigma = v_like.at(t, x0)
    assert float(alpha[-1]) == 0
    x_t = v_like.noised(x0, eps, t)
    estimate = v_like.estimate(alpha * eps - sigma * x0, x_t, t)
    assert (estimate.x0 - x0).abs().max() < 1e-12 and (estimate.eps - eps).abs().max() < 1e-12
    sd_schedule = schedule()
    estimate = sd_schedule.estimate(eps, sd_schedule.noised(x0, eps, t), t)
    assert (estimate.x0 - x0).abs().max() < 1e-12
    with pytest.raises(BadRecipe, match="pure noise"):
        schedule("epsilon", zero_snr=True)
    with pytest.raises(BadRecipe, match="predicts 'sample'"):
        schedule("sample")


def test_noise_in_two_parts_equals_noise_at_once() -> None:
    """Mean and variance of x_t from x_s equal those of x_t from x0; also for s = -1, the clean image."""
    sd_schedule = schedule()
    s, t = torch.tensor([-1, 249, 499]), torch.tensor([200, 499, 700])
    x_unit = torch.ones(3, 1, 1, 1, dtype=torch.float64)
    alpha_s, sigma_s = sd_schedule.at(s, x_unit)
    alpha_t, sigma_t = sd_schedule.at(t, x_unit)
    mean, d = sd_schedule.noised_from(alpha_s * x_unit, s, t, 0 * x_unit)
    assert (mean - alpha_t).abs().max() < 1e-12
    assert ((alpha_t / alpha_s * sigma_s).square() + d.square() - sigma_t.square()).abs().max() < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
def test_timesteps_are_those_of_lcm_scheduler(steps: int) -> None:
    lcm = diffusers.LCMScheduler(**SD)
    lcm.set_timesteps(steps)
    assert solver.lcm_times(1000, 20, steps) == lcm.timesteps.tolist()


def test_guidance_embedding_is_that_of_the_pipelines(pipelines: dict[str, Any]) -> None:
    w = torch.tensor([0.0, 6.5, 13.0])
    theirs = pipelines["lcm-sd15"].get_guidance_scale_embedding(w, 256)
    assert torch.equal(solver.guidance_embedding(w, 256), theirs)


# ---- distribution matching -------------------------------------------------------------------------


def matching(
    base: Base, student: FixedNetwork, fake: FixedNetwork, teacher: FixedNetwork, **recipe: Any
) -> DistributionMatching:
    objective = DistributionMatching(context(base, method="tdm", guidance="4.5", **recipe))
    objective.s = replace(objective.s, teacher=teacher)  # type: ignore[arg-type]
    objective.student, objective.fake = student, fake  # type: ignore[assignment]
    return objective


@pytest.mark.parametrize("kind", ["l2", "huber"])
@pytest.mark.parametrize("steps", [1, 4])
def test_student_gradient_is_fake_minus_teacher(bases: dict[str, Base], kind: str, steps: int) -> None:
    """Direction, guidance, length and sign of the step, on an example with known scores."""
    n, shape = 4, (4, 4, 8, 8)
    x0 = nn.Parameter(noise(*shape, dtype=torch.float32))
    yes, no, wrong, eps = (noise(*shape, seed=k, dtype=torch.float32) for k in range(1, 5))
    student, fake = FixedNetwork(Estimate(x0, eps)), FixedNetwork(Estimate(wrong, eps))
    m = matching(
        bases["sd15"],
        student,
        fake,
        FixedNetwork(Estimate(yes, eps), Estimate(no, eps)),
        loss=kind,
        student_steps=steps,
    )
    m.trajectory = lambda x, step, texts: x  # type: ignore[method-assign]
    ctx = StepContext(0, n, (1,))
    losses = m.loss(ctx, m.draw(ctx))
    losses["student"].backward()
    direction = (yes - wrong) + 3.5 * (yes - no)
    length = (x0 - (no + 4.5 * (yes - no))).abs().flatten(1).mean(1).detach()
    slope = 2 * direction if kind == "l2" else direction / (direction.square() + 1e-6).sqrt()
    expected = -slope / (length.view(-1, 1, 1, 1) * n * 4 * 64)
    assert x0.grad is not None
    assert torch.allclose(x0.grad, expected, rtol=1e-4, atol=1e-9)
    assert fake.weight.grad is None  # the student's loss does not move the fake score
    assert (len(m.times), m.times.tolist()[-1]) == (steps + 1, -1)


def test_trajectory_equals_ddim(bases: dict[str, Base]) -> None:
    """x_k of every example equals plain DDIM with the same network up to its step."""
    m = DistributionMatching(context(bases["sd15"], method="tdm"))
    texts = m.s.encoder(["a cat"] * 4)
    x = noise(4, 4, 8, 8, dtype=torch.float32)
    x_k = m.trajectory(x, torch.tensor([0, 1, 2, 3]), texts)
    here = x
    for k, (t, then) in enumerate([(999, 749), (749, 499), (499, 249), (249, -1)]):
        assert torch.allclose(x_k[k], here[k], atol=1e-4), k
        with torch.no_grad():
            e = m.student(here, torch.full((4,), t), texts)
        here = m.s.schedule.ddim(e, torch.full((4,), then))


@pytest.mark.parametrize(("s", "t"), [(-1, 180), (249, 400), (499, 510)])
def test_fake_score_learns_the_score_of_its_samples(bases: dict[str, Base], s: int, t: int) -> None:
    """For Gaussian x_s the score at t is known: the loss has zero slope there and a slope beside it."""
    m = DistributionMatching(context(bases["sd15"], method="tdm"))
    n, mean, spread = 200_000, 0.4, 0.7
    x_s = (mean + spread * noise(n)).view(n, 1, 1, 1)
    eps = noise(n, seed=1).view(n, 1, 1, 1)
    ss, tt = torch.full((n,), s), torch.full((n,), t)
    x_t, d = m.s.schedule.noised_from(x_s, ss, tt, eps)
    ratio = float(m.s.schedule.alpha[t] / m.s.schedule.alpha[s])
    sigma = float(m.s.schedule.sigma[t])
    score = -(x_t - ratio * mean) / (ratio**2 * spread**2 + d.square())
    change = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # of level and slope

    def slopes(at: Tensor) -> Tensor:
        e = Estimate(x_t, at + change[0] + change[1] * x_t)
        (gradient,) = torch.autograd.grad(m.denoising(e, eps, d, tt).mean(), change)
        return gradient

    assert slopes(-sigma * score).abs().max() < 0.2 * slopes(-sigma * score + 0.3).abs().max()


def test_denoising_is_finite_at_pure_noise(bases: dict[str, Base]) -> None:
    m = DistributionMatching(context(bases["sd15"], method="tdm"))
    m.s = replace(m.s, schedule=schedule("v_prediction", zero_snr=True))
    x = noise(2, 4, 8, 8)
    t = torch.tensor([999, 998])
    x_t, d = m.s.schedule.noised_from(x, torch.tensor([749, 749]), t, x)
    assert torch.isfinite(m.denoising(m.s.schedule.estimate(x, x_t, t), x, d, t)).all()


# ---- adversarial -----------------------------------------------------------------------------------


def test_r1_is_the_squared_gradient() -> None:
    """For D = sum a F^2 the penalty is the mean over examples of |2 a F|^2, and it can be differentiated."""
    features = [noise(3, 2, 5).requires_grad_(), noise(3, 4, 2, seed=1).requires_grad_()]
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    scores = torch.stack([(a * f.square()).sum((1, 2)) for f in features], 1)
    penalty = r1(scores, features)
    squares = sum(f.detach().square().sum() for f in features) / 3
    assert float(penalty.detach()) == pytest.approx(4 * 0.49 * float(squares), rel=1e-12)
    (slope,) = torch.autograd.grad(penalty, a)
    assert float(slope) == pytest.approx(8 * 0.7 * float(squares), rel=1e-12)


def teacher_of(
    sd_schedule: Schedule, x0: Tensor, t: Tensor, eps: Tensor, *eps_estimates: Tensor
) -> FixedNetwork:
    x_t = sd_schedule.noised(x0.detach(), eps, t)
    return FixedNetwork(*(sd_schedule.estimate(s, x_t, t) for s in eps_estimates))


@pytest.mark.parametrize("weighting", ["exponential", "sds", "nfsd"])
def test_distillation_gradients(bases: dict[str, Base], weighting: str) -> None:
    """sds: exactly w(t) (eps_teacher - eps'); nfsd: its noise-free direction; exponential: alpha_t."""
    s = context(bases["sd15"], method="turbo", weighting=weighting, guidance="1", student="lora")
    sd_schedule, n = schedule(), 3
    x0 = noise(n, 4, 8, 8).requires_grad_()
    eps, yes, no, bad = (noise(n, 4, 8, 8, seed=k) for k in range(1, 5))
    t = torch.tensor([100, 400, 900])
    a = Adversarial(s)
    a.s = replace(s, schedule=sd_schedule, teacher=teacher_of(sd_schedule, x0, t, eps, yes, no, bad))  # type: ignore[arg-type]
    a.distillation(x0, s.encoder(["a cat"] * n), t, eps).sum().backward()
    alpha, sigma = sd_schedule.at(t, x0)
    near = torch.tensor([1.0, 0, 0]).view(-1, 1, 1, 1)
    direction = {
        "exponential": 2 * alpha * (sigma / alpha) * (yes - eps),
        "sds": sigma.square() * (yes - eps),
        "nfsd": sigma.square() * ((yes - no) + near * no + (1 - near) * (no - bad)),
    }[weighting]
    assert x0.grad is not None
    assert (x0.grad - direction / (4 * 64)).abs().max() < 1e-9


# ---- what a recipe may ask of a student ------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "turbo", "times": "999,749,499", "student_steps": 2}, "lists 3 timesteps"),
        ({"method": "turbo", "times": "demo", "student_steps": 8}, "lists 4 timesteps"),
        ({"method": "tdm", "times": "demo"}, "must be trailing"),
        ({"method": "lcm", "skip": 30}, "kip must divide"),
        ({"method": "lcm", "skip": 500}, "kip must divide"),
    ],
)
def test_timesteps_that_contradict_each_other_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRecipe, match=words):
        Distill.make(data="x", **values)


def test_a_list_sets_the_number_of_steps() -> None:
    listed = Distill.make(method="turbo", data="x", times="999,874,749,624,499,374,249,124")
    assert len(listed.student_times(1000)) == 8
    short = Distill.make(method="turbo", data="x", times="demo", student_steps=2)
    assert short.student_times(1000) == (999, 899)
