"""Operating points: the settings at which a concept was measured to be at its best, by preset.

A sweep (`minikin sweep`) finds three on the front of likeness against following the prompt:

    faithful   most likeness, as long as prompts are still followed
    balanced   the front's knee; what the concept's name alone stands for
    creative   prompts followed best, as long as the likeness is there

In a concept file they are one JSON object by preset, each point a short list in the order of
Point's numbers, because every byte counts there. Knows no tensors, no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minikin.recipes.base import POINT_NAMES as NAMES

USUAL = "balanced"
MAX_PRESETS = 16
BETAS = (-2.0, 3.0)  # where a gate may be half open: similarities lie in about -0.5 to 1
TAUS = (1e-3, 5.0)  # how softly: a gate far harder than that divides by 0 in float32
DIGITS = 4  # of every number in a file


@dataclass(frozen=True)
class Point:
    """One operating point, and what was measured there.

    tau       softness of the concept's gate; None for its own
    guidance  classifier-free guidance scale
    switch    share of the steps in which the plain category stands in for the concept
    interval  share of the steps from which and up to which there is guidance
    likeness, follows   mean cosine with the photos; how well prompts are followed, as the judge counts it
    judge     its name and the digest of its weights: numbers of two judges do not compare
    """

    strength: float
    tau: float | None
    guidance: float
    switch: float
    interval: tuple[float, float]
    likeness: float
    follows: float
    judge: str


Points = Mapping[str, Mapping[str, Point]]  # by preset, then by name


def key(preset: str, steps: int, usual: int) -> str:
    """Under which name a preset's points are kept: a number of steps that is not its usual one is told."""
    return preset if steps == usual else f"{preset}-{steps}"


def of(points: Points, preset: str, steps: int) -> Mapping[str, Point]:
    """The points measured for a preset, with this number of steps if there are such; {} for none."""
    return points.get(f"{preset}-{steps}") or points.get(preset) or {}


def as_json(points: Points) -> dict[str, Any]:
    """What a concept file holds."""
    out: dict[str, Any] = {}
    for preset, named in points.items():
        judges = {p.judge for p in named.values()}
        assert len(judges) == 1, "one sweep has one judge"
        out[preset] = {"judge": judges.pop()} | {name: _numbers(p) for name, p in named.items()}
    return out


def from_json(found: Any) -> dict[str, dict[str, Point]]:
    """The inverse. Raises ValueError, TypeError or KeyError for anything else than points."""
    if not isinstance(found, dict) or len(found) > MAX_PRESETS:
        raise TypeError(f"points that are not an object of at most {MAX_PRESETS} presets")
    out = {}
    for preset, named in found.items():
        judge = named["judge"]
        if not isinstance(judge, str) or max(len(judge), len(preset)) > 80 or {*named} - {"judge", *NAMES}:
            raise ValueError(f"points of preset {preset[:40]!r} that are none")
        out[preset] = {name: _point(named[name], judge) for name in NAMES if name in named}
    return out


def _numbers(p: Point) -> list[float | None]:
    told = (p.strength, p.tau, p.guidance, p.switch, *p.interval, p.likeness, p.follows)
    return [None if v is None else _short(v) for v in told]


def _short(value: float) -> float:
    rounded = round(value, DIGITS)
    return int(rounded) if rounded == int(rounded) else rounded


def _point(numbers: Any, judge: str) -> Point:
    strength, guidance, switch, low, high, likeness, follows = (float(v) for v in (numbers[0], *numbers[2:]))
    tau = None if numbers[1] is None else float(numbers[1])
    sane = all(math.isfinite(v) for v in (likeness, follows)) and (tau is None or TAUS[0] <= tau <= TAUS[1])
    if not (sane and 0 <= strength <= 2 and 0 <= guidance <= 50 and 0 <= switch <= 1 and 0 <= low < high <= 1):
        raise ValueError(f"an operating point {str(numbers)[:60]} out of range")
    return Point(strength, tau, guidance, switch, (low, high), likeness, follows, judge)
