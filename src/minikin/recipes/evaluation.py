"""Options of the commands sweep and compare, and of --best-of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from minikin.errors import BadRecipe
from minikin.recipes.base import (
    MAX_STEPS,
    WHOLE,
    Listed,
    Recipe,
    Scale,
    Shares,
    Softness,
    Spans,
    Strength,
    check_spans,
)
from minikin.recipes.paint import Paint

SECOND_NAME = "other"  # the word of a comparison's second concept in prompts


class Sweep(Recipe):
    """Measure a concept's operating points for one preset."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "judge": "encoder", "switches": "concept_starts",  # word: names of 0.1
    }  # fmt: skip

    concept: str = Field(description="name or file of the concept")
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    preset: str | None = Field(None, description="preset to measure; by default the one the base was made for")
    steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="denoising steps; the preset's by default")
    encoder: str = Field("tiny", description="image encoder: tiny (for its own world), clip-b32 or clip-l14")
    photos: str | None = Field(
        None, description="folder of the concept's photos, others in unseen/; found by itself for an example"
    )
    texts: str | None = Field(
        None, description="file with one prompt per line, {} where the concept is named; scenes by default"
    )
    prompts: int = Field(12, ge=4, le=200, description="number of prompts")
    seeds: int = Field(2, ge=1, le=64, description="images per prompt in the last round")
    strengths: Annotated[tuple[Strength, ...], Listed] = Field(
        (0.6, 0.8, 1.0, 1.3, 1.6), min_length=1, description="strengths to try"
    )
    taus: Annotated[tuple[Softness, ...], Listed] = Field(
        (0.1, 0.15, 0.25), min_length=1, description="gate softnesses (tau) to try; mode gated"
    )
    guidances: Annotated[tuple[Scale, ...], Listed] | None = Field(
        None, min_length=1, description="guidance scales to try; the preset's, and with many steps 1.5 times it"
    )
    concept_starts: Shares = Field(
        (0.0, 0.1, 0.2, 0.35), min_length=1, description="shares of the steps before the concept acts"
    )
    intervals: Spans = Field(
        (WHOLE, (0.2, 0.8)), min_length=1, description="guidance intervals to try, as shares of the steps"
    )
    budget_minutes: float | None = Field(
        None, gt=0, description="time limit: measure a random part of the grid"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the first images")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="float32, float16 or bfloat16")

    @model_validator(mode="after")
    def _check_intervals(self) -> Sweep:
        check_spans(self.intervals)
        return self


class Compare(Recipe):
    """Compare Perfusion with other methods on the same photos."""

    RENAMED: ClassVar[Mapping[str, str]] = {"judge": "encoder"}  # word: the name of 0.1

    photos: str = Field(description="folder with photos of the concept, and others in unseen/")
    category: str = Field(description="what kind of thing it is, for example cat")
    name: str = Field("mine", description="the concept's word in prompts")
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    methods: str = Field(
        "all",
        description="all, ablations, or some: perfusion-value,dreambooth-lora,perfusion-value:mask=none,...",
    )
    encoder: str = Field("tiny", description="image encoder: tiny (for its own world), clip-b32 or clip-l14")
    texts: str | None = Field(
        None, description="file with one prompt per line, {} where the concept is named; scenes by default"
    )
    prompts: int = Field(6, ge=2, le=200, description="number of prompts")
    seeds: int = Field(2, ge=1, le=64, description="images per prompt")
    plain: int = Field(4, ge=2, le=1000, description="images of the plain category, to measure its drift")
    beside: str | None = Field(
        None, description="folder with photos of a second concept, for the two-subject test"
    )
    beside_category: str | None = Field(None, description="category of the second concept")
    strengths: Annotated[tuple[Strength, ...], Listed] = Field(
        (0.6, 1.4), description="strengths besides 1; for other methods weights of the change"
    )
    steps: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_STEPS)], ...], Listed] = Field(
        (50, 4, 1), min_length=1, description="numbers of denoising steps; small ones use presets made for them"
    )
    presets: Annotated[tuple[str, ...], Listed] = Field(
        (),
        description="presets for small numbers of steps: lcm-lora,tdm; by default the one made for each number",
    )
    teach_steps: int | None = Field(
        None, ge=1, le=20_000, description="number of training steps of every method; by method"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of training, and of the first image of each prompt")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="float32, float16 or bfloat16")

    @model_validator(mode="after")
    def _check_second(self) -> Compare:
        if (self.beside is None) != (self.beside_category is None):
            raise ValueError("a second concept needs its photos (beside) and its category (beside_category)")
        if self.name == SECOND_NAME:
            raise ValueError(f"'{SECOND_NAME}' is the name of the second concept; choose another")
        return self


class Best(Recipe):
    """Generate many images and keep the best of them, by an image encoder."""

    RENAMED: ClassVar[Mapping[str, str]] = {"judge": "encoder"}  # word: the name of 0.1

    of: int = Field(ge=1, le=1000, description="number of images to generate")
    encoder: str | None = Field(
        None, description="image encoder: tiny (for its own world), clip-b32 or clip-l14; by base"
    )
    photos: str | None = Field(None, description="folder of the concept's photos, to measure subject fidelity")

    def drafts(self, recipe: Paint) -> Paint:
        """The recipe of all images to generate. Raises BadRecipe when more are to be kept than generated."""
        if recipe.n > self.of:
            raise BadRecipe(f"Of {self.of} images no {recipe.n} can be kept. Raise --best-of or lower -n.")
        return recipe.model_copy(update={"n": self.of})
