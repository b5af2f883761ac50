"""The base class of recipes, and the types of their values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from minikin.errors import BadRecipe
from minikin.limits import MAX_STRENGTH
from minikin.printable import escaped

MAX_SIDE = 4096  # px
MAX_STEPS = 1000
N_TRAIN = 1000  # timesteps that every base was trained with

FilterMode = Literal["flag", "blur", "block"]  # what happens to an image that the content filter detects
MaskKind = Literal["attention", "clipseg", "none"]


def as_list(value: Any) -> Any:
    """The list that a text like "0.6,1,1.3" means; any other value as it is."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def as_pair(value: Any) -> Any:
    """The pair that a text like "0.2-0.8" means; any other value as it is."""
    return [part.strip() for part in value.split("-")] if isinstance(value, str) else value


Listed = BeforeValidator(as_list)
Share = Annotated[float, Field(ge=0, le=1)]
Span = Annotated[tuple[Share, Share], BeforeValidator(as_pair)]  # first and last share of the denoising steps
Shares = Annotated[tuple[Share, ...], Listed]
Spans = Annotated[tuple[Span, ...], Listed]
Strength = Annotated[float, Field(ge=0, le=MAX_STRENGTH)]
Softness = Annotated[float, Field(ge=0.001, le=5)]
Scale = Annotated[float, Field(ge=0, le=50)]
WHOLE: tuple[float, float] = (0.0, 1.0)


class RenamedOption(FutureWarning):
    """An option was given by a name or value of an earlier version."""


_WARNED: set[str] = set()


def warn_renamed(old: str, new: str) -> None:
    """Warn that an option has another name now; each name once in a process."""
    if old not in _WARNED:
        _WARNED.add(old)
        warnings.warn(renamed_text(old, new), RenamedOption, stacklevel=2)


def renamed_text(old: str, new: str) -> str:
    """The note for an option, or a value, that is called otherwise since this version."""
    return f"'{old}' is called '{new}' since 0.2; the old name works in 0.2."


class Recipe(BaseModel):
    """Common behaviour: strict names, one-sentence errors, and the names that options had before.

    RENAMED         option of an earlier version -> option now, for one version. Python, JSON and the command
                    line accept both, and warn once (RenamedOption) when they meet the old one
    RENAMED_VALUES  option now -> {value of an earlier version: value now}
    """

    RENAMED: ClassVar[Mapping[str, str]] = {}
    RENAMED_VALUES: ClassVar[Mapping[str, Mapping[str, str]]] = {}

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    @classmethod
    def make(cls, /, **values: Any) -> Any:
        """Build from keyword arguments; None means "not given". Raises BadRecipe."""
        try:
            return cls(**{k: v for k, v in values.items() if v is not None})
        except ValidationError as e:
            raise BadRecipe(first_sentence(e)) from None

    @classmethod
    def current(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The options by their present names and values, without a warning: for records in files."""
        present = {cls.RENAMED.get(k, k): v for k, v in values.items() if k in cls.RENAMED}
        present |= {k: v for k, v in values.items() if k not in cls.RENAMED}
        for name, renamed in cls.RENAMED_VALUES.items():
            if isinstance(present.get(name), str):
                present[name] = renamed.get(present[name], present[name])
        return present

    @classmethod
    def option_names(cls) -> frozenset[str]:
        """Every option that is accepted, names of earlier versions included."""
        return frozenset(cls.model_fields) | frozenset(cls.RENAMED)

    @model_validator(mode="wrap")
    @classmethod
    def _present_names(cls, values: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(values, dict):
            return build(values)
        for old, new in cls.RENAMED.items():
            if old in values and new in values:
                raise ValueError(f"give {new} alone: {old} is its name of an earlier version")
            if old in values:
                warn_renamed(old, new)
        present = cls.current(values)
        for name, renamed in cls.RENAMED_VALUES.items():
            old_value = values.get(name)
            if isinstance(old_value, str) and old_value in renamed:
                warn_renamed(f"{name} {old_value}", f"{name} {renamed[old_value]}")
        return build(present)


_EXPECTED = {  # by pydantic's type of a problem
    "extra_forbidden": "not known here; leave it out, or check its spelling", "missing": "missing",
    "dict_type": "must be an object", "list_type": "must be a list", "too_short": "must not be empty",
    "string_type": "must be a text", "float_type": "must be a number", "float_parsing": "must be a number",
    "bool_type": "must be true or false", "bool_parsing": "must be true or false",
    "int_type": "must be a whole number", "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number", "int_parsing_size": "must be a whole number, and a smaller one",
}  # fmt: skip


def first_sentence(e: ValidationError) -> str:
    """The first problem of a validation, as one sentence with the option, what is expected and the value."""
    problem = e.errors(include_url=False)[0]
    names = (str(p) for p in problem["loc"] if not str(p).startswith(("list[", "dict[")))  # of a union's parts
    where = _short(escaped(".".join(names)))
    what = _EXPECTED.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    what = what.replace("Input should be greater than or equal to", "must be at least")
    what = what.replace("Input should be less than or equal to", "must be at most")
    what = what.replace("Input should be", "must be")
    value = problem.get("input") if problem["type"] != "extra_forbidden" else None
    value_text = f" (it is {_short(repr(value))})" if isinstance(value, int | float | str) else ""
    if not where:
        return f"{what[0].upper()}{what[1:]}{value_text}."
    return f"{where}: {what[0].lower()}{what[1:]}{value_text}."


def _short(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_spans(spans: tuple[tuple[float, float], ...]) -> None:
    """Raise ValueError for a guidance interval that does not increase."""
    for low, high in spans:
        if not low < high:
            raise ValueError(f"a guidance interval must increase, like 0.2-0.8, but it is {low:g}-{high:g}")
