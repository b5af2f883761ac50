"""Options of the command teach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from minikin.recipes.base import MAX_SIDE, MaskKind, Recipe

# Defaults that depend on the mode. Those of value are measured on tiny (docs/measurements.md); those of
# gated are the paper's (Tewel et al. 2023, arXiv:2305.01644).
BY_MODE: Mapping[str, Mapping[str, Any]] = {
    "value": {"value_lr": 0.1, "prior_weight": 0.2, "max_steps": 300},
    "gated": {"value_lr": 0.03, "prior_weight": 0.0, "max_steps": 400},
}
MODE_NOTES = {
    "value": "Mode value: a value-only edit without a gate. It is the default on tiny, where it measured "
    "better than the published method (mode gated).",
    "gated": "Mode gated: Perfusion as published, with the paper's hyper-parameters. It is the default for "
    "every base but tiny, until mode value has been measured there.",
}


def default_mode(base: str) -> str:
    """The mode for a base when no option names one: value for tiny, the published method for all others."""
    return "value" if base == "tiny" else "gated"


class Teach(Recipe):
    """Teach one concept from photos."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "value_rate": "value_lr", "word_rate": "word_lr", "keep": "prior_weight",
    }  # fmt: skip
    RENAMED_VALUES: ClassVar[Mapping[str, Mapping[str, str]]] = {"mode": {"row": "value"}}

    name: str = Field(description="the concept's word in prompts, for example tom")
    category: str = Field(description="what kind of thing it is, for example cat")
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    mode: Literal["value", "gated"] = Field(
        "value", description="gated: Perfusion as published; value: no gate; default gated, on tiny value"
    )
    steps: int | None = Field(
        None, ge=1, le=20_000, description="fixed number of steps; by default early stopping ends training"
    )
    max_steps: int = Field(
        300, ge=1, le=20_000, description="largest number of steps with early stopping; in mode gated 400"
    )
    batch: int = Field(8, ge=1, le=256, description="photos per step")
    value_lr: float = Field(0.1, gt=0, le=10, description="learning rate of the values; in mode gated 0.03")
    prior_weight: float = Field(
        0.2, ge=0, le=100, description="weight of prior preservation outside the mask; in mode gated 0"
    )
    word_lr: float = Field(0.006, ge=0, le=10, description="learning rate of the word vectors; mode gated")
    beta: float = Field(0.75, ge=-2, le=3, description="bias of the gate: half open at this similarity")
    tau: float = Field(0.10, ge=0.001, le=5, description="temperature of the gate; mode gated")
    keys: Literal["locked", "trained"] = Field(
        "locked", description="locked to the category, as in Perfusion; trained for comparison"
    )
    positions: Literal["all", "own"] = Field(
        "all", description="positions of a prompt where the gate may open; mode gated"
    )
    mask: MaskKind = Field("attention", description="mask of the subject: attention, clipseg or none")
    flip: bool = Field(True, description="train on mirrored photos, too; off for asymmetric subjects")
    captions: str | None = Field(
        None, description="file with one caption per line, for the covariance C; mode gated"
    )
    size: int | None = Field(None, ge=64, le=MAX_SIDE, description="side of the training images in pixels")
    seed: int = Field(0, ge=0, lt=2**32, description="random seed; equal seeds give equal files")
    sample_every: int = Field(100, ge=0, description="steps between sample images; 0 is off")
    preview: bool = Field(True, description="store a small image of the concept in its file")
    int8: bool | None = Field(None, description="store values in 8 bits; by default for SDXL")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="float32, float16 or bfloat16")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_mode(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        options = {k: v for k, v in values.items() if v is not None}
        mode = str(options.get("mode") or default_mode(str(options.get("base") or "tiny")))
        return {"mode": mode, **BY_MODE.get(mode, {}), **options}
