"""Defaults: values that a recipe leaves open, filled in from preset, operating points and base.

A recipe may name a preset, or the opened checkpoint may be made for one (`presets.recognise`); it decides
steps, guidance, scheduler and size. Steps, guidance or a scheduler that the student was not trained for are
replaced by the nearest that it was, with a warning, unless the recipe says force.

Operating points are settings that a sweep has measured. `<tom>` stands for tom's balanced point of the preset
in use, `<tom:faithful>` for another one. A strength in the prompt and --tau, --concept-start, --guidance and
--interval win over the point's values. Guidance and its interval concern the whole image: they are those of
the first concept in the prompt that has a point. A concept without points keeps the settings of its training;
where several of mode value are kept apart in one image, it is `SHARED_STRENGTH` (docs/measurements.md).

Resolving a resolved recipe changes nothing and warns of nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minikin.errors import BadRecipe, extra
from minikin.generation import align_your_steps, flow, schedulers
from minikin.models import presets
from minikin.models.base import Base
from minikin.models.foreign_syntax import excerpt
from minikin.models.presets import Preset, Source
from minikin.models.prompt import ConceptUse, Prompt
from minikin.perfusion import operating_points
from minikin.perfusion.category import unknown_words
from minikin.perfusion.conditioning import PreparedConcept
from minikin.perfusion.operating_points import Point
from minikin.recipes import WHOLE, ConceptSettings, Img2Img, Paint

MAX_LISTED = 5  # words in a note
SHARED_STRENGTH = 1.4  # of a concept of mode value beside others, whose tokens share the attention
LARGE = 1.6  # times the base's training size: from there on subjects repeat


# ---- preset ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PresetChoice:
    """The preset of a recipe.

    recognised  the preset that the base's own weights were made for
    source      where the preset's LoRA is published; None where none is needed
    """

    preset: Preset
    recognised: Preset
    source: Source | None

    def with_student(self, header: Mapping[str, str]) -> PresetChoice:
        """The preset as the header of its LoRA states it."""
        return replace(self, preset=presets.for_student(self.preset, header))


def choose_preset(base: Base, recipe: Paint, header: Mapping[str, str]) -> PresetChoice:
    """Choose the preset: the recipe's, that of a LoRA in the prompt, or the one the base was made for.

    header  metadata of a few-step LoRA in the prompt; {} for none
    Raises UnknownName for an unknown preset, BadRecipe for one that this base cannot have.
    """
    recognised = presets.recognise(base)
    stated = presets.PRESETS.get(header.get("minikin.preset", ""))
    preset = presets.preset(recipe.preset) if recipe.preset else stated or recognised
    ready = {recognised.name, stated.name if stated else recognised.name}
    if preset.name in ready:
        _check_preset(base, preset, ready, None)
        facts = base.metadata if preset.name == recognised.name else header
        return PresetChoice(presets.for_student(preset, facts), recognised, None)
    source = preset.source(base.architecture, recipe.steps or preset.steps)
    _check_preset(base, preset, ready, source)
    return PresetChoice(preset, recognised, source)


def _check_preset(base: Base, preset: Preset, ready: set[str], source: Source | None) -> None:
    of_base = presets.of_guidance_embedding(base)
    if base.has_guidance_embedding and preset.name != of_base:
        raise BadRecipe(
            f"'{base.name}' is a consistency model with guidance as an input and paints with preset {of_base} "
            f"only, not '{preset.name}'. Leave --preset out."
        )
    if preset.name in {"quality", *ready} or source is not None:
        return
    if preset.name == "lcm" and base.is_unet:
        raise BadRecipe(
            f"Preset 'lcm' is for full latent consistency models, whose U-Net takes guidance as an input; "
            f"'{base.name}' is none. Use --preset lcm-lora, or a base such as lcm-dreamshaper."
        )
    available = ", ".join(presets.for_architecture(base.architecture))
    raise BadRecipe(
        f"There is no adapter of preset '{preset.name}' for '{base.name}' ({base.architecture}). Presets for "
        f"{base.architecture}: {available}."
    )


# ---- operating points -----------------------------------------------------------------------------


def with_operating_points(
    recipe: Paint,
    prompt: Prompt,
    negative: Prompt,
    concepts: Mapping[str, PreparedConcept],
    choice: PresetChoice,
) -> Paint:
    """The recipe with the operating points of all its concepts; unchanged when it has points already.

    Raises BadRecipe for a point by name that was not measured for this preset.
    """
    if recipe.points is not None:
        return recipe
    preset = choice.preset
    steps = recipe.steps or preset.steps
    if not recipe.force and steps not in preset.allowed:
        steps = preset.nearest_steps(steps)
    points: dict[str, Point] = {}
    shared = _shared(recipe, prompt, concepts, steps)
    settings = dict.fromkeys(shared, ConceptSettings(strength=SHARED_STRENGTH))
    for use in (*prompt.uses, *negative.uses):
        measured = operating_points.of(concepts[use.name].concept.points, preset.name, steps)
        if use.point and use.point not in measured:
            raise BadRecipe(_not_measured(use, preset.name))
        if measured and use.name not in points:
            points[use.name] = measured[use.point or operating_points.DEFAULT]
    settings |= {
        name: ConceptSettings(strength=p.strength, tau=p.tau, concept_start=p.concept_start)
        for name, p in points.items()
    }
    if not settings:
        return recipe
    values: dict[str, Any] = {"points": settings}
    first = next((points[name] for name in prompt.names if name in points), None)
    if first and recipe.guidance is None:
        values["guidance"] = first.guidance
    if first and recipe.interval is None:
        values["interval"] = first.interval
    return recipe.model_copy(update=values)


def _shared(recipe: Paint, prompt: Prompt, concepts: Mapping[str, PreparedConcept], steps: int) -> list[str]:
    """The concepts of mode value that are kept apart from others, in regions written or found."""
    can_find = recipe.regions == "auto" and steps > 1
    if len(prompt.names) < 2 or prompt.edits or not (can_find or any(use.box for use in prompt.uses)):
        return []
    return [name for name in prompt.names if concepts[name].concept.mode == "value"]


def with_point_strengths(prompt: Prompt, points: Mapping[str, ConceptSettings]) -> Prompt:
    """The prompt with the points' strengths, where none is written down."""
    if not points:
        return prompt
    uses = (
        replace(use, strength=points[use.name].strength) if use.name in points and not use.has_strength else use
        for use in prompt.uses
    )
    return replace(prompt, uses=tuple(uses))


