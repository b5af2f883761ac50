"""Recipes to command-line flags: every field of a recipe becomes an option, help text and all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from minikin.errors import BadRecipe
from minikin.recipes import Recipe
from minikin.recipes.base import renamed_text

Json = Annotated[bool, typer.Option("--json", help="one JSON object a line, for programs")]
JsonOnce = Annotated[bool, typer.Option("--json", help="JSON, for programs")]
SHORT = {"n": "-n", "seed": "-s"}
# Help in groups: the usual first, then these, each option once; what is not named is usual
PANELS = {
    "Few steps and speed": (
        "preset", "steps", "guidance", "scheduler", "force", "interval", "engine", "batch", "tile",
    ),
    "Concepts": ("lock", "beta", "tau", "switch", "points", "positions"),
    "Learning": (
        "keys", "max_steps", "value_rate", "keep", "word_rate", "rate", "side_rate", "warmup", "decay", "clip",
        "weight_decay", "ema", "accumulation", "target_ema", "loss", "huber", "skip", "snr", "ida", "gan",
        "heads", "features", "distillation", "weighting", "r1", "fake", "times", "student_steps",
        "teacher_steps", "alpha",
    ),
    "On the way": ("sample_every", "sample_minutes", "save_minutes", "preview", "half", "int8"),
    "Machine": ("device", "dtype", "autocast"),
}  # fmt: skip
_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}


def with_recipe(recipe: type[Recipe], skip: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Give a command one option for each field of `recipe`; it receives them as `values`.

    Options that are not given are None in `values`, so that defaults live in the recipe alone.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        extra = [
            p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "values"
        ]
        fields = {k: f for k, f in recipe.model_fields.items() if k not in skip}
        renamed = {old: new for old, new in recipe.RENAMED.items() if new in fields}

        def command(**arguments: Any) -> Any:
            old_values = {old: arguments.pop(old) for old in renamed}
            values = {k: arguments.pop(k) for k in fields}
            for old, new in renamed.items():
                if old_values[old] is not None:
                    _use_renamed(values, old, new, old_values[old])
            for name, new_values in recipe.RENAMED_VALUES.items():
                if (value := str(values.get(name))) in new_values:
                    values[name] = new_values[value]
                    _note_renamed(f"{_flag(name)} {value}", f"{_flag(name)} {values[name]}")
            return function(**arguments, values=values)

        options = [_option(recipe, name, fields[name]) for name in fields]
        options += [_option(recipe, new, fields[new], old_name=old) for old, new in renamed.items()]
        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*extra, *options)]
        command.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in keyword_only}
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate


def _use_renamed(values: dict[str, Any], old: str, new: str, value: Any) -> None:
    """Read an option by the name of an earlier version, and say so."""
    if values[new] is not None:
        raise BadRecipe(f"Give {_flag(new)} alone: {_flag(old)} is its name of an earlier version.")
    values[new] = value
    _note_renamed(_flag(old), _flag(new))


def _note_renamed(old: str, new: str) -> None:
    from minikin.cli import display

    display.note(renamed_text(old, new))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _option(recipe: type[Recipe], name: str, f: FieldInfo, old_name: str = "") -> inspect.Parameter:
    """One option of the command line.

    old_name  makes the hidden, optional one that has the field's name of an earlier version
    """
    flag = _flag(old_name or name)
    is_bool = bool in (f.annotation, *get_args(f.annotation))
    names = [f"{flag}/--no-{flag[2:]}" if is_bool else flag]
    if name in SHORT and not old_name:
        names.append(SHORT[name])
    text = f.description or ""
    if not f.is_required() and f.default not in (None, "", ()):
        text += f" [{_shown(f.default)}]"
    required = f.is_required() and not old_name
    kind: Any = str if _is_list(f.annotation) else f.annotation  # lists and spans are read by the recipe
    metavar = None
    if name in recipe.RENAMED_VALUES:  # the values of an earlier version are accepted, and not in the help
        metavar = f"[{'|'.join(get_args(f.annotation))}]"
        kind = Literal[(*get_args(f.annotation), *recipe.RENAMED_VALUES[name])]
    annotation = kind if required else kind | None
    option = typer.Option(
        *names, help=escape(text), show_default=False, rich_help_panel=_PANEL_OF.get(name), metavar=metavar,
        hidden=bool(old_name),
    )  # fmt: skip
    return inspect.Parameter(
        old_name or name,
        inspect.Parameter.KEYWORD_ONLY,
        default=... if required else None,
        annotation=Annotated[annotation, option],
    )


def _is_list(annotation: Any) -> bool:
    """Whether it is a tuple, bare, annotated or optional."""
    inner = [annotation, *get_args(annotation)]
    inner += [part for one in inner for part in get_args(one)]
    return any(get_origin(one) is tuple for one in inner)


def _shown(default: Any) -> str:
    """A default as it would be written on the command line."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        inner = isinstance(default[0], tuple)
        return ",".join("-".join(f"{v:g}" for v in one) if inner else f"{one:g}" for one in default)
    return str(default)
