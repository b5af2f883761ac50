"""Samplers and noise schedules by the names people know: those of A1111, ComfyUI, InvokeAI and diffusers.

A sampler is one of `SCHEDULERS`; a noise schedule ("Schedule type" in A1111) is one of `SCHEDULES`, or None:
automatic, which is what `X.from_config(pipe.scheduler.config)` of diffusers gives. Names of the two in one,
"DPM++ 2M Karras", are split.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import wraps
from typing import Any

from minikin.errors import BadRecipe, UnknownName
from minikin.models.schedule import is_flow
from minikin.recipes import N_TRAIN

# the name shown -> (diffusers class, configuration)
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2M SDE Heun": (
        "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    ),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "DPM++ 3M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "DPM++ 2S a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ SDE": ("DPMSolverSDEScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "SA Solver": ("SASolverScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "DDPM": ("DDPMScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}  # fmt: skip

# the name shown -> configuration, as diffusers' documentation maps A1111's (api/schedulers/overview)
SCHEDULES: dict[str, dict[str, Any]] = {
    "Karras": {"use_karras_sigmas": True},
    "Exponential": {"use_exponential_sigmas": True, "timestep_spacing": "linspace"},
    "Beta": {"use_beta_sigmas": True, "timestep_spacing": "linspace"},
    "SGM Uniform": {"timestep_spacing": "trailing"},
    "Simple": {"timestep_spacing": "trailing"},
    "Normal": {"timestep_spacing": "linspace"},
    "DDIM": {"timestep_spacing": "leading", "steps_offset": 1},
    "Align Your Steps": {},  # timesteps of its own: align_your_steps.py
}

# these step on every 20th timestep, the grid that their students were trained on
LCM_GRID_SCHEDULERS, LCM_GRID = ("LCMScheduler", "TCDScheduler"), 20

_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

_ALIASES = {
    "euler_ancestral": "Euler a", "eulera": "Euler a", "dpm_2": "DPM2", "dpm_2_a": "DPM2 a",
    "dpm_2_ancestral": "DPM2 a", "kdpm_2": "DPM2", "kdpm_2_a": "DPM2 a", "kdpm_2_ancestral": "DPM2 a",
    "dpmpp_2s_ancestral": "DPM++ 2S a", "dpm++": "DPM++ 2M",
    "DPMSolverMultistep": "DPM++ 2M", "DPMSolverSinglestep": "DPM++ 2S", "plms": "PNDM", "uni_pc_bh2": "UniPC",
}  # fmt: skip

# of A1111, Forge and ComfyUI, not of diffusers -> the nearest here
_REFUSED = {
    "Restart": "DPM++ SDE", "DPM fast": "DPM++ 2S", "DPM adaptive": "DPM++ 2M", "HeunPP2": "Heun",
    "IPNDM": "LMS", "IPNDM_V": "LMS", "DDIM CFG++": "DDIM", "Euler CFG++": "Euler", "Euler a CFG++": "Euler a",
    "euler_ancestral_cfg_pp": "Euler a", "dpmpp_2m_cfg_pp": "DPM++ 2M",
    "dpmpp_2s_ancestral_cfg_pp": "DPM++ 2S a",
    "res_multistep": "DPM++ 2M", "res_multistep_cfg_pp": "DPM++ 2M", "res_multistep_ancestral": "DPM++ 2M SDE",
    "res_multistep_ancestral_cfg_pp": "DPM++ 2M SDE", "gradient_estimation": "Euler",
    "gradient_estimation_cfg_pp": "Euler", "er_sde": "DPM++ 3M SDE", "seeds_2": "DPM++ SDE",
    "seeds_3": "DPM++ 3M SDE", "exp_heun_2_x0": "Heun", "exp_heun_2_x0_sde": "DPM++ SDE",
    "sa_solver_pece": "SA Solver", "euler_cfg_pp": "Euler", "Euler Dy": "Euler", "Euler SMEA Dy": "Euler",
    "Euler Negative": "Euler", "Euler Dy Negative": "Euler", "Euler Max": "Euler",
    "Kohaku_LoNyu_Yog": "Euler a", "dpmpp_2m_dy": "DPM++ 2M", "dpmpp_3m_dy": "DPM++ 3M",
}  # fmt: skip
_REFUSED_SCHEDULES = {
    "KL Optimal": "Align Your Steps", "Linear Quadratic": "Simple", "Turbo": "SGM Uniform",
    "Align Your Steps GITS": "Align Your Steps", "Align Your Steps 11": "Align Your Steps",
    "Align Your Steps 32": "Align Your Steps", "GITS": "Align Your Steps", "Bong Tangent": "Beta",
}  # fmt: skip
_SCHEDULE_ALIASES = {
    "Uniform": "Normal",  # evenly spaced timesteps, in A1111
    "Polyexponential": "Exponential",  # the same at A1111's rho of 1
    "ddim_uniform": "DDIM", "ays": "Align Your Steps", "sgm": "SGM Uniform", "trailing": "SGM Uniform",
    "linspace": "Normal", "leading": "DDIM", "karras_sigmas": "Karras",
}  # fmt: skip
_AUTOMATIC = ("", "automatic", "auto", "none", "default", "usedefault", "usesame")
# names that carry their schedule: "DPM++ 2M Karras", k-diffusion's k_dpmpp_2m_ka, InvokeAI's dpmpp_2m_k
_SUFFIXES = {
    "sgmuniform": "SGM Uniform", "karras": "Karras", "exponential": "Exponential",
    "trailing": "SGM Uniform", "ays": "Align Your Steps", "beta": "Beta",
}  # fmt: skip
_SHORT_SUFFIXES = {"_ka": "Karras", "_k": "Karras"}

_EXTRAS = {"LMSDiscreteScheduler": "scipy", "DPMSolverSDEScheduler": "torchsde"}


# ---- names ----------------------------------------------------------------------------------------


def _key(name: str) -> str:
    """A name without case, blanks and the marks that tools add: k_dpmpp_2m_sde_gpu is dpm++2msde."""
    bare = re.sub(r"[\s_\-]+", "", name.strip().lower().removesuffix("scheduler").removesuffix("_gpu"))
    return bare.replace("dpmpp", "dpm++").replace("ancestral", "a") if bare[:3] == "dpm" else bare


_BY_KEY = {
    **{_key(cls): name for name, (cls, extra) in reversed(SCHEDULERS.items()) if not extra},
    **{_key(alias): name for alias, name in _ALIASES.items()},
    **{_key(name): name for name in SCHEDULERS},
    _key("KDPM2AncestralDiscreteScheduler"): "DPM2 a",
}
_REFUSED_BY_KEY = {_key(name): name for name in _REFUSED}
_SCHEDULE_BY_KEY = {
    **{_key(alias): name for alias, name in _SCHEDULE_ALIASES.items()},
    **{_key(name): name for name in SCHEDULES},
}
_REFUSED_SCHEDULE_BY_KEY = {_key(name): name for name in _REFUSED_SCHEDULES}


def _sampler(name: str) -> str | None:
    """The shown name for any spelling of a sampler alone, also with k-diffusion's k_ before it; else None."""
    key = _key(name)
    return _BY_KEY.get(key) or (_BY_KEY.get(_key(key[1:])) if key.startswith("k") else None)