def _not_measured(use: ConceptUse, preset: str) -> str:
    return (
        f"Concept '{use.name}' has no operating point '{use.point}' for preset {preset}. Measure it with "
        f"`minikin sweep {use.name} --preset {preset}`, or write <{use.name}> or a strength, <{use.name}:0.8>."
    )


# ---- values ---------------------------------------------------------------------------------------


def fill_in(base: Base, recipe: Paint, choice: PresetChoice) -> tuple[Paint, list[str]]:
    """The recipe with every value filled in, and a sentence for each that was changed."""
    preset = choice.preset
    name, schedule = schedulers.split(recipe.scheduler) if recipe.scheduler else (None, None)
    values: dict[str, Any] = {
        "preset": preset.name,
        "steps": recipe.steps or preset.steps,
        "guidance": _guidance(base, preset) if recipe.guidance is None else recipe.guidance,
        "scheduler": name or preset.scheduler,
        "schedule": schedulers.schedule_name(recipe.schedule) or schedule,
    }
    has_size = recipe.width or recipe.height or isinstance(recipe, Img2Img)  # which keeps the image's size
    if not has_size and (side := preset.sizes.get(base.architecture)):
        values |= {"width": side, "height": side}
    warnings = []
    if choice.recognised.name not in ("quality", preset.name):
        warnings.append(
            f"'{base.name}' looks as if it was made for preset {choice.recognised.name}; painting it with "
            f"{preset.name} as asked."
        )
    elif not recipe.preset and preset.name == choice.recognised.name and presets.is_guess(base):
        warnings.append(
            f"'{base.name}' has no mark of a few-step model but its name; painting it with preset "
            f"{preset.name}. If it is an ordinary checkpoint, use --preset quality."
        )
    if not recipe.force:
        warnings += _correct(preset, values)
    warnings += _correct_schedule(base, preset, values, recipe.force)
    if recipe.negative and (values["guidance"] <= 1 or preset.embedded):
        warnings.append(
            f"The negative prompt has no effect with preset {preset.name} at guidance {values['guidance']:g}."
        )
    return recipe.model_copy(update=values), warnings


