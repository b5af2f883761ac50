"""Samplers and noise schedules: diffusers' own timesteps and noise levels from published configurations."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers import AysSchedules

from minikin import Studio
from minikin.errors import BadRecipe, UnknownName
from minikin.generation import align_your_steps, schedulers
from minikin.generation.batching import batch_key
from minikin.generation.request import resolve
from minikin.images import metadata
from minikin.models.base import Base
from minikin.recipes import Paint
from tests.helpers.published_schedulers import PUBLISHED_SCHEDULERS, published

NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(bool(package), reason=f"{package} is not installed"))
    for name in schedulers.SCHEDULERS
    for package in [schedulers.missing_package(name)]
]
PAIRS = [
    (name, schedule)
    for name, (cls, _) in schedulers.SCHEDULERS.items()
    if not schedulers.missing_package(name)
    for schedule in schedulers.schedules_of(cls)
    if not schedulers.missing_package("", schedule)
]
needs_scipy = pytest.mark.skipif(not find_spec("scipy"), reason="scipy is not installed")


def same_schedule(ours: Any, stock: Any, steps: int) -> None:
    ours.set_timesteps(steps)
    stock.set_timesteps(steps)
    assert torch.equal(torch.as_tensor(ours.timesteps), torch.as_tensor(stock.timesteps))
    assert float(ours.init_noise_sigma) == float(stock.init_noise_sigma)
    if hasattr(stock, "sigmas"):
        assert torch.equal(ours.sigmas, stock.sigmas)


# ---- automatic: what stock does -------------------------------------------------------------------


@pytest.mark.parametrize("base", PUBLISHED_SCHEDULERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_has_the_timesteps_and_noise_levels_of_stock(base: str, name: str) -> None:
    """X.from_config(pipe.scheduler.config): values that the file does not state are X's own defaults."""
    import diffusers

    cls, changes = schedulers.SCHEDULERS[name]
    stock = getattr(diffusers, cls).from_config(published(base).config, **changes)
    ours = schedulers.build(name, published(base))
    for steps in (4, 20, 30):
        same_schedule(ours, stock, steps)


@pytest.mark.parametrize("base", PUBLISHED_SCHEDULERS)
def test_the_default_sampler_of_a_base_is_its_own(base: str) -> None:
    same_schedule(schedulers.copy_of(published(base)), published(base), 20)