def split(name: str) -> tuple[str, str | None]:
    """Sampler and schedule of a name that may carry both; the schedule is None where it does not.

    Raises UnknownName with the nearest names, and BadRecipe for a sampler that diffusers lacks.
    """
    if sampler := _sampler(name):
        return sampler, None
    key = _key(name)
    for ending, schedule in _SUFFIXES.items():
        if key.endswith(ending) and (sampler := _sampler(key.removesuffix(ending))):
            return sampler, schedule
    for ending, schedule in _SHORT_SUFFIXES.items():
        lower = name.strip().lower()
        if lower.endswith(ending) and (sampler := _sampler(lower.removesuffix(ending))):
            return sampler, schedule
    bare = next((key.removesuffix(e) for e in _SUFFIXES if key.endswith(e)), key)
    if refused := _REFUSED_BY_KEY.get(bare) or _REFUSED_BY_KEY.get(bare.removeprefix("k")):
        raise BadRecipe(
            f"Sampler '{refused}' is not in diffusers and not offered here. The nearest is {_REFUSED[refused]}."
        )
    raise UnknownName("scheduler", name, SCHEDULERS)


def scheduler_name(name: str) -> str:
    """The shown name for any spelling of it, with its schedule; raises UnknownName and BadRecipe as `split`."""
    sampler, schedule = split(name)
    return f"{sampler} {schedule}" if schedule else sampler


