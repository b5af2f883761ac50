"""A request for images, resolved once: everything that sampling, saving and replaying need to know.

`resolve` reads a recipe on an opened base and returns one frozen `ImageRequest`: the recipe with every default
filled in, parsed prompts, preset, LoRAs, seeds, warnings, and the record that goes into the images' metadata.
Whatever happens afterwards reads this value; nothing parses the prompt or looks up the preset again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from PIL import Image

from minikin.errors import BadRecipe
from minikin.generation import defaults, img2img, schedulers
from minikin.generation.canvas import Canvas
from minikin.generation.lineage import task_name
from minikin.generation.source import InitImage
from minikin.generation.start_step import start_step
from minikin.images import xmp
from minikin.models import presets
from minikin.models.base import Base
from minikin.models.lora import adapters as loras
from minikin.models.lora.adapters import Adapters
from minikin.models.lora.lora_file import Adapter
from minikin.models.presets import Preset, Source
from minikin.models.prompt import Prompt, parse
from minikin.perfusion import concept_file
from minikin.perfusion.compatibility import difference_note
from minikin.perfusion.conditioning import PreparedConcept
from minikin.recipes import ConceptSettings, Img2Img, Paint, Refine

NO_CONCEPTS: Mapping[str, PreparedConcept] = MappingProxyType({})


@dataclass(frozen=True)
class ImageRequest:
    """A recipe on one base with nothing left open.

    recipe            with the defaults of its preset, base and operating points filled in
    prompt, negative  parsed, with the strengths of operating points; of an edited prompt, its end
    stages            the prompts of all steps, and negative_stages: each with the call of the U-Net from
                      which it counts, in a whole image
    concepts          that the prompts name, prepared for the base
    preset            with the values that the student's header states
    adapters          LoRAs with their weights: the preset's, then the prompt's
    chunks            windows of tokens that each prompt is encoded in; the longest prompt decides
    adapter_source    where the preset's LoRA is published; None where the base's own weights are the student
    seeds             one for each image
    warnings          about settings that were changed, or that are seldom meant; one sentence each
    record            of the images' metadata, but for seed and batch (`record_of`)
    init, canvas      the image to start from, and which of its pixels are generated; None for text-to-image
    feather           width of the blend at the mask's border, pixels
    """

    recipe: Paint
    prompt: Prompt
    negative: Prompt
    stages: tuple[tuple[int, Prompt], ...]
    negative_stages: tuple[tuple[int, Prompt], ...]
    concepts: Mapping[str, PreparedConcept]
    preset: Preset
    adapters: tuple[tuple[Adapter, float], ...]
    chunks: int
    adapter_source: Source | None
    seeds: tuple[int, ...]
    warnings: tuple[str, ...]
    record: dict[str, Any] = field(compare=False)
    init: InitImage | None = None
    canvas: Canvas | None = None
    feather: int = 0

    @property
    def steps(self) -> int:
        assert self.recipe.steps is not None
        return self.recipe.steps

    @property
    def guidance(self) -> float:
        """Classifier-free guidance scale."""
        assert self.recipe.guidance is not None
        return self.recipe.guidance

    @property
    def strength(self) -> float:
        """Share of the noise that sampling starts with; 1 for text-to-image."""
        return self.recipe.strength if self.init and isinstance(self.recipe, Img2Img) else 1.0

    @property
    def timesteps(self) -> tuple[int, ...] | None:
        """The timesteps that the student was trained for; None where the scheduler is free to choose."""
        if self.recipe.scheduler is None or self.recipe.scheduler != self.preset.scheduler:
            return None
        if self.preset.times and len(self.preset.times) == self.steps:
            return self.preset.times
        convention = presets.CONVENTIONS.get(self.preset.convention)
        return convention(self.steps) if convention else None

    @property
    def custom_timesteps(self) -> list[int] | None:
        """The timesteps to pass to the scheduler, where they differ from the ones it computes itself."""
        computed = "lcm" if self.preset.scheduler == "LCM" else "trailing"
        if self.timesteps is None or self.preset.convention == computed:
            return None
        return list(self.timesteps)

    def scheduler_class(self, base: Base) -> str:
        """The name of diffusers' scheduler class."""
        return _scheduler_class(base, self.recipe)

    def batches(self) -> Iterator[tuple[int, ...]]:
        """The seeds in batches of `recipe.batch`."""
        for i in range(0, len(self.seeds), self.recipe.batch):
            yield self.seeds[i : i + self.recipe.batch]

    def record_of(self, seed: int, batch: Sequence[int]) -> dict[str, Any]:
        """The metadata record of the image of this seed.

        batch  the seeds it is computed with: processors round differently for batches of other sizes
        """
        return {**self.record, "seed": seed, "batch": {"seed": batch[0], "n": len(batch)}}

    def paste_back(self, image: Image.Image) -> Image.Image:
        """The whole image, with the generated part in its place; text-to-image needs no pasting."""
        return self.canvas.paste_back(image, self.feather) if self.canvas else image

    def with_concepts(self, concepts: Mapping[str, PreparedConcept]) -> ImageRequest:
        """The same request with these prepared tensors of its concepts."""
        return replace(self, concepts=concepts)


