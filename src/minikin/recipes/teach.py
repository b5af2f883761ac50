"""What teaching was asked for."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from minikin.recipes.base import MAX_SIDE, MaskKind, Recipe

ROW_RATE = 0.1  # of the value targets in mode row, which learns more slowly (docs/measurements.md)


class Teach(Recipe):
    """Teach one concept from photos."""

    name: str = Field(description="the concept's word in prompts, for example tom")
    category: str = Field(description="what kind of thing it is, for example cat")
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    mode: Literal["gated", "row"] = Field("gated", description="gated: Perfusion; row: value difference alone")
    steps: int | None = Field(
        None, ge=1, le=20_000, description="fixed number of steps; by default it stops by itself"
    )
    max_steps: int = Field(400, ge=1, le=20_000, description="upper bound when it stops by itself")
    batch: int = Field(8, ge=1, le=256, description="photos per step")
    value_rate: float = Field(
        0.03, gt=0, le=10, description="learning rate of the value targets; 0.1 in mode row by default"
    )
    word_rate: float = Field(0.006, ge=0, le=10, description="learning rate of the word vectors")
    beta: float = Field(0.75, ge=-2, le=3, description="gate: half open at this similarity, while teaching")
    tau: float = Field(0.10, gt=0, le=5, description="gate: softness, while teaching")
    keys: Literal["locked", "trained"] = Field(
        "locked", description="locked to the category, which is the method; trained only to compare"
    )
    positions: Literal["all", "own"] = Field("all", description="which positions of a prompt the gate may open")
    mask: MaskKind = Field("attention", description="where the subject is: attention, clipseg or none")
    flip: bool = Field(True, description="also learn mirrored photos; turn off for asymmetric subjects")
    captions: str | None = Field(None, description="file with one caption a line, for C")
    size: int | None = Field(None, ge=64, le=MAX_SIDE, description="side of the training pictures in pixels")
    seed: int = Field(0, ge=0, lt=2**32, description="equal seeds give equal files")
    sample_every: int = Field(100, ge=0, description="steps between sample pictures; 0 for none")
    preview: bool = Field(True, description="a small picture of the concept inside its file")
    int8: bool | None = Field(None, description="store value differences in 8 bits; default for SDXL only")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="float32, float16 or bfloat16")

    @model_validator(mode="before")
    @classmethod
    def _rate_of_the_mode(cls, values: Any) -> Any:
        """Mode row has no word to learn: its values move faster."""
        if isinstance(values, dict) and values.get("mode") == "row" and values.get("value_rate") is None:
            values = {**values, "value_rate": ROW_RATE}
        return values