def schedule_name(name: str | None) -> str | None:
    """The shown name for any spelling of a noise schedule; None for automatic.

    Raises UnknownName with the nearest names, and BadRecipe for a schedule that diffusers lacks.
    """
    key = _key(name or "")
    if key in _AUTOMATIC:
        return None
    if refused := _REFUSED_SCHEDULE_BY_KEY.get(key):
        raise BadRecipe(
            f"Noise schedule '{refused}' is not in diffusers and not offered here. The nearest is "
            f"{_REFUSED_SCHEDULES[refused]}."
        )
    schedule = _SCHEDULE_BY_KEY.get(key)
    if schedule is None:
        raise UnknownName("noise schedule", str(name), ["Automatic", *SCHEDULES])
    return schedule


# ---- what goes with what --------------------------------------------------------------------------


def schedules_of(cls: str) -> list[str]:
    """The noise schedules of a scheduler of this class of diffusers, by name, besides automatic."""
    return [name for name in SCHEDULES if _supports(cls, name)]


def _supports(cls: str, schedule: str) -> bool:
    import diffusers

    if cls in LCM_GRID_SCHEDULERS:  # their timesteps are those of their students
        return False
    if cls == "EulerAncestralDiscreteScheduler":  # ours takes all that Euler takes
        cls = "EulerDiscreteScheduler"
    kind = getattr(diffusers, cls)
    if schedule == "Align Your Steps":
        return "timesteps" in inspect.signature(kind.set_timesteps).parameters
    options = inspect.signature(kind.__init__).parameters
    changes = SCHEDULES[schedule]
    sigmas = [name for name in changes if name in _SIGMAS]
    return all(name in options for name in sigmas or changes)  # some have sigmas and no spacing


def missing_package(sampler: str, schedule: str | None = None) -> str:
    """The package that a sampler or schedule needs and this installation lacks; else ""."""
    from importlib.util import find_spec

    packages = [_EXTRAS.get(SCHEDULERS[sampler][0], "")] if sampler else []
    packages += ["scipy"] * (schedule == "Beta")
    return next((package for package in packages if package and not find_spec(package)), "")


def order(cls: str) -> int:
    """How often a scheduler of this class of diffusers calls the model in a step."""
    import diffusers

    if cls == "LMSDiscreteScheduler":  # `order` of that class counts derivatives
        return 1
    calls: int = getattr(diffusers, cls).order
    return calls


# ---- building -------------------------------------------------------------------------------------


def copy_of(base_scheduler: Any, levels: int | None = None, schedule: str | None = None) -> Any:
    """A fresh copy of the base's scheduler; see `build` for levels and schedule."""
    from minikin.generation import flow

    return _configured(flow.class_of(type(base_scheduler)), base_scheduler, {}, levels, schedule)


def build(
    name: str,
    base_scheduler: Any,
    overrides: Mapping[str, Any] | None = None,
    levels: int | None = None,
    schedule: str | None = None,
) -> Any:
    """A scheduler with the base's noise schedule and prediction type: diffusers' own `from_config` of it.

    overrides  of its configuration (a preset's timestep spacing)
    levels     number of noise levels, counted from the lowest; all by default
    schedule   noise schedule, one of SCHEDULES; None for automatic
    Values that the base's configuration only has as defaults of its own class count as unset, as in diffusers.
    """
    sampler, in_name = split(name)
    changes = {**SCHEDULERS[sampler][1], **(overrides or {})}
    kind = _class(sampler, class_name(sampler, base_scheduler))
    return _with_begin_index(_configured(kind, base_scheduler, changes, levels, schedule or in_name))


