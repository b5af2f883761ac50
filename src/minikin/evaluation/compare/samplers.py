"""Sampler configurations of a comparison: a preset for each requested number of denoising steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minikin.baselines import class_images
from minikin.evaluation.sweep.grid import FEW
from minikin.models.presets import PREFERENCE, PRESETS, preset
from minikin.recipes import Compare, Paint

Facts = Callable[[Paint], Mapping[str, Any]]  # of an image of this recipe (`Studio.facts`)


@dataclass(frozen=True)
class SamplerConfig:
    """A preset in a number of steps; `dependencies` are what its images depend on besides."""

    preset: str
    steps: int
    dependencies: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.steps} step{'s' if self.steps > 1 else ''} ({self.preset})"


def sampler_configs(
    recipe: Compare, presets: Sequence[Mapping[str, Any]], facts: Facts
) -> tuple[tuple[SamplerConfig, ...], tuple[str, ...]]:
    """Sampler configurations, and a sentence for each number of steps that has none.

    presets  of the base (`Studio.presets`)
    Of the presets that fit a number of steps, the first in `models.presets.PREFERENCE` is taken, or all of
    `recipe.presets`. Raises UnknownName for a preset that does not exist.
    """
    configs, skipped = [], []
    requested = [preset(name).name for name in recipe.presets]
    for steps in dict.fromkeys(recipe.steps):
        count = "1 step is" if steps == 1 else f"{steps} steps are"
        fitting = [p for p in presets if steps in PRESETS[p["name"]].allowed]
        fitting = [p for p in fitting if (p["name"] == "quality") == (steps > FEW)]
        fitting.sort(key=lambda p: PREFERENCE.index(p["name"]))
        if requested and steps <= FEW:
            fitting = [p for p in fitting if p["name"] in requested]
        ready = [p["name"] for p in fitting if p["ready"]]
        if not ready:
            missing = " or ".join(f"{p['name']} (adapter {p['adapter']})" for p in fitting)
            why = f"preset {missing} is not on this machine" if missing else "no preset of this base is for it"
            skipped.append(f"{count} left out: {why}.")
        for name in ready[: None if requested else 1]:
            prompt = class_images.prompt(recipe.category)
            record = facts(Paint.make(prompt=prompt, base=recipe.base, preset=name, steps=steps, points={}))
            if record["recipe"]["steps"] != steps:
                skipped.append(f"{count} left out: {name}'s adapter is for other numbers.")
                continue
            names = ("base", "preset", "sampler", "guidance", "adapters")
            configs.append(SamplerConfig(name, steps, {"steps": steps} | {n: record[n] for n in names}))
    return tuple(configs), tuple(skipped)