def _guidance(base: Base, preset: Preset) -> float:
    return base.family.guidance if preset.guidance is None else preset.guidance


def _correct(p: Preset, values: dict[str, Any]) -> list[str]:
    """Move values into the preset's range, in place; a sentence for each that was outside."""
    warnings = []
    steps, guidance, scheduler = values["steps"], values["guidance"], values["scheduler"]
    if steps not in p.allowed:
        values["steps"] = p.nearest_steps(steps)
        warnings.append(
            f"Preset {p.name} is made for {p.counts} steps, not {steps}; using {values['steps']}. "
            f"--force keeps {steps}."
        )
    if not p.low <= guidance <= p.high:
        values["guidance"] = min(max(guidance, p.low), p.high)
        warnings.append(
            f"Guidance {guidance:g} with preset {p.name} spoils images ({p.low:g} to {p.high:g} is "
            f"right); using {values['guidance']:g}. --force keeps {guidance:g}."
        )
    if p.scheduler and scheduler != p.scheduler:
        values["scheduler"] = p.scheduler
        warnings.append(
            f"Preset {p.name} paints with scheduler {p.scheduler}, not {scheduler}; using "
            f"{p.scheduler}. --force keeps {scheduler}."
        )
    return warnings


def _correct_schedule(base: Base, preset: Preset, values: dict[str, Any], force: bool) -> list[str]:
    """Drop a noise schedule that the sampler does not have, in place; a sentence if there was one."""
    sampler, schedule = values["scheduler"], values["schedule"]
    if package := schedulers.missing_package(sampler, schedule):
        raise BadRecipe(
            f"{sampler or 'The base'}{f' with schedule {schedule}' if schedule else ''} needs the package "
            f"{package}, which is not installed here. Install it with {extra('samplers')}."
        )
    if not schedule:
        return []
    cls = schedulers.SCHEDULERS[sampler][0] if sampler else type(base.pipe.scheduler).__name__
    if preset.scheduler and not force:
        why = f"Preset {preset.name} paints at the timesteps of its training"
    elif base.schedule.is_flow:
        why = f"'{base.name}' was trained by flow matching and has the noise levels of its own shift"
    elif schedule not in (possible := schedulers.schedules_of(cls)):
        others = f"; it has {', '.join(possible)}" if possible else ""
        why = f"{sampler or 'The sampler of this base'} has no noise schedule {schedule} in diffusers{others}"
    elif schedule == "Align Your Steps" and not align_your_steps.is_known(base.architecture):
        why = "Align Your Steps was measured for Stable Diffusion 1.5 and XL, not for this base"
    else:
        return []
    values["schedule"] = None
    return [f"{why}. Painting with the automatic schedule, not {schedule}."]


# ---- checks ---------------------------------------------------------------------------------------


