"""Flow matching: noise, target and shift, and its samplers, against paths that are known."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from minikin.generation import flow, schedulers
from minikin.models.schedule import FlowMatching, NoiseSchedule, noise_schedule
from tests.helpers.sana import FLOW, TRIG_FLOW

DPM = diffusers.DPMSolverMultistepScheduler(**FLOW)
EULER = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
SCM = diffusers.SCMScheduler(**TRIG_FLOW)
X0, EPS = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("scheduler", "scale"), [(DPM, 1000), (EULER, 1000), (SCM, 1)])
def test_noise_and_target(scheduler: Any, scale: int) -> None:
    """Noise grows along a straight line; at the middle of the schedule its level is that of the shift."""
    schedule = noise_schedule(scheduler.config)
    assert isinstance(schedule, FlowMatching) and schedule.n_train == 1000
    t = schedule.timesteps(torch.tensor([0, 500]))
    shift = 1 if scheduler is SCM else 3
    level = shift * 0.5 / (1 + (shift - 1) * 0.5)
    assert torch.allclose(t, torch.tensor([0, level * scale]))
    x_t, target = schedule.noised(X0, EPS, t), schedule.target(X0, EPS, t)
    assert torch.equal(x_t[0], X0[0]) and torch.allclose(x_t[1], X0[1] + level * target[1], atol=1e-6)


def test_other_schedules_stay() -> None:
    for scheduler in (diffusers.DDIMScheduler(), diffusers.PNDMScheduler(), diffusers.EulerDiscreteScheduler()):
        schedule = noise_schedule(scheduler.config)
        assert type(schedule) is NoiseSchedule and schedule.timesteps(torch.arange(3)).tolist() == [0, 1, 2]


def sampled(scheduler: Any, steps: int, start: Tensor | None = None) -> Tensor:
    """What a denoiser that knows the image ends at, from noise or from other latents."""
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    schedule = noise_schedule(scheduler.config)
    x = EPS * scheduler.init_noise_sigma if start is None else start
    for k, t in enumerate(scheduler.timesteps):
        x_in = scheduler.scale_model_input(x, t)
        level = t / schedule.scale if isinstance(scheduler, flow.TrigFlow) else scheduler.sigmas[k]
        x = scheduler.step((x_in - X0) / level, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("base", [DPM, EULER])
@pytest.mark.parametrize("name", flow.SAMPLERS)
@pytest.mark.parametrize("levels", [None, 600])
def test_samplers_end_at_the_image(base: Any, name: str, levels: int | None) -> None:
    """Each with the base's shift; below pure noise all steps lie below that level."""
    scheduler = schedulers.build(name, base, None, levels)
    scheduler.set_timesteps(4)
    noised = scheduler.add_noise(X0, EPS, scheduler.timesteps[:1].expand(2))
    assert torch.allclose(noised, X0 + float(scheduler.sigmas[0]) * (EPS - X0), atol=1e-5)
    assert torch.allclose(sampled(scheduler, 4), X0, atol=2e-4)
    top = 1.0 if levels is None else 3 * 0.6 / (1 + 2 * 0.6)
    assert abs(float(scheduler.sigmas[0]) - top) < 1e-3 and len(scheduler.timesteps) == 4


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("levels", [None, 600])
def test_sprint_ends_at_the_image(steps: int, levels: int | None) -> None:
    scheduler = schedulers.copy_of(SCM, levels)
    assert torch.allclose(sampled(scheduler, steps), X0, atol=1e-5)
    assert len(scheduler.timesteps) == steps and 0 < float(scheduler.timesteps[-1]) < 1.0001
    t = scheduler.timesteps[:1]
    x_t = scheduler.scale_model_input(scheduler.add_noise(X0, EPS, t.expand(2)), t)
    assert torch.allclose(x_t, X0 + t * (EPS - X0), atol=1e-5)
    if levels:
        assert float(scheduler.angles[0]) == pytest.approx(0.6 * 1.5708, abs=1e-4)
