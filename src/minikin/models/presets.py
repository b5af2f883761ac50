"""Presets: adapter, scheduler, timesteps, guidance and image size under one name.

A few-step student works only with the scheduler, timesteps and guidance of its training, so a preset sets all
of them. `PRESETS` also says where each adapter is published. `recognise` returns the preset that a checkpoint
was trained for. `generation.defaults` combines a preset with the user's options.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from minikin import strict_json
from minikin.errors import AssetError, NoNetwork, UnknownName
from minikin.models.base import Base
from minikin.models.lora import adapters

N_TRAIN = 1000  # training timesteps of all these models
ANY_STEPS = range(1, N_TRAIN + 1)

# ---- timesteps, as published ----------------------------------------------------------------------


def lcm_timesteps(n: int) -> tuple[int, ...]:
    """Timesteps of latent consistency models: n of the teacher's 50 DDIM timesteps 999, 979, ..., 19, evenly.

    Luo et al. 2023, arXiv:2310.04378; 4 steps are 999, 759, 499, 259.
    """
    return tuple(N_TRAIN - 1 - 20 * (50 * i // n) for i in range(n))


def trailing_timesteps(n: int) -> tuple[int, ...]:
    """Evenly spaced timesteps from the last one down; 4 steps are 999, 749, 499, 249.

    Lin et al. 2023, arXiv:2305.08891, table 2; used by SDXL-Turbo, Lightning and Hyper-SD.
    """
    return tuple(round(N_TRAIN - i * N_TRAIN / n) - 1 for i in range(n))


def demo_timesteps(n: int) -> tuple[int, ...]:
    """The first n timesteps of 999, 899, 799, 699, as in Stability's Turbo demo.

    generative-models, scripts/demo/turbo.py: every 100th of the 1000 descending noise levels.
    """
    return tuple(N_TRAIN - 1 - 100 * i for i in range(n))


CONVENTIONS: Mapping[str, Callable[[int], tuple[int, ...]]] = {
    "lcm": lcm_timesteps, "trailing": trailing_timesteps, "demo": demo_timesteps,
}  # fmt: skip


# ---- the list -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Source of an adapter: a file on the hub, or (with an empty `repo`) a file in the package.

    name     name in the models folder and for `models pull`
    mb       approximate size in 10^6 bytes
    licence  "" if the authors state none in the repository
    """

    name: str
    repo: str = ""
    file: str = ""
    licence: str = ""
    mb: int = 0


@dataclass(frozen=True)
class Preset:
    """Sampling settings of a student, or of an ordinary base (`quality`).

    what        description
    scheduler   name in generation.schedulers; None for the base's scheduler
    config      values of the scheduler's configuration
    convention  rule for the timesteps, a key of CONVENTIONS; "" for any timesteps
    steps       default number of steps
    allowed     numbers of steps that the student was trained for
    guidance    default guidance scale; None for the base's default
    low, high   useful range of the guidance scale
    adapters    by architecture, then by number of steps (0: one adapter for all)
    sizes       image side by architecture, where the base's default does not apply
    times       exact timesteps that a student states in its metadata
    """

    name: str
    what: str
    scheduler: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    convention: str = ""
    steps: int = 4
    allowed: range | tuple[int, ...] = ANY_STEPS
    guidance: float | None = None
    low: float = 0.0
    high: float = 50.0
    adapters: Mapping[str, Mapping[int, Source]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    times: tuple[int, ...] = ()

    @property
    def embedded(self) -> bool:
        """True if guidance is an input of the denoiser; then there is no second pass and no negative prompt."""
        return self.name in ("lcm", "sprint")

    @property
    def counts(self) -> str:
        """The allowed numbers of steps in words: "1 to 8", "2 or 4 or 8"."""
        if isinstance(self.allowed, range):
            return f"{self.allowed[0]} to {self.allowed[-1]}"
        return " or ".join(str(n) for n in self.allowed)

    def nearest_steps(self, steps: int) -> int:
        """The allowed number of steps nearest to `steps`."""
        return min(self.allowed, key=lambda n: (abs(n - steps), -n))

    def source(self, architecture: str, steps: int) -> Source | None:
        """The adapter for an architecture and a number of steps, or None."""
        by_steps = self.adapters.get(architecture, {})
        return by_steps.get(self.nearest_steps(steps)) or by_steps.get(0)


_TRAILING = {"timestep_spacing": "trailing"}
# samplers that the metadata of a student of `minikin distill` may name
_SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "renoise": ("LCM", {}),
    "ddim": ("DDIM", {**_TRAILING, "set_alpha_to_one": True}),  # the last step ends at the clean image
}
_RAIL = "CreativeML OpenRAIL++-M"


def _packaged(name: str) -> dict[int, Source]:
    return {0: Source(f"{name}-tiny", file=f"{name}.safetensors", licence="Apache-2.0")}


def _per_steps(name: str, repo: str, file: str, licence: str, mb: int) -> dict[int, Source]:
    """One adapter for each number of steps, which replaces {n} in the file name."""
    return {n: Source(f"{name}-{n}", repo, file.format(n=n), licence, mb) for n in (2, 4, 8)}