def check_supported(base: Base, recipe: Paint) -> None:
    """Raise BadRecipe when the base cannot generate images of this size or with this scheduler."""
    name = schedulers.split(recipe.scheduler)[0] if recipe.scheduler else ""
    of_base = "LCM" if base.is_unet else "SCM"
    if base.has_guidance_embedding and name not in ("", of_base):
        raise BadRecipe(
            f"'{base.name}' is a consistency model and paints with the {of_base} scheduler only, not "
            f"'{recipe.scheduler}'. Leave --scheduler out."
        )
    if base.schedule.is_flow and name and name not in flow.SAMPLERS:
        raise BadRecipe(
            f"'{base.name}' was trained by flow matching, and scheduler {name} is none of it. Use one of "
            f"{', '.join(flow.SAMPLERS)}, or leave --scheduler out."
        )
    base.check_clip_skip(recipe.clip_skip)
    if recipe.backend != "eager":
        base.require_unet(f"Backend {recipe.backend}")
    if isinstance(recipe, Img2Img):  # any size, on any U-Net
        return
    if base.is_inpainting:
        raise BadRecipe(
            f"'{base.name}' is an inpainting model: it fills masked parts of an image and paints nothing "
            "from a prompt alone. Use the ordinary model of its family, or `minikin inpaint`."
        )
    for side in ("width", "height"):
        value = getattr(recipe, side)
        if value is not None and value % base.size_multiple:
            near = base.size_multiple * max(1, round(value / base.size_multiple))
            raise BadRecipe(
                f"{side} must be a multiple of {base.size_multiple} for this base, but it is {value}; "
                f"use {near}."
            )


def _listed(words: Sequence[str]) -> str:
    """The first few words, quoted."""
    more = len(words) - MAX_LISTED
    return ", ".join(f"'{excerpt(w)}'" for w in words[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def cautions(
    base: Base, recipe: Paint, prompts: Sequence[Prompt], concepts: Mapping[str, PreparedConcept]
) -> list[str]:
    """Settings that are possible and seldom meant; one sentence each.

    prompts  of all steps
    """
    sentences = []
    if not recipe.prompt.strip():
        sentences.append("The prompt is empty, so the image shows anything that this base can paint.")
    n = max(base.needed_chunks(prompt) for prompt in dict.fromkeys(prompts))
    if n > (most := base.text.max_chunks):
        first = f"the first {most} are read" if most > 1 else "the first is read"
        sentences.append(
            f"The prompt fills {n} chunks of {base.text.window} tokens; {first} and the rest is left out."
        )
    if unknown := unknown_words(base, " ".join(dict.fromkeys(p.text for p in prompts))):
        sentences.append(
            f"'{base.name}' probably does not know {_listed(unknown)}, and reads such words in pieces. Other "
            "words may be followed better."
        )
    if 1 < recipe.clip_skip <= base.trained_clip_skip:
        sentences.append(
            f"Clip skip {recipe.clip_skip} has no effect: {base.architecture} was trained with the layer "
            "before the last, and 1 means that one, too."
        )
    elif recipe.clip_skip > 1 and (gated := [n for n, c in concepts.items() if c.concept.mode == "gated"]):
        sentences.append(
            f"{' and '.join(gated)}: taught with clip skip 1, so with {recipe.clip_skip} the gate opens less "
            "reliably."
        )
    w, h = recipe.width or base.size_px, recipe.height or base.size_px
    if not isinstance(recipe, Img2Img) and max(w, h) > LARGE * base.size_px:
        sentences.append(
            f"This base was trained on images of {base.size_px} px; at {w}x{h} it tends to repeat the subject."
        )
    gates = [f"--{k}" for k in ("beta", "tau") if getattr(recipe, k) is not None]
    gates += ["--lock global"] * (recipe.lock == "global")
    if gates and all(c.concept.mode == "value" for c in concepts.values()):
        sentences.append(f"No effect of {', '.join(gates)}: no concept of the prompt has a gate (mode gated).")
    embedded = presets.PRESETS[recipe.preset].embedded if recipe.preset else base.has_guidance_embedding
    if recipe.interval not in (None, WHOLE) and ((recipe.guidance or 0) <= 1 or embedded):
        sentences.append(
            "The guidance interval has no effect: no step of this image is guided by a second pass."
        )
    return sentences