def resolve(
    base: Base,
    recipe: Paint,
    concepts: Mapping[str, PreparedConcept] = NO_CONCEPTS,
    adapters: Adapters | None = None,
    init: InitImage | None = None,
) -> ImageRequest:
    """Resolve a recipe on a base.

    concepts  in use, by name; prompts may name them
    adapters  loads the LoRAs of prompt and preset. None: whatever LoRA is on the base stays, none is looked up
    init      the image to start from, for Refine and Inpaint
    Raises BadRecipe, UnknownName (concept, LoRA, preset or scheduler), NoNetwork and AssetError for a preset's
    adapter that is not on this machine, and BadPhoto for a mask that leaves nothing to generate.
    """
    categories = {name: concept.concept.category for name, concept in concepts.items()}
    prompt = parse(recipe.prompt, categories)
    defaults.check_supported(base, recipe)
    negative = replace(parse(recipe.negative, categories), negative=True)
    _check_prompts(prompt, negative)
    if init and not isinstance(recipe, Img2Img):
        raise BadRecipe("An image is refined or inpainted; `paint` starts from noise.")
    if init and isinstance(recipe, Refine):
        recipe = recipe.with_size(init.source.image.size)

    choice, uses = _loras(base, recipe, prompt, adapters)
    in_use = {n: concepts[n] for n in dict.fromkeys((*prompt.all_names, *negative.all_names))}
    with_points = defaults.with_operating_points(recipe, prompt, negative, in_use, choice)
    resolved, warnings = defaults.fill_in(base, with_points, choice)
    stages, negative_stages = (
        prompt_stages(p, categories, _calls(base, resolved, choice.preset), resolved.points or {})
        for p in (prompt, negative)
    )
    prompt, negative = (defaults.with_point_strengths(p, resolved.points or {}) for p in (prompt, negative))
    texts = [p for _, p in (*stages, *negative_stages)]
    record = _record(base, recipe, resolved, choice.preset, in_use, uses)
    return ImageRequest(
        recipe=resolved,
        prompt=prompt,
        negative=negative,
        stages=stages,
        negative_stages=negative_stages,
        concepts=in_use,
        preset=choice.preset,
        adapters=tuple(_by_component(uses)),
        chunks=max(base.count_chunks(p) for p in dict.fromkeys(texts)),
        adapter_source=choice.source,
        seeds=tuple(range(recipe.seed, recipe.seed + recipe.n)),
        warnings=(
            *prompt_notes(prompt, negative),
            *(note for lora in uses for note in lora.adapter.notes),
            *filter(None, (difference_note(base, c.concept) for c in in_use.values())),
            *warnings,
            *defaults.cautions(base, resolved, texts, in_use),
        ),
        record=record | (init.record() if init else {}),
        init=init,
        canvas=img2img.canvas(base, resolved, init) if init and isinstance(resolved, Img2Img) else None,
        feather=img2img.feather(base, resolved),
    )


def _check_prompts(prompt: Prompt, negative: Prompt) -> None:
    """Raise BadRecipe for what one of the two prompts, or one image, cannot have."""
    if negative.loras:
        raise BadRecipe("A LoRA works on the whole image: move <lora:...> to the prompt.")
    for text in (prompt, negative):
        if text.edits and any(use.box for use in text.all_uses):
            raise BadRecipe(
                "A prompt with a concept in a region stays the same in all steps: leave out [a:b:0.5] and "
                "[a|b], or the region."
            )