PRESETS: Mapping[str, Preset] = {p.name: p for p in (
    Preset("quality", "the base's own scheduler and many steps", steps=25),
    Preset(
        "lcm", "full latent consistency model; guidance is an input of its U-Net",
        "LCM", convention="lcm", allowed=range(1, 9), guidance=8.0, low=1.0, high=14.0,
        adapters={"tiny": _packaged("lcm")},
    ),
    Preset(
        "lcm-lora", "LCM adapter on any base of its family, other LoRAs beside it",
        "LCM", convention="lcm", allowed=range(1, 9), guidance=1.0, high=2.0,
        adapters={
            "tiny": _packaged("lcm-lora"),
            "sd1": {0: Source("lcm-lora-sd15", "latent-consistency/lcm-lora-sdv1-5",
                              "pytorch_lora_weights.safetensors", _RAIL, 135)},
            "sdxl": {0: Source("lcm-lora-sdxl", "latent-consistency/lcm-lora-sdxl",
                               "pytorch_lora_weights.safetensors", _RAIL, 394)},
        },
    ),
    Preset(
        "turbo", "SD-Turbo and SDXL-Turbo (adversarial distillation)",
        "Euler a", _TRAILING, "trailing", allowed=range(1, 5), guidance=0.0, high=1.0,
        adapters={"tiny": _packaged("turbo")}, sizes={"sd2": 512, "sdxl": 512},
    ),
    Preset(
        "lightning", "SDXL-Lightning: one adapter for each number of steps",
        "Euler", _TRAILING, "trailing", allowed=(2, 4, 8), guidance=0.0, high=1.0,
        adapters={"sdxl": _per_steps("sdxl-lightning", "ByteDance/SDXL-Lightning",
                                     "sdxl_lightning_{n}step_lora.safetensors", _RAIL, 394)},
    ),
    Preset(
        "hyper", "Hyper-SD: one adapter for each number of steps",
        "DDIM", _TRAILING, "trailing", allowed=(2, 4, 8), guidance=0.0, high=1.0,
        adapters={
            "sd1": _per_steps("hyper-sd15", "ByteDance/Hyper-SD", "Hyper-SD15-{n}steps-lora.safetensors",
                              "", 269),
            "sdxl": _per_steps("hyper-sdxl", "ByteDance/Hyper-SD", "Hyper-SDXL-{n}steps-lora.safetensors",
                               "", 787),
        },
    ),
    Preset(
        "tdm", "trajectory distribution matching, tiny's own student",
        "DDIM", _SAMPLERS["ddim"][1], "trailing", allowed=(4,), guidance=1.0, high=1.0,
        adapters={"tiny": _packaged("tdm")},
    ),
    Preset(
        "sprint", "SANA-Sprint; guidance is an input of its transformer",
        steps=2, allowed=range(1, 5), guidance=4.5, low=4.0, high=5.0,  # the scales of its training
    ),
)}  # fmt: skip
# The order in which they are taken for a number of steps when none is named: adapters made for few numbers of
# steps, then by FD and subject fidelity on tiny at 1, 2, 4 and 8 steps (docs/measurements.md).
PREFERENCE = ("sprint", "tdm", "lightning", "hyper", "lcm-lora", "turbo", "lcm", "quality")


def preset(name: str) -> Preset:
    """The preset of this name; raises UnknownName with the nearest ones."""
    match = PRESETS.get(name.strip().lower().replace("_", "-"))
    if match is None:
        raise UnknownName("preset", name, PRESETS)
    return match


def sources() -> dict[str, Source]:
    """Every adapter on the hub by its name."""
    every = (s for p in PRESETS.values() for by_steps in p.adapters.values() for s in by_steps.values())
    return {s.name: s for s in every if s.repo}


# ---- recognition of checkpoints -------------------------------------------------------------------

_PATTERNS = (
    (r"turbo", "turbo"), (r"lightning", "lightning"), (r"hyper(?!-?real)(?![a-z])|hyper-?sd", "hyper"),
    (r"(?<![a-z])lcm|lcm(?![a-z])", "lcm-lora"),
)  # fmt: skip


def recognise(base: Base) -> Preset:
    """The preset that a checkpoint was trained for, by its metadata, U-Net and names; else `quality`.

    A checkpoint with LCM in its name and without a guidance embedding has an LCM-LoRA merged in.
    """
    return _by_content(base) or _by_name(base) or PRESETS["quality"]


def of_guidance_embedding(base: Base) -> str:
    """The preset of bases of this kind of denoiser that take guidance as an input."""
    return "lcm" if base.is_unet else "sprint"


def is_guess(base: Base) -> bool:
    """Whether nothing but a name says that a checkpoint was trained for a few-step preset.

    Weights do not tell it. Published Turbo models have trailing timesteps in their scheduler's configuration.
    """
    marked = base.pipe.scheduler.config.get("timestep_spacing") == "trailing"
    return not marked and _by_content(base) is None and _by_name(base) is not None


