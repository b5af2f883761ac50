"""What all recipes share: strict names, one-sentence errors, and the kinds of their values."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from minikin.errors import BadRecipe

MAX_SIDE = 4096  # px
MAX_STEPS = 1000
MAX_STRENGTH = 2.0  # of a concept in a prompt
POINT_NAMES = ("faithful", "balanced", "creative")  # operating points that a sweep finds
N_TRAIN = 1000  # timesteps all bases were trained with

Mode = Literal["flag", "blur", "block"]  # what becomes of an image that the content filter finds
MaskKind = Literal["attention", "clipseg", "none"]


def as_list(given: Any) -> Any:
    """ "0.6,1,1.3" as a list."""
    return [part.strip() for part in given.split(",")] if isinstance(given, str) else given


def as_pair(given: Any) -> Any:
    """ "0.2-0.8" as a pair."""
    return [part.strip() for part in given.split("-")] if isinstance(given, str) else given


Listed = BeforeValidator(as_list)
Share = Annotated[float, Field(ge=0, le=1)]
Span = Annotated[tuple[Share, Share], BeforeValidator(as_pair)]  # of an image's steps: from, up to
Shares = Annotated[tuple[Share, ...], Listed]
Spans = Annotated[tuple[Span, ...], Listed]
Strength = Annotated[float, Field(ge=0, le=MAX_STRENGTH)]
Softness = Annotated[float, Field(ge=0.001, le=5)]
Scale = Annotated[float, Field(ge=0, le=50)]
WHOLE: tuple[float, float] = (0.0, 1.0)


class Recipe(BaseModel):
    """Common behaviour: strict names, one-sentence errors."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    @classmethod
    def make(cls, /, **values: Any) -> Any:
        """Build from keyword arguments; None means "not given". Raises BadRecipe."""
        try:
            return cls(**{k: v for k, v in values.items() if v is not None})
        except ValidationError as e:
            raise BadRecipe(first_sentence(e)) from None


def first_sentence(e: ValidationError) -> str:
    """The first problem of a validation as a sentence a user can act on."""
    problem = e.errors(include_url=False)[0]
    where = ".".join(str(p) for p in problem["loc"])
    what = problem["msg"].removeprefix("Value error, ")
    what = what.replace("Input should be greater than or equal to", "must be at least")
    what = what.replace("Input should be less than or equal to", "must be at most")
    what = what.replace("Input should be", "must be")
    given = problem.get("input")
    shown = f" (it is {_short(repr(given))})" if isinstance(given, int | float | str) else ""
    if not where:
        return f"{what[0].upper()}{what[1:]}{shown}."
    return f"{where}: {what[0].lower()}{what[1:]}{shown}."


def _short(text: str) -> str:
    """Of a long one its beginning: a sentence is read by people."""
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_spans(spans: tuple[tuple[float, float], ...]) -> None:
    for low, high in spans:
        if not low < high:
            raise ValueError(f"a guidance interval goes up, as 0.2-0.8 does, but it is {low:g}-{high:g}")
