"""Schedulers by the names people know: A1111's, ComfyUI's, and diffusers' class names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import wraps
from typing import Any

from minikin.errors import UnknownName

# the name shown -> (diffusers class, configuration)
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "DPM++ 2M Karras": (
        "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2M SDE Karras": (
        "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "DDPM": ("DDPMScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}  # fmt: skip

# these step on every 20th timestep, the grid that their students were trained on
LCM_GRID_SCHEDULERS, LCM_GRID = ("LCMScheduler", "TCDScheduler"), 20

_ALIASES = {
    "k_euler": "Euler", "euler_ancestral": "Euler a", "k_euler_a": "Euler a", "eulera": "Euler a",
    "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_karras": "DPM++ 2M Karras", "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2m_sde_karras": "DPM++ 2M SDE Karras", "dpmpp_2s": "DPM++ 2S",
    "plms": "PNDM", "uni_pc": "UniPC", "dpm++": "DPM++ 2M",
}  # fmt: skip


def _key(name: str) -> str:
    return re.sub(r"[\s_\-]+", "", name.lower().removesuffix("scheduler"))


_BY_KEY = {
    **{_key(name): name for name in SCHEDULERS},
    **{_key(alias): name for alias, name in _ALIASES.items()},
    **{_key(cls): name for name, (cls, extra) in reversed(SCHEDULERS.items()) if not extra},
}


def scheduler_name(name: str) -> str:
    """The shown name for any spelling of it; raises UnknownName with the nearest ones."""
    canonical = _BY_KEY.get(_key(name))
    if canonical is None:
        raise UnknownName("scheduler", name, SCHEDULERS)
    return canonical


def copy_of(base_scheduler: Any, levels: int | None = None) -> Any:
    """A fresh copy of the base's scheduler; see `build` for levels."""
    cls = type(base_scheduler)
    if not levels:
        return cls.from_config(base_scheduler.config)
    config = {k: v for k, v in base_scheduler.config.items() if not k.startswith("_")}
    return cls.from_config(config | _first_levels(base_scheduler, levels, cls.__name__))


def _first_levels(base_scheduler: Any, levels: int, cls: str) -> dict[str, Any]:
    """Configuration of a scheduler that has only the lowest `levels` of the base's noise levels.

    Its whole range then lies below timestep `levels`, whatever its spacing, and it starts at the uppermost
    (trailing spacing; Lin et al. 2023, arXiv:2305.08891, table 2).
    """
    changes = {
        "trained_betas": base_scheduler.betas[:levels].tolist(), "num_train_timesteps": levels,
        "rescale_betas_zero_snr": False, "timestep_spacing": "trailing",
    }  # fmt: skip
    return changes | ({"original_inference_steps": levels // LCM_GRID} if cls in LCM_GRID_SCHEDULERS else {})


def build(
    name: str, base_scheduler: Any, overrides: Mapping[str, Any] | None = None, levels: int | None = None
) -> Any:
    """A scheduler with the base's noise schedule and prediction type.

    overrides  of its configuration (a preset's timestep spacing)
    levels     number of noise levels, counted from the lowest; all by default
    """
    import diffusers

    cls, extra = SCHEDULERS[scheduler_name(name)]
    extra = extra | dict(overrides or {})
    config = {k: v for k, v in base_scheduler.config.items() if not k.startswith("_")}
    if config.get("rescale_betas_zero_snr") and cls in (
        "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
    ):  # fmt: skip
        extra = extra | {"final_sigmas_type": "zero"}
    if levels:
        extra = extra | _first_levels(base_scheduler, levels, cls)
    if cls == "EulerAncestralDiscreteScheduler":
        from minikin.generation.custom_timesteps import EulerAncestralCustomTimesteps

        return EulerAncestralCustomTimesteps.from_config(config | extra)
    return _with_begin_index(getattr(diffusers, cls).from_config(config | extra))


def order(cls: str) -> int:
    """How often a scheduler of this class of diffusers calls the model in a step."""
    import diffusers

    calls: int = getattr(diffusers, cls).order
    return calls


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
