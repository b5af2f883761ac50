"""What teaching was asked for."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from minikin.recipes.base import MAX_SIDE, MaskKind, Recipe

BY_MODE = {  # what is not asked for: row's are measured (docs/measurements.md), gated's are the published ones
    "row": {"value_rate": 0.1, "keep": 0.2, "max_steps": 300},
    "gated": {"value_rate": 0.03, "keep": 0.0, "max_steps": 400},
}


class Teach(Recipe):
    """Teach one concept from photos."""

    name: str = Field(description="the concept's word in prompts, for example tom")
    category: str = Field(description="what kind of thing it is, for example cat")
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    mode: Literal["row", "gated"] = Field("row", description="row: value difference alone; gated: Perfusion")
    steps: int | None = Field(
        None, ge=1, le=20_000, description="fixed number of steps; by default it stops by itself"
    )
    max_steps: int = Field(
        300, ge=1, le=20_000, description="upper bound when it stops by itself; 400 in mode gated by default"
    )
    batch: int = Field(8, ge=1, le=256, description="photos per step")
    value_rate: float = Field(
        0.1, gt=0, le=10, description="learning rate of the value targets; 0.03 in mode gated by default"
    )
    keep: float = Field(
        0.2, ge=0, le=100,
        description="weight of leaving what is around the subject as it is; 0 in mode gated by default",
    )  # fmt: skip
    word_rate: float = Field(0.006, ge=0, le=10, description="learning rate of the word vectors; mode gated")
    beta: float = Field(0.75, ge=-2, le=3, description="gate: half open at this similarity; mode gated")
    tau: float = Field(0.10, ge=0.001, le=5, description="gate: softness; mode gated")
    keys: Literal["locked", "trained"] = Field(
        "locked", description="locked to the category, which is the method; trained only to compare"
    )
    positions: Literal["all", "own"] = Field(
        "all", description="which positions of a prompt the gate may open; mode gated"
    )
    mask: MaskKind = Field("attention", description="where the subject is: attention, clipseg or none")
    flip: bool = Field(True, description="also learn mirrored photos; turn off for asymmetric subjects")
    captions: str | None = Field(None, description="file with one caption a line, for C; mode gated")
    size: int | None = Field(None, ge=64, le=MAX_SIDE, description="side of the training images in pixels")
    seed: int = Field(0, ge=0, lt=2**32, description="equal seeds give equal files")
    sample_every: int = Field(100, ge=0, description="steps between sample images; 0 for none")
    preview: bool = Field(True, description="a small image of the concept inside its file")
    int8: bool | None = Field(None, description="store value differences in 8 bits; default for SDXL only")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="float32, float16 or bfloat16")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_mode(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        own = BY_MODE.get(str(values.get("mode") or "row"), {})
        return own | {k: v for k, v in values.items() if v is not None or k not in own}
