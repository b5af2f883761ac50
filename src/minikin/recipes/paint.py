"""Options of the command paint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from minikin.recipes.base import MAX_SIDE, MAX_STEPS, Recipe, Share, Softness, Span, Strength, check_spans

KeyLock = Literal["local", "global"]
MAX_SEED = 2**63 - 1  # what SQLite and PyTorch hold as an integer
MAX_CLIP_SKIP = 32  # layers of the largest text encoder, SDXL's second
BackendName = Literal["eager", "compile", "openvino"]


class ConceptSettings(Recipe):
    """Settings of one concept where the prompt and the options do not say: its operating point."""

    RENAMED: ClassVar[Mapping[str, str]] = {"switch": "concept_start"}

    strength: Strength = 1.0
    tau: Softness | None = None
    concept_start: Share = 0.0


def with_sides(values: Any) -> Any:
    """The options with size="512x768" or "512" as width and height."""
    if not isinstance(values, dict) or not values.get("size"):
        return values
    sides = str(values["size"]).lower().split("x")
    if len(sides) > 2 or not all(s.strip().isdigit() for s in sides):
        raise ValueError("write the size as 512 or 512x768 (width x height)")
    return {**values, "size": None, "width": int(sides[0]), "height": int(sides[-1])}


class Paint(Recipe):
    """Generate images from a prompt."""

    RENAMED: ClassVar[Mapping[str, str]] = {"switch": "concept_start", "engine": "backend"}

    prompt: str = Field(description="what to paint; <tom> stands for the concept tom")
    negative: str = Field("", description="negative prompt")
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    n: int = Field(1, ge=1, le=1000, description="number of images")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the first image; image i uses seed + i")
    preset: str | None = Field(
        None,
        description="quality, lcm, lcm-lora, turbo, lightning, hyper, ...; by default the base's",
    )
    steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="denoising steps; the preset's by default")
    guidance: float | None = Field(
        None, ge=0, le=50, description="classifier-free guidance scale; the preset's by default"
    )
    force: bool = Field(
        False,
        description="allow steps, guidance and a scheduler that the preset was not trained for, and gated "
        "concepts of another text encoder",
    )
    scheduler: str | None = Field(
        None, description="for example 'DPM++ 2M', 'Euler a', ddim; the base's by default"
    )
    schedule: str | None = Field(
        None,
        description="noise schedule (A1111's Schedule type): karras, exponential, beta, sgm-uniform, simple, "
        "normal, ddim, align-your-steps; automatic by default",
    )
    size: str | None = Field(
        None, description="512 or 512x768 (width x height) in pixels; the base's by default"
    )
    width: int | None = Field(None, ge=16, le=MAX_SIDE, description="in pixels, a multiple of 8")
    height: int | None = Field(None, ge=16, le=MAX_SIDE, description="in pixels, a multiple of 8")
    clip_skip: int = Field(
        1,
        ge=1,
        le=MAX_CLIP_SKIP,
        description="layer of the text encoder, counted from the last, as A1111's Clip skip",
    )
    lock: KeyLock = Field("local", description="key-locking: local, or global (mode gated)")
    beta: float | None = Field(
        None,
        ge=-2,
        le=3,
        description="bias of the gate of all concepts: half open at this similarity (mode gated)",
    )
    tau: float | None = Field(
        None, ge=0.001, le=5, description="temperature of the gate of all concepts (mode gated)"
    )
    concept_start: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the steps before the concept acts; until then the prompt names its category",
    )
    regions: Literal["auto", "prompt"] = Field(
        "auto",
        description="auto keeps several concepts apart, each where it is being drawn, when the prompt "
        "places none; prompt: only those in regions such as <tom@left>",
    )
    interval: Span | None = Field(
        None, description="guidance interval as shares of the steps, for example 0.2-0.8; all by default"
    )
    points: dict[str, ConceptSettings] | None = Field(
        None, description="operating points of concepts, in place of those in their files"
    )
    batch: int = Field(4, ge=1, le=64, description="images per batch")
    backend: BackendName = Field("eager", description="inference: eager (exact), compile or openvino (faster)")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="float32, float16 or bfloat16")

    @model_validator(mode="before")
    @classmethod
    def _size(cls, values: Any) -> Any:
        return with_sides(values)

    @classmethod
    def current(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        present = super().current(values)
        points = present.get("points")
        if isinstance(points, dict):
            present["points"] = {
                name: ConceptSettings.current(p) if isinstance(p, dict) else p for name, p in points.items()
            }
        return present

    @model_validator(mode="after")
    def _last_seed(self) -> Paint:
        if self.seed + self.n > MAX_SEED + 1:
            raise ValueError(
                f"the last of {self.n} images would have the seed {self.seed + self.n - 1}, and the largest is "
                f"{MAX_SEED}: choose a seed up to {MAX_SEED + 1 - self.n}"
            )
        return self

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