@pytest.mark.parametrize("name", ["Euler", "Euler a", "Heun", "DPM++ 2M", "DPM++ 2M SDE", "UniPC", "DEIS"])
def test_sd15_starts_at_pure_noise(name: str) -> None:
    """t = 999 and sigma 14.61 as in A1111 and ComfyUI, not PNDM's t = 951 and sigma 11.03."""
    scheduler = schedulers.build(name, published("sd15"))
    scheduler.set_timesteps(20)
    assert int(scheduler.timesteps[0]) == 999
    if hasattr(scheduler, "sigmas"):
        assert float(scheduler.sigmas[0]) == pytest.approx(14.6146, abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_over_an_image_a_sampler_has_its_own_noise_levels(name: str, tiny: Base) -> None:
    """Heun and others do not know tiny's zero terminal SNR: at strength 0.99 its levels made images black."""
    whole = schedulers.build(name, tiny.pipe.scheduler)
    start = schedulers.build(name, tiny.pipe.scheduler, levels=990)
    assert torch.allclose(start.alphas_cumprod, whole.alphas_cumprod[:990], rtol=1e-4)
    start.set_timesteps(10)
    grid = schedulers.LCM_GRID if schedulers.SCHEDULERS[name][0] in schedulers.LCM_GRID_SCHEDULERS else 1
    assert abs(int(start.timesteps[0]) - 989) <= grid


def test_heun_over_an_image_at_high_strength_is_as_bright_as_euler(tiny: Base) -> None:
    studio = Studio(tiny)
    (image,) = studio.paint("a dog in the snow", seed=3, steps=4)
    how: dict[str, Any] = {"prompt": "a dog in the snow", "steps": 8, "seed": 1, "strength": 0.99}
    euler, heun = (np.asarray(studio.refine(image, scheduler=n, **how)[0]) for n in ("Euler", "Heun"))
    assert abs(float(euler.mean()) - float(heun.mean())) < 20


# ---- noise schedules --------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_schedules_are_diffusers_own_options(base: str) -> None:
    import diffusers

    config = published(base).config
    for name, schedule in PAIRS:
        cls, changes = schedulers.SCHEDULERS[name]
        if schedule == "Align Your Steps" or cls == "EulerAncestralDiscreteScheduler":
            continue
        if cls.startswith("KDPM2") and schedule not in ("Karras", "DDIM"):
            continue  # a third of a second for each
        options = changes | schedulers.SCHEDULES[schedule]
        stock = getattr(diffusers, cls).from_config(config, **options)
        same_schedule(schedulers.build(name, published(base), schedule=schedule), stock, 12)


@needs_scipy
@pytest.mark.parametrize("schedule", ["Karras", "Exponential", "Beta"])
def test_euler_a_takes_the_noise_levels_of_euler(schedule: str) -> None:
    """In A1111 and ComfyUI every schedule goes with it; diffusers' own class has none."""
    euler_a, euler = (schedulers.build(n, published("sd15"), schedule=schedule) for n in ("Euler a", "Euler"))
    euler_a.set_timesteps(12)
    euler.set_timesteps(12)
    assert torch.equal(euler_a.sigmas, euler.sigmas) and torch.equal(euler_a.timesteps, euler.timesteps)
    assert float(euler_a.sigmas[0]) == pytest.approx(14.6146, abs=1e-3)


def test_a_base_with_karras_levels_of_its_own_takes_another_schedule() -> None:
    """diffusers refuses two kinds of noise levels in one configuration."""
    base = type(published("sdxl")).from_config(published("sdxl").config, use_karras_sigmas=True)
    built = schedulers.build("DPM++ 2M", base, schedule="Exponential")
    assert built.config.use_exponential_sigmas and not built.config.use_karras_sigmas
    assert schedulers.build("DPM++ 2M", base).config.use_karras_sigmas


@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_align_your_steps(architecture: str) -> None:
    """diffusers' published list at 10 steps; interpolated between its noise levels at others."""
    alphas = published("sd15").alphas_cumprod
    name = {"sd1": "StableDiffusion", "sdxl": "StableDiffusionXL"}[architecture]
    assert align_your_steps.timesteps(architecture, 10, alphas) == AysSchedules[f"{name}Timesteps"]
    for steps in (1, 4, 20, 200):
        times = align_your_steps.timesteps(architecture, steps, alphas)
        assert times[0] == 999 and all(a > b >= 0 for a, b in pairwise(times))
        assert len(times) == steps or steps > 100
    five = align_your_steps.timesteps(architecture, 5, alphas)
    levels = [float(((1 - alphas[t]) / alphas[t]) ** 0.5) for t in five]
    assert np.allclose(levels, AysSchedules[f"{name}Sigmas"][:-1:2], rtol=0.02)


@pytest.mark.parametrize("levels", [None, 500])
def test_every_pair_steps_down_to_the_clean_image(levels: int | None) -> None:
    """From nothing, and from the noise of strength 0.5: finite numbers, at last the x0 that the model names."""
    for name, schedule in PAIRS:
        if schedulers.SCHEDULERS[name][0].startswith("KDPM2") and schedule not in ("Karras", "Normal"):
            continue  # a third of a second for each
        scheduler = schedulers.build(name, published("sd15"), levels=levels, schedule=schedule)
        if schedule == "Align Your Steps":
            scheduler.set_timesteps(timesteps=[t for t in (499, 343, 124, 24) if t < (levels or 1000)])
        else:
            scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((1, 1, 8, 8), generator=generator) * scheduler.init_noise_sigma
        step = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for t in scheduler.timesteps:
            out = torch.zeros_like(scheduler.scale_model_input(x, t))
            x = scheduler.step(out, t, x, **step).prev_sample
        assert torch.isfinite(x).all(), (name, schedule)


# ---- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "sampler", "schedule"),
    [
        ("DPM++ 2M Karras", "DPM++ 2M", "Karras"), ("k_dpmpp_2m_ka", "DPM++ 2M", "Karras"),
        ("dpmpp_2m_sde_gpu", "DPM++ 2M SDE", None), ("dpmpp_2m_sde_heun_gpu", "DPM++ 2M SDE Heun", None),
        ("DPM++ SDE Karras", "DPM++ SDE", "Karras"), ("dpmpp_sde_k", "DPM++ SDE", "Karras"),
        ("DPM++ 3M SDE Exponential", "DPM++ 3M SDE", "Exponential"), ("dpmpp_3m_sde", "DPM++ 3M SDE", None),
        ("k_dpmpp_2s_a", "DPM++ 2S a", None), ("dpmpp_2s_ancestral", "DPM++ 2S a", None),
        ("dpm_2_ancestral", "DPM2 a", None), ("k_dpm_2", "DPM2", None), ("kdpm_2_a_k", "DPM2 a", "Karras"),
        ("DPM2 a Karras", "DPM2 a", "Karras"), ("LMS Karras", "LMS", "Karras"), ("k_lms", "LMS", None),
        ("euler_ancestral", "Euler a", None), ("k_euler_a", "Euler a", None), ("uni_pc_bh2", "UniPC", None),
        ("plms", "PNDM", None), ("DPMSolverMultistepScheduler", "DPM++ 2M", None),
        ("Euler A Trailing", "Euler a", "SGM Uniform"), ("sa_solver", "SA Solver", None),
    ],
)  # fmt: skip
def test_spellings_of_other_tools(spelling: str, sampler: str, schedule: str | None) -> None:
    assert schedulers.split(spelling) == (sampler, schedule)
    assert schedulers.split(schedulers.scheduler_name(spelling)) == (sampler, schedule)