class _Lora(NamedTuple):
    """A LoRA that is read, with its weights on the U-Net and on the text encoders."""

    adapter: Adapter
    weight: float
    text_weight: float


def _loras(
    base: Base, recipe: Paint, prompt: Prompt, adapters: Adapters | None
) -> tuple[defaults.PresetChoice, list[_Lora]]:
    """The preset, and the LoRAs: its own, then those of the prompt; none without `adapters`."""
    if adapters is None:
        return defaults.choose_preset(base, recipe, {}), []
    uses = zip(prompt.loras, prompt.text_weights, strict=True)
    loaded = [_Lora(adapters.get(loras.find(name)), weight, text) for (name, weight), text in uses]
    header = next((u.adapter.metadata for u in loaded if "minikin.preset" in u.adapter.metadata), {})
    choice = defaults.choose_preset(base, recipe, header)
    if choice.source is None:
        return choice, loaded
    student = adapters.get(presets.locate(choice.preset, choice.source), choice.source.name)
    return choice.with_student(student.metadata), [_Lora(student, 1.0, 1.0), *loaded]


def prompt_stages(
    prompt: Prompt, categories: Mapping[str, str], calls: int, points: Mapping[str, ConceptSettings]
) -> tuple[tuple[int, Prompt], ...]:
    """The prompts of a whole image of so many calls of the U-Net, each with the call from which it counts."""
    texts = prompt.edits.stages(calls) if prompt.edits else ((0, prompt.source),)
    parsed = {prompt.source: prompt}
    if prompt.edits:
        parsed = {text: replace(parse(text, categories), negative=prompt.negative) for _, text in texts}
    return tuple((call, defaults.with_point_strengths(parsed[text], points)) for call, text in texts)


def prompt_notes(prompt: Prompt, negative: Prompt) -> tuple[str, ...]:
    """What the prompts ask for and do not get, each once."""
    return tuple(dict.fromkeys((*prompt.notes, *negative.notes)))


def _calls(base: Base, recipe: Paint, preset: Preset) -> int:
    """Calls of the U-Net of a whole image."""
    return start_step(recipe.steps or preset.steps, _scheduler_class(base, recipe)).calls


def _scheduler_class(base: Base, recipe: Paint) -> str:
    return schedulers.class_name(recipe.scheduler, base.pipe.scheduler)


def _by_component(uses: list[_Lora]) -> Iterator[tuple[Adapter, float]]:
    """The LoRAs with their weights; one with another weight on the text encoders as two parts."""
    for adapter, weight, text_weight in uses:
        if weight == text_weight:
            yield adapter, weight
            continue
        for part, part_weight in (("unet", weight), ("text", text_weight)):
            layers = {k: v for k, v in adapter.layers.items() if (k[0] == "unet") == (part == "unet")}
            biases = {k: v for k, v in adapter.biases.items() if (k[0] == "unet") == (part == "unet")}
            content = f"{part}-{adapter.sha256}"  # distinguishes the parts where sums are cached by content
            yield replace(adapter, sha256=content, layers=layers, biases=biases), part_weight


def _record(
    base: Base,
    recipe: Paint,
    resolved: Paint,
    preset: Preset,
    concepts: Mapping[str, PreparedConcept],
    uses: list[_Lora],
) -> dict[str, Any]:
    """How the images are made; `recipe` in it repeats them."""
    repeat = resolved
    if recipe.preset is None and preset.name == "quality":  # scheduler and guidance stay the base's defaults
        update = {name: getattr(resolved, name) for name in ("steps", "points", "interval", "schedule")}
        if resolved.points and recipe.points is None:
            update["guidance"] = resolved.guidance
        repeat = recipe.model_copy(update=update)
    return {
        "work": task_name(recipe),
        xmp.KEY: xmp.TRAINED,
        "recipe": repeat.model_dump(exclude={"device", "dtype", "batch", "n"}),
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        "concepts": {
            name: {"category": c.concept.category, "sha256": concept_file.content(c.concept)}
            for name, c in concepts.items()
        },
        "preset": preset.name,
        "sampler": resolved.scheduler or "base default",
        "schedule": resolved.schedule,
        "guidance": resolved.guidance,
        "adapters": {
            adapter.name: {"weight": weight, "sha256": adapter.sha256}
            | ({"text_weight": text_weight} if text_weight != weight else {})
            for adapter, weight, text_weight in uses
        },
    }
