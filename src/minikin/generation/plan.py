"""Plans: what a recipe leaves open, decided by its preset; what lies outside the preset, corrected.

A recipe may name a preset, or the opened checkpoint may be made for one (`presets.recognise`). The
plan fills in steps, guidance, scheduler and size. Steps, guidance or a scheduler that the student
was not made for are replaced by the nearest that it was, with a warning, unless the recipe says
force. Planning a planned recipe changes nothing and warns of nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minikin.errors import BadRecipe
from minikin.generation import schedulers
from minikin.models import presets
from minikin.models.base import Base
from minikin.models.presets import Preset, Source
from minikin.recipes import Paint, Rework

TINY_GUIDANCE, GUIDANCE = 3.0, 6.0


@dataclass(frozen=True)
class Plan:
    """A recipe on one base with nothing left open.

    recipe    the recipe with everything the plan decided written into it
    own       whether the base's own weights are the student, so that no adapter is needed
    source    the adapter it needs; None for none
    warnings  what was asked for otherwise, one sentence each
    """

    recipe: Paint
    preset: Preset
    own: bool
    source: Source | None
    warnings: tuple[str, ...]

    @property
    def steps(self) -> int:
        assert self.recipe.steps is not None
        return self.recipe.steps

    @property
    def guidance(self) -> float:
        assert self.recipe.guidance is not None
        return self.recipe.guidance

    @property
    def timesteps(self) -> tuple[int, ...] | None:
        """The student's timesteps for these steps; None where the scheduler is free to choose."""
        if self.recipe.scheduler is None or self.recipe.scheduler != self.preset.scheduler:
            return None
        if self.preset.times and len(self.preset.times) == self.steps:
            return self.preset.times
        follow = presets.CONVENTIONS.get(self.preset.convention)
        return follow(self.steps) if follow else None

    @property
    def pinned(self) -> list[int] | None:
        """The timesteps to give the scheduler, where they are not the ones it comes to by itself."""
        usual = "lcm" if self.preset.scheduler == "LCM" else "trailing"
        if self.timesteps is None or self.preset.convention == usual:
            return None
        return list(self.timesteps)


def plan(base: Base, recipe: Paint, student: Mapping[str, str] | None = None) -> Plan:
    """Decide how this recipe is painted on this base.

    student   the header of the few-step adapter at hand, if there is one: what it states goes
              before the preset's own values, and without a preset in the recipe it decides that too
    Raises UnknownName for an unknown preset, BadRecipe for one that this base cannot have.
    """
    made_for = presets.recognise(base)
    stated = presets.PRESETS.get((student or {}).get("minikin.preset", ""))
    chosen = presets.preset(recipe.preset) if recipe.preset else stated or made_for
    ready = {made_for.name, stated.name if stated else made_for.name}
    own = chosen.name in ready
    source = None if own else chosen.source(base.architecture, recipe.steps or chosen.steps)
    _check(base, chosen, ready, source)
    if own:
        chosen = presets.for_student(chosen, base.facts if chosen.name == made_for.name else student or {})
    steps = recipe.steps or chosen.steps
    values: dict[str, Any] = {"preset": chosen.name, "steps": steps}
    values["guidance"] = _guidance(base, chosen) if recipe.guidance is None else recipe.guidance
    named = recipe.scheduler and schedulers.scheduler_name(recipe.scheduler)
    values["scheduler"] = named or chosen.scheduler
    sized = recipe.width or recipe.height or isinstance(recipe, Rework)  # an image's own size stays
    if not sized and (side := chosen.sizes.get(base.architecture)):
        values |= {"width": side, "height": side}
    warnings = _disagreements(base, chosen, made_for)
    if not recipe.force:
        kept, said = _corrected(chosen, values)
        values, warnings = kept, warnings + said
    if recipe.negative and (values["guidance"] <= 1 or chosen.embedded):
        warnings.append(f"The negative prompt has no effect with preset {chosen.name} at guidance "
                        f"{values['guidance']:g}.")  # fmt: skip
    return Plan(recipe.model_copy(update=values), chosen, own, source, tuple(warnings))


def _guidance(base: Base, chosen: Preset) -> float:
    if chosen.guidance is not None:
        return chosen.guidance
    return TINY_GUIDANCE if base.architecture == "tiny" else GUIDANCE


def _check(base: Base, chosen: Preset, ready: set[str], source: Source | None) -> None:
    if base.has_guidance_embedding and chosen.name != "lcm":
        raise BadRecipe(
            f"'{base.name}' is a full latent consistency model and paints with preset lcm only, not "
            f"'{chosen.name}'. Leave --preset out."
        )
    if chosen.name in {"quality", *ready} or source is not None:
        return
    if chosen.name == "lcm":
        raise BadRecipe(
            f"Preset 'lcm' is for full latent consistency models, whose U-Net takes guidance as an input; "
            f"'{base.name}' is none. Use --preset lcm-lora, or a base such as lcm-dreamshaper."
        )
    works = ", ".join(presets.for_architecture(base.architecture))
    raise BadRecipe(
        f"There is no adapter of preset '{chosen.name}' for '{base.name}' ({base.architecture}). Presets for "
        f"{base.architecture}: {works}."
    )


def _disagreements(base: Base, chosen: Preset, made_for: Preset) -> list[str]:
    if made_for.name in ("quality", chosen.name):
        return []
    return [f"'{base.name}' looks as if it was made for preset {made_for.name}; painting it with "
            f"{chosen.name} as asked."]  # fmt: skip


def _corrected(p: Preset, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values inside the preset's box, and a sentence for each that was not."""
    kept, said = dict(values), []
    steps, guidance, scheduler = values["steps"], values["guidance"], values["scheduler"]
    if steps not in p.allowed:
        kept["steps"] = p.nearest_steps(steps)
        said.append(f"Preset {p.name} is made for {p.counts} steps, not {steps}; using {kept['steps']}. "
                    f"--force keeps {steps}.")  # fmt: skip
    if not p.low <= guidance <= p.high:
        kept["guidance"] = min(max(guidance, p.low), p.high)
        said.append(f"Guidance {guidance:g} with preset {p.name} spoils images ({p.low:g} to {p.high:g} is "
                    f"right); using {kept['guidance']:g}. --force keeps {guidance:g}.")  # fmt: skip
    if p.scheduler and scheduler != p.scheduler:
        kept["scheduler"] = p.scheduler
        said.append(f"Preset {p.name} paints with scheduler {p.scheduler}, not {scheduler}; using "
                    f"{p.scheduler}. --force keeps {scheduler}.")  # fmt: skip
    return kept, said
