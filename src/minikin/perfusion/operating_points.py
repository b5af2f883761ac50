"""Operating points: measured generation settings of a concept, by preset.

A sweep (`minikin sweep`) picks three from the Pareto front of subject fidelity and prompt fidelity:

    faithful   highest subject fidelity at an acceptable prompt fidelity
    balanced   the knee of the front; `<name>` alone uses this point
    creative   highest prompt fidelity at an acceptable subject fidelity

A concept file stores them as one JSON object by preset, and each point as a list of numbers, to save bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minikin.limits import POINT_NAMES as NAMES

DEFAULT = "balanced"
MAX_PRESETS = 16
_ENCODER = "judge"  # word: key in concept files
BETAS = (-2.0, 3.0)  # plausible biases of a gate: similarities lie in about -0.5 to 1
TAUS = (1e-3, 5.0)  # plausible temperatures of a gate: a much smaller one divides by 0 in float32
DIGITS = 4  # after the decimal point, of every number in a file


@dataclass(frozen=True)
class Point:
    """One operating point and its scores.

    tau               temperature of the concept's gate; None for the one in the concept
    guidance          classifier-free guidance scale
    concept_start     share of the steps before the concept acts; until then the prompt names its category
    interval          shares of the steps between which guidance acts
    subject_fidelity  mean cosine similarity with the photos
    prompt_fidelity   the encoder's text alignment
    encoder           name and weight digest; scores of different encoders are not comparable
    """

    strength: float
    tau: float | None
    guidance: float
    concept_start: float
    interval: tuple[float, float]
    subject_fidelity: float
    prompt_fidelity: float
    encoder: str

    def record(self) -> dict[str, Any]:
        """The point by the field names of the JSON output."""
        return {
            "strength": self.strength,
            "tau": self.tau,
            "guidance": self.guidance,
            "switch": self.concept_start,
            "interval": self.interval,
            "likeness": self.subject_fidelity,  # word: JSON field
            "follows": self.prompt_fidelity,
            "judge": self.encoder,  # word: JSON field
        }


Points = Mapping[str, Mapping[str, Point]]  # by preset, then by name


def key(preset: str, steps: int, default_steps: int) -> str:
    """The key of a preset's points in a concept; includes the number of steps if it is not the default."""
    return preset if steps == default_steps else f"{preset}-{steps}"


def of(points: Points, preset: str, steps: int) -> Mapping[str, Point]:
    """The points of a preset, preferably those measured with this number of steps; {} without any."""
    return points.get(f"{preset}-{steps}") or points.get(preset) or {}


def as_json(points: Points) -> dict[str, Any]:
    """The points as the JSON object of a concept file."""
    out: dict[str, Any] = {}
    for preset, by_name in points.items():
        encoders = {p.encoder for p in by_name.values()}
        assert len(encoders) == 1, "a sweep uses one encoder"
        out[preset] = {_ENCODER: encoders.pop()} | {name: _numbers(p) for name, p in by_name.items()}
    return out


def from_json(value: Any) -> dict[str, dict[str, Point]]:
    """The inverse of `as_json`; raises ValueError, TypeError or KeyError for other JSON."""
    if not isinstance(value, dict) or len(value) > MAX_PRESETS:
        raise TypeError(f"points that are not an object of at most {MAX_PRESETS} presets")
    out = {}
    for preset, by_name in value.items():
        encoder = by_name[_ENCODER]
        too_long = not isinstance(encoder, str) or max(len(encoder), len(preset)) > 80
        if too_long or {*by_name} - {_ENCODER, *NAMES}:
            raise ValueError(f"malformed points of preset {preset[:40]!r}")
        out[preset] = {name: _point(by_name[name], encoder) for name in NAMES if name in by_name}
    return out


def _numbers(p: Point) -> list[float | None]:
    settings = (p.strength, p.tau, p.guidance, p.concept_start, *p.interval)
    return [None if v is None else _rounded(v) for v in (*settings, p.subject_fidelity, p.prompt_fidelity)]


def _rounded(value: float) -> float:
    rounded = round(value, DIGITS)
    return int(rounded) if rounded == int(rounded) else rounded


def _point(numbers: Any, encoder: str) -> Point:
    strength, guidance, start, low, high, *fidelities = (float(v) for v in (numbers[0], *numbers[2:]))
    subject_fidelity, prompt_fidelity = fidelities
    tau = None if numbers[1] is None else float(numbers[1])
    in_range = tau is None or TAUS[0] <= tau <= TAUS[1]
    in_range &= all(math.isfinite(v) for v in fidelities)
    in_range &= 0 <= strength <= 2 and 0 <= guidance <= 50 and 0 <= start <= 1 and 0 <= low < high <= 1
    if not in_range:
        raise ValueError(f"an operating point {str(numbers)[:60]} out of range")
    return Point(strength, tau, guidance, start, (low, high), subject_fidelity, prompt_fidelity, encoder)