@pytest.mark.parametrize(
    ("spelling", "schedule"),
    [
        ("Automatic", None), ("automatic", None), ("", None), ("karras", "Karras"),
        ("SGM Uniform", "SGM Uniform"),
        ("sgm_uniform", "SGM Uniform"), ("ddim_uniform", "DDIM"), ("Uniform", "Normal"), ("simple", "Simple"),
        ("align_your_steps", "Align Your Steps"), ("Polyexponential", "Exponential"), ("beta", "Beta"),
    ],
)  # fmt: skip
def test_spellings_of_schedules(spelling: str, schedule: str | None) -> None:
    assert schedulers.schedule_name(spelling) == schedule


@pytest.mark.parametrize(
    "name", ["Restart", "Restart Karras", "dpm_fast", "DPM adaptive", "res_multistep", "er_sde"]
)
def test_samplers_that_diffusers_lacks_are_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(BadRecipe, match=r"is not in diffusers and not offered here\. The nearest is"):
        schedulers.split(name)


def test_unknown_schedules_are_refused() -> None:
    with pytest.raises(BadRecipe, match="KL Optimal"):
        schedulers.schedule_name("kl_optimal")
    with pytest.raises(UnknownName, match="Did you mean 'Karras'"):
        schedulers.schedule_name("Karas")


# ---- in a request -----------------------------------------------------------------------------------


def test_a_schedule_is_recorded_repeated_and_read(bases: dict[str, Base]) -> None:
    """In the record, in the infotext as A1111's "Schedule type", and in what may share a batch."""
    request = resolve(bases["sd15"], Paint(prompt="a cat", steps=4, scheduler="dpm++ 2m karras"))
    assert (request.recipe.scheduler, request.recipe.schedule) == ("DPM++ 2M", "Karras")
    assert request.record["sampler"] == "DPM++ 2M" and request.record["schedule"] == "Karras"
    again = resolve(bases["sd15"], Paint.make(**request.record["recipe"]))
    assert again.recipe.schedule == "Karras" and again.record == request.record and not again.warnings
    assert batch_key(again, ()) != batch_key(
        resolve(bases["sd15"], Paint(prompt="a cat", scheduler="DPM++ 2M", steps=4)), ()
    )
    (image,) = Studio(bases["sd15"]).paint("a cat", steps=4, scheduler="DPM++ 2M", schedule="karras")
    (same,) = Studio(bases["sd15"]).paint("a cat", steps=4, scheduler="DPM++ 2M Karras")
    (plain,) = Studio(bases["sd15"]).paint("a cat", steps=4, scheduler="DPM++ 2M")
    assert np.array_equal(np.asarray(image), np.asarray(same))
    assert not np.array_equal(np.asarray(image), np.asarray(plain))
    from minikin.generation.output import parameters

    record = {**request.record, "seed": 1}
    _, _, settings = metadata.parse_parameters(
        metadata.parameters_text("a cat", "", parameters(record, (64, 64)))
    )
    assert (settings["Sampler"], settings["Schedule type"]) == ("DPM++ 2M", "Karras")
    assert schedulers.schedule_name(settings["Schedule type"]) == "Karras"


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("sd15", {"scheduler": "DDIM", "schedule": "karras"}, "DDIM has no noise schedule Karras"),
        ("lcm-sd15", {"schedule": "karras"}, "Preset lcm paints at the timesteps of its training"),
        ("sd21", {"schedule": "beta"}, "The sampler of this base has no noise schedule Beta"),
        ("tiny", {"schedule": "align-your-steps", "scheduler": "Euler"}, "was measured for Stable"),
    ],
)  # fmt: skip
def test_a_schedule_that_has_no_effect_is_named(
    family: str, options: dict[str, Any], words: str, bases: dict[str, Base], tiny: Base
) -> None:
    request = resolve(bases.get(family, tiny), Paint(prompt="a cat", **options))
    assert any(words in warning for warning in request.warnings)
    assert request.recipe.schedule is None