def class_name(sampler: str | None, base_scheduler: Any) -> str:
    """The class of diffusers of a sampler, by its shown name, on a base; None is the base's own."""
    if sampler is None:
        return type(base_scheduler).__name__
    if sampler == "Euler" and is_flow(base_scheduler.config):
        return "FlowMatchEulerDiscreteScheduler"
    return SCHEDULERS[sampler][0]


def _class(sampler: str, cls: str) -> Any:
    """The class of a sampler: diffusers', or ours on top of it."""
    import diffusers

    from minikin.generation import custom_timesteps, flow, k_diffusion

    if sampler == "Euler a":
        return custom_timesteps.EulerAncestralCustomTimesteps
    ours = {
        "DPM2": k_diffusion.DPM2, "DPM2 a": k_diffusion.DPM2Ancestral,
        "DPM++ 2S a": k_diffusion.DPMPP2SAncestral,
    }  # fmt: skip
    if sampler in ours:
        return ours[sampler]
    return k_diffusion.dpmpp_sde() if sampler == "DPM++ SDE" else flow.class_of(getattr(diffusers, cls))


def _configured(
    kind: Any, base_scheduler: Any, changes: dict[str, Any], levels: int | None, schedule: str | None
) -> Any:
    options = inspect.signature(kind.__init__).parameters
    if schedule:
        # a base may state another kind of sigmas, and diffusers refuses two
        values = {**dict.fromkeys(_SIGMAS, False), **SCHEDULES[schedule]}
        changes = changes | {name: value for name, value in values.items() if name in options}
    if is_flow(base_scheduler.config):
        return _of_flow_matching(kind, base_scheduler.config, changes, levels)
    scheduler = kind.from_config(base_scheduler.config, **changes)
    if levels:
        # an unset value of the base's is not taken over, so the copy is made of the whole scheduler's values
        changes = changes | _lowest_levels(scheduler, levels, options)
        scheduler = kind.from_config(base_scheduler.config, **changes)
    if hasattr(scheduler, "sigma_schedule"):
        scheduler.sigma_schedule = {k: v for k, v in SCHEDULES.get(schedule or "", {}).items() if k in _SIGMAS}
    return scheduler


def _of_flow_matching(kind: Any, config: Any, changes: dict[str, Any], levels: int | None) -> Any:
    """A scheduler of flow matching; for those, a number of levels is a share of the schedule."""
    from minikin.generation import flow

    options = inspect.signature(kind.__init__).parameters
    all_changes = {name: value for name, value in flow.changes(config).items() if name in options} | changes
    if kind is flow.TrigFlow:
        all_changes = {}
    scheduler = kind.from_config(config, **all_changes)
    if levels:
        flow.start_below(scheduler, levels / N_TRAIN)
    return scheduler


def _lowest_levels(scheduler: Any, levels: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of a scheduler that has only the lowest `levels` of this one's noise levels.

    Its whole range then lies below timestep `levels`, whatever its spacing, and it starts at the uppermost
    (trailing spacing; Lin et al. 2023, arXiv:2305.08891, table 2). The levels are those that this scheduler has
    itself: not every class knows the zero terminal SNR that its base may have.
    """
    changes = {
        "trained_betas": scheduler.betas[:levels].tolist(), "num_train_timesteps": levels,
        "rescale_betas_zero_snr": False, "timestep_spacing": "trailing",
    }  # fmt: skip
    if "original_inference_steps" in options:
        changes["original_inference_steps"] = levels // LCM_GRID
    return {name: value for name, value in changes.items() if name in options}


def _with_begin_index(scheduler: Any) -> Any:
    """Make the scheduler start with its first timestep.

    Karras spacing rounds the highest noise levels to one timestep; when a step looks up the index of that
    timestep, diffusers takes the second one and runs out of noise levels at the end.
    """
    if not hasattr(scheduler, "set_begin_index"):
        return scheduler
    plain = scheduler.set_timesteps

    @wraps(plain)  # pipelines look at the signature
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        plain(*args, **kwargs)
        scheduler.set_begin_index(0)

    scheduler.set_timesteps = set_timesteps
    return scheduler