def _by_content(base: Base) -> Preset | None:
    stated = base.metadata.get("minikin.preset", "")
    if stated in PRESETS:
        return PRESETS[stated]
    if base.has_guidance_embedding:
        return PRESETS[of_guidance_embedding(base)]
    return _preset_in(base.metadata.get("modelspec.architecture", ""))


def _by_name(base: Base) -> Preset | None:
    texts = (base.name, base.metadata.get("modelspec.title", ""), base.metadata.get("file", ""))
    return next(filter(None, map(_preset_in, texts)), None)


def _preset_in(text: str) -> Preset | None:
    """The first preset whose pattern occurs in a text."""
    return next((PRESETS[name] for pattern, name in _PATTERNS if re.search(pattern, text.lower())), None)


# ---- adapter files --------------------------------------------------------------------------------


def local_file(source: Source) -> Path | None:
    """The file of an adapter in the models folder, in the package or in the hub's cache, or None."""
    in_folder = adapters.folder() / f"{source.name}.safetensors"
    if in_folder.is_file():
        return in_folder
    if not source.repo:
        packaged = Path(str(resources.files("minikin.tiny"))) / "adapters" / source.file
        return packaged if packaged.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source.repo, source.file)
    return Path(cached) if isinstance(cached, str) else None


def locate(p: Preset, source: Source) -> Path:
    """The file of a preset's adapter; raises NoNetwork or AssetError."""
    path = local_file(source)
    if path:
        return path
    if not source.repo:
        raise AssetError(
            f"Preset '{p.name}' needs the adapter {source.name}, which is not part of this installation. Add "
            f"one you have with `minikin models add FILE --name {source.name}`, or use --preset quality."
        )
    facts = f"{source.repo}, {source.mb} MB, licence: {source.licence or 'see its page'}"
    raise NoNetwork(
        f"Preset '{p.name}' needs the adapter {source.name} ({facts}). "
        "It is not on this machine, and painting never downloads. Fetch it once with `minikin models pull "
        f"{source.name}`, or add a file you have: `minikin models add FILE --name {source.name}`."
    )


def for_architecture(architecture: str) -> list[str]:
    """`quality` and the presets with an adapter for an architecture."""
    return [p.name for p in PRESETS.values() if p.name == "quality" or architecture in p.adapters]


def describe(p: Preset, architecture: str, in_base: bool) -> dict[str, Any]:
    """A preset on one architecture as JSON data.

    in_base  the base is the student, and needs no adapter
    """
    source = None if in_base else p.source(architecture, p.steps)
    return {
        "name": p.name, "what": p.what, "steps": p.steps, "guidance": p.guidance,
        "scheduler": p.scheduler or "the base's own", "adapter": source.name if source else None,
        "ready": source is None or local_file(source) is not None,
        "allowed": list(p.allowed) if len(p.allowed) <= 16 else [],
    }  # fmt: skip


def for_student(p: Preset, facts: Mapping[str, str]) -> Preset:
    """The preset with the sampler, timesteps, steps and guidance that a student's metadata states.

    facts  metadata of an adapter or a checkpoint; only keys `minikin.*` count
    Raises AssetError for invalid values.
    """
    stated = {k.removeprefix("minikin."): v for k, v in facts.items() if k.startswith("minikin.")}
    convention = stated.get("timesteps", "")
    if convention and convention not in CONVENTIONS:
        raise UnknownName("timestep convention", convention, CONVENTIONS)
    changes: dict[str, Any] = {"convention": convention} if convention else {}
    try:
        times = _times(stated.get("times", "[]"))
        if "sampler" in stated:
            changes["scheduler"], changes["config"] = _SAMPLERS[stated["sampler"]]
        if "guidance" in stated:
            guidance = float(stated["guidance"])
            if not math.isfinite(guidance):
                raise ValueError(f"guidance {guidance:g}")
            changes["guidance"] = min(max(guidance, p.low), p.high)
    except (ValueError, KeyError) as e:
        raise AssetError(
            f"The metadata of the {p.name} student is invalid ({e}). Expected minikin.times as a list of "
            f"timesteps from 0 to {N_TRAIN - 1}, minikin.sampler as one of {', '.join(_SAMPLERS)} and "
            "minikin.guidance as a number."
        ) from None
    if times and not convention:
        changes |= {"convention": "", "times": times, "allowed": (len(times),), "steps": len(times)}
    elif times and convention != "lcm":  # LCM students accept any number of steps
        changes |= {"steps": len(times)}
        timesteps = CONVENTIONS.get(convention)
        # only numbers of steps whose timesteps the student was trained at
        subsets = tuple(n for n in range(1, len(times) + 1) if not timesteps or set(timesteps(n)) <= set(times))
        changes["allowed"] = (len(times),) if stated.get("sampler") == "ddim" else subsets
    return replace(p, **changes)


def _times(text: str) -> tuple[int, ...]:
    """A student's timesteps, as JSON in its metadata; raises ValueError."""
    times = strict_json.loads(text, kind=list, max_values=N_TRAIN)
    if not all(type(t) is int and 0 <= t < N_TRAIN for t in times):
        raise ValueError(f"times {text[:40]}")
    return tuple(times)
