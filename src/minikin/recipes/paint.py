"""What painting was asked for, and what a concept was tuned to."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from minikin.recipes.base import MAX_SIDE, MAX_STEPS, Recipe, Share, Softness, Span, Strength, check_spans

KeyLock = Literal["local", "global"]
EngineName = Literal["eager", "compile", "openvino"]


class Tuned(Recipe):
    """What one concept is painted with where the prompt does not say."""

    strength: Strength = 1.0
    tau: Softness | None = None
    switch: Share = 0.0


def with_sides(values: Any) -> Any:
    """A recipe's fields with size="512x768" or "512" as width and height."""
    if not isinstance(values, dict) or not values.get("size"):
        return values
    sides = str(values["size"]).lower().split("x")
    if len(sides) > 2 or not all(s.strip().isdigit() for s in sides):
        raise ValueError("write the size as 512 or 512x768 (width x height)")
    return {**values, "size": None, "width": int(sides[0]), "height": int(sides[-1])}


class Paint(Recipe):
    """Paint images from a prompt."""

    prompt: str = Field(description="what to paint; <tom> stands for the concept tom")
    negative: str = Field("", description="what to keep out")
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    n: int = Field(1, ge=1, le=1000, description="how many images")
    seed: int = Field(0, ge=0, lt=2**63, description="image i uses seed + i")
    preset: str | None = Field(
        None, description="quality, lcm, lcm-lora, turbo, lightning, hyper, ...; what the base was made for"
    )
    steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="denoising steps; the preset's by default")
    guidance: float | None = Field(
        None, ge=0, le=50, description="classifier-free guidance scale; the preset's by default"
    )
    force: bool = Field(False, description="keep steps, guidance and scheduler the preset is not made for")
    scheduler: str | None = Field(
        None, description="for example 'DPM++ 2M', 'Euler a', ddim; the base's own by default"
    )
    size: str | None = Field(None, description="512 or 512x768, width x height; the base's own by default")
    width: int | None = Field(None, ge=16, le=MAX_SIDE, description="pixels, a multiple of 8")
    height: int | None = Field(None, ge=16, le=MAX_SIDE, description="pixels, a multiple of 8")
    lock: KeyLock = Field("local", description="key lock: local, or global for mode gated")
    beta: float | None = Field(
        None, ge=-2, le=3, description="gate of all concepts of mode gated: half open at this similarity"
    )
    tau: float | None = Field(None, ge=0.001, le=5, description="gate of all concepts of mode gated: softness")
    switch: float | None = Field(
        None, ge=0, le=1, description="share of the steps in which the category stands in for the concept"
    )
    interval: Span | None = Field(
        None, description="steps that are guided, as shares: 0.2-0.8; all of them by default"
    )
    points: dict[str, Tuned] | None = Field(
        None, description="concepts' operating points, in place of those in their files"
    )
    batch: int = Field(4, ge=1, le=64, description="images computed at once")
    engine: EngineName = Field("eager", description="who computes: eager (exact), compile or openvino (faster)")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="float32, float16 or bfloat16")

    @model_validator(mode="before")
    @classmethod
    def _size(cls, values: Any) -> Any:
        return with_sides(values)

    @model_validator(mode="after")
    def _multiples_of_8(self) -> Paint:
        if self.interval:
            check_spans((self.interval,))
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and value % 8:
                near = 8 * max(2, round(value / 8))
                raise ValueError(f"{name} must be divisible by 8, but it is {value}; use {near}")
        return self

    def together(self, seed: int) -> range:
        """The seeds of the batch in which the image of this seed is computed."""
        first = self.seed + (seed - self.seed) // self.batch * self.batch
        return range(first, min(first + self.batch, self.seed + self.n))
