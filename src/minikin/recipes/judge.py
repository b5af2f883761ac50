"""What sweeping and comparing were asked for."""

from __future__ import annotations

from typing import Annotated

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

BESIDE = "other"  # the name of a comparison's second thing


class Sweep(Recipe):
    """Find a concept's best operating points for one preset, by painting and judging."""

    concept: str = Field(description="its name or file")
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    preset: str | None = Field(None, description="whose points they will be; what the base was made for")
    steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="denoising steps; the preset's by default")
    judge: str = Field("tiny", description="who compares: tiny (its own world alone), clip-b32 or clip-l14")
    photos: str | None = Field(
        None, description="folder of the concept's photos, with others in unseen/; an example's own by default"
    )
    texts: str | None = Field(
        None, description="file with one prompt a line, {} where the thing is named; scenes by default"
    )
    prompts: int = Field(12, ge=4, le=200, description="how many prompts are painted")
    seeds: int = Field(2, ge=1, le=64, description="images of each prompt in the last round")
    strengths: Annotated[tuple[Strength, ...], Listed] = Field(
        (0.6, 0.8, 1.0, 1.3, 1.6), min_length=1, description="strengths to try"
    )
    taus: Annotated[tuple[Softness, ...], Listed] = Field(
        (0.1, 0.15, 0.25), min_length=1, description="softnesses of the gate to try; not in mode row"
    )
    guidances: Annotated[tuple[Scale, ...], Listed] | None = Field(
        None, min_length=1, description="guidance scales to try; the preset's, and with many steps 1.5 times it"
    )
    switches: Shares = Field(
        (0.0, 0.1, 0.2, 0.35), min_length=1, description="shares of the steps that the category goes first"
    )
    intervals: Spans = Field(
        (WHOLE, (0.2, 0.8)), min_length=1, description="shares of the steps that are guided: 0-1,0.2-0.8"
    )
    budget_minutes: float | None = Field(
        None, gt=0, description="try only so many settings, drawn from the grid; all by default"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of the first images; the last round has others")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="float32, float16 or bfloat16")

    @model_validator(mode="after")
    def _understood(self) -> Sweep:
        check_spans(self.intervals)
        return self


class Compare(Recipe):
    """Compare Perfusion with other methods on the same photos, by painting and judging."""

    photos: str = Field(description="folder with photos of one thing, and others of it in unseen/")
    category: str = Field(description="what kind of thing it is, for example cat")
    name: str = Field("mine", description="its word in prompts")
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    methods: str = Field(
        "all",
        description="all, ablations, or some: perfusion-row,dreambooth-lora,perfusion-row:mask=none,...",
    )
    judge: str = Field("tiny", description="who compares: tiny (its own world alone), clip-b32 or clip-l14")
    texts: str | None = Field(
        None, description="file with one prompt a line, {} where the thing is named; scenes by default"
    )
    prompts: int = Field(6, ge=2, le=200, description="how many prompts are painted")
    seeds: int = Field(2, ge=1, le=64, description="images of each prompt")
    plain: int = Field(4, ge=2, le=1000, description="images of the plain category, to measure drift")
    beside: str | None = Field(
        None, description="folder with photos of a second thing: both are painted in one image, too"
    )
    beside_category: str | None = Field(None, description="what kind of thing the second is")
    strengths: Annotated[tuple[Strength, ...], Listed] = Field(
        (0.6, 1.4), description="strengths of the front, besides 1; weights of other methods' changes"
    )
    steps: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_STEPS)], ...], Listed] = Field(
        (50, 4, 1), min_length=1, description="numbers of denoising steps; few ones by presets made for them"
    )
    presets: Annotated[tuple[str, ...], Listed] = Field(
        (), description="presets for the few steps: lcm-lora,tdm; by default the one made for each number"
    )
    teach_steps: int | None = Field(
        None, ge=1, le=20_000, description="the same number of teaching steps for all; by method"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of teaching, and of the first image of each prompt")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="float32, float16 or bfloat16")

    @model_validator(mode="after")
    def _second(self) -> Compare:
        if (self.beside is None) != (self.beside_category is None):
            raise ValueError("a second thing needs both its photos (beside) and its category (beside_category)")
        if self.name == BESIDE:
            raise ValueError(f"'{BESIDE}' is the second thing's name; choose another")
        return self


class Best(Recipe):
    """Paint more images than are wanted, and keep those a judge finds best."""

    of: int = Field(ge=1, le=1000, description="how many are painted")
    judge: str | None = Field(
        None, description="who chooses: tiny (its own world alone), clip-b32 or clip-l14; what suits the base"
    )
    photos: str | None = Field(None, description="folder of the concept's photos, to judge likeness too")

    def drafts(self, recipe: Paint) -> Paint:
        """The recipe of all that are painted. Raises BadRecipe when more are to be kept."""
        if recipe.n > self.of:
            raise BadRecipe(f"Of {self.of} images no {recipe.n} can be kept. Raise --best-of or lower -n.")
        return recipe.model_copy(update={"n": self.of})
