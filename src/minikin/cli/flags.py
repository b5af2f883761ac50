"""Recipes to command-line flags: every field of a recipe becomes an option, help text and all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo

from minikin.recipes import Recipe

SHORT = {"n": "-n", "seed": "-s"}


def with_recipe(recipe: type[Recipe], skip: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Give a command one option for each field of `recipe`; it receives them as `values`.

    Options that are not given are None in `values`, so that defaults live in the recipe alone.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "values"]
        fields = {k: f for k, f in recipe.model_fields.items() if k not in skip}

        def command(**given: Any) -> Any:
            values = {k: given.pop(k) for k in fields}
            return function(**given, values=values)

        options = [_option(name, f) for name, f in fields.items()]
        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *options)]
        command.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in keyword_only}
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate


def _option(name: str, f: FieldInfo) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    is_bool = bool in (f.annotation, *get_args(f.annotation))
    names = [f"{flag}/--no-{flag[2:]}" if is_bool else flag]
    if name in SHORT:
        names.append(SHORT[name])
    text = f.description or ""
    if not f.is_required() and f.default not in (None, ""):
        shown = f.default if not isinstance(f.default, bool) else ("on" if f.default else "off")
        text += f" [{shown}]"
    required = f.is_required()
    annotation = f.annotation if required else f.annotation | None  # type: ignore[operator]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=... if required else None,
        annotation=Annotated[annotation, typer.Option(*names, help=text, show_default=False)],
    )  # fmt: skip
