"""Recipes: everything one run was asked for, as data. Every default lives here.

The same models drive the command line's flags, the HTTP schema, the page's forms and the JSON
inside pictures. A recipe is checked when it is made; what is wrong is said in one sentence.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from minikin.errors import BadRecipe

MAX_SIDE = 4096  # px
MAX_STEPS = 1000
ROW_RATE = 0.1  # of the value targets in mode row (docs/measurements.md)

MaskKind = Literal["attention", "clipseg", "none"]
KeyLock = Literal["local", "global"]


class Recipe(BaseModel):
    """Common behaviour: strict names, one-sentence errors."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    @classmethod
    def make(cls, **values: Any) -> Any:
        """Build from keyword arguments; None means "not given". Raises BadRecipe."""
        try:
            return cls(**{k: v for k, v in values.items() if v is not None})
        except ValidationError as e:
            raise BadRecipe(first_sentence(e)) from None


def first_sentence(e: ValidationError) -> str:
    """The first problem of a validation as a sentence a user can act on."""
    problem = e.errors(include_url=False)[0]
    where = ".".join(str(p) for p in problem["loc"]) or "recipe"
    what = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = f" (it is {given!r})" if isinstance(given, int | float | str) else ""
    return f"{where}: {what[0].lower()}{what[1:]}{shown}."


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
        """Mode row has no word to learn and no gate to open: its values move faster."""
        if isinstance(values, dict) and values.get("mode") == "row" and values.get("value_rate") is None:
            values = {**values, "value_rate": ROW_RATE}
        return values


class Paint(Recipe):
    """Paint pictures from a prompt."""

    prompt: str = Field(description="what to paint; <tom> stands for the concept tom")
    negative: str = Field("", description="what to keep out")
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    n: int = Field(1, ge=1, le=1000, description="how many pictures")
    seed: int = Field(0, ge=0, lt=2**63, description="picture i uses seed + i")
    steps: int = Field(25, ge=1, le=MAX_STEPS, description="denoising steps")
    guidance: float | None = Field(None, ge=0, le=50, description="classifier-free guidance scale")
    scheduler: str | None = Field(
        None, description="for example 'DPM++ 2M', 'Euler a', ddim; the base's own by default"
    )
    size: str | None = Field(None, description="512 or 512x768, width x height; the base's own by default")
    width: int | None = Field(None, ge=16, le=MAX_SIDE, description="pixels, a multiple of 8")
    height: int | None = Field(None, ge=16, le=MAX_SIDE, description="pixels, a multiple of 8")
    lock: KeyLock = Field("local", description="key lock: local or global")
    beta: float | None = Field(
        None, ge=-2, le=3, description="gate of all concepts: half open at this similarity"
    )
    tau: float | None = Field(None, gt=0, le=5, description="gate of all concepts: softness")
    batch: int = Field(4, ge=1, le=64, description="pictures computed at once")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="float32, float16 or bfloat16")

    @model_validator(mode="before")
    @classmethod
    def _size(cls, values: Any) -> Any:
        """size="512x768" or "512" sets width and height."""
        if isinstance(values, dict) and values.get("size"):
            sides = str(values["size"]).lower().split("x")
            if len(sides) > 2 or not all(s.strip().isdigit() for s in sides):
                raise ValueError("write the size as 512 or 512x768 (width x height)")
            width, height = int(sides[0]), int(sides[-1])
            values = {**values, "size": None, "width": width, "height": height}
        return values

    @model_validator(mode="after")
    def _multiples_of_8(self) -> Paint:
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and value % 8:
                near = 8 * max(2, round(value / 8))
                raise ValueError(f"{name} must be divisible by 8, but it is {value}; use {near}")
        return self