def test_a_sampler_without_its_package_says_what_to_install(
    bases: dict[str, Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for options in (
        {"scheduler": "LMS"},
        {"scheduler": "DPM++ SDE"},
        {"scheduler": "Euler", "schedule": "beta"},
    ):
        with pytest.raises(BadRecipe, match=r"needs the package \w+, which is not installed here"):
            resolve(bases["sd15"], Paint(prompt="a cat", **options))


# ---- samplers of our own ---------------------------------------------------------------------------


def gaussian_path(name: str, sigma_data: float, steps: int, n: int = 4096) -> torch.Tensor:
    """Samples of a model that knows its data exactly: a normal distribution of mean 2 and this deviation."""
    scheduler = schedulers.build(name, published("sd15"))
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((n, 1, 1, 1), generator=generator) * scheduler.init_noise_sigma
    sigmas = iter(_levels(scheduler))
    for t in scheduler.timesteps:
        sigma = next(sigmas)
        x_in = scheduler.scale_model_input(x, t)
        scaled = x_in * (sigma**2 + 1) ** 0.5
        x0 = (scaled * sigma_data**2 + 2 * sigma**2) / (sigma_data**2 + sigma**2)
        x = scheduler.step((scaled - x0) / sigma, t, x, generator=generator).prev_sample
    return x


def _levels(scheduler: Any) -> list[float]:
    """The noise level of each call of the model, from its timestep."""
    alphas = scheduler.alphas_cumprod.double().numpy()
    log = 0.5 * np.log((1 - alphas) / alphas)
    return [float(np.exp(np.interp(float(t), np.arange(len(log)), log))) for t in scheduler.timesteps]


def test_dpmpp_2s_a_samples_the_distribution_of_an_exact_model() -> None:
    """Second order in the step, and noise that keeps the deviation: nearer than Euler a at equal steps."""
    errors = {}
    for name in ("DPM++ 2S a", "Euler a"):
        x = gaussian_path(name, 0.5, 20)
        errors[name] = abs(float(x.std()) - 0.5) + abs(float(x.mean()) - 2)
    assert errors["DPM++ 2S a"] < 0.05
    assert errors["DPM++ 2S a"] < errors["Euler a"]


@pytest.mark.parametrize("name", ["DPM++ SDE", "DPM++ 2S a", "DPM2 a", "DPM++ 3M SDE", "SA Solver"])
def test_images_with_noise_in_their_steps_depend_on_their_seed_alone(name: str, bases: dict[str, Base]) -> None:
    if schedulers.missing_package(name):
        pytest.skip("torchsde is not installed")
    studio = Studio(bases["sd15"])
    images = studio.paint("a cat", n=2, seed=5, steps=3, scheduler=name)
    (alone,) = studio.paint("a cat", seed=6, steps=3, scheduler=name)
    (again,) = studio.paint("a cat", seed=6, steps=3, scheduler=name)
    assert np.array_equal(np.asarray(alone), np.asarray(again))
    assert np.abs(np.asarray(images[1], int) - np.asarray(alone, int)).max() <= 2
    (single_step,) = studio.paint("a cat", seed=6, steps=1, scheduler=name)
    assert np.isfinite(np.asarray(single_step)).all()
