"""Command-line options from recipes and from groups of options: each is written down once.

`with_recipe` gives a command one option for every field of a recipe, `with_options` one for every field of a
dataclass of cli/options.py. Both know the names that options had in an earlier version (`RENAMED`): the old
option is hidden in the help, works, and prints one note.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from minikin.errors import BadRecipe
from minikin.recipes import Recipe
from minikin.recipes.base import renamed_text

Json = Annotated[bool, typer.Option("--json", help="print one JSON object per line, for programs")]
JsonOnce = Annotated[bool, typer.Option("--json", help="print JSON, for programs")]
SHORT = {"n": "-n", "seed": "-s"}
# The help lists options that no panel names first, and then these panels.
PANELS = {
    "Few steps and speed": (
        "preset", "steps", "guidance", "scheduler", "schedule", "force", "interval", "engine", "backend",
        "batch", "tile",
    ),
    "Concepts": ("lock", "beta", "tau", "switch", "concept_start", "regions", "points", "positions"),
    "Learning": (
        "keys", "max_steps", "value_lr", "prior_weight", "word_lr", "lr", "aux_lr", "rate", "side_rate",
        "warmup", "decay", "clip", "weight_decay", "ema", "accumulation", "target_ema", "loss", "huber", "skip",
        "snr", "ida", "fake_ema", "gan", "heads", "features", "distillation", "weighting", "r1", "fake",
        "times", "student_steps", "teacher_steps", "alpha",
    ),
    "While it runs": ("sample_every", "sample_minutes", "save_minutes", "preview", "half", "int8"),
    "Machine": ("device", "dtype", "autocast"),
}  # fmt: skip
_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def with_recipe(recipe: type[Recipe], skip: tuple[str, ...] = ()) -> Decorator:
    """Give a command one option for each field of `recipe`; the command receives a dict as `values`.

    An option that is not given is None in `values`, so that defaults are written in the recipe alone.
    """
    fields = {k: f for k, f in recipe.model_fields.items() if k not in skip}
    renamed = {old: new for old, new in recipe.RENAMED.items() if new in fields}
    options = [_option(recipe, name, fields[name]) for name in fields]
    options += [_option(recipe, new, fields[new], old_name=old) for old, new in renamed.items()]

    def collect(values: dict[str, Any]) -> dict[str, Any]:
        for name, new_values in recipe.RENAMED_VALUES.items():
            if (value := str(values.get(name))) in new_values:
                values[name] = new_values[value]
                _note_renamed(f"{flag(name)} {value}", f"{flag(name)} {values[name]}")
        return values

    return _with("values", options, renamed, collect)


def with_options(name: str, kind: type[Any], skip: tuple[str, ...] = ()) -> Decorator:
    """Give a command the options of the dataclass `kind`; the command receives an instance as `name`."""
    options = [p for p in inspect.signature(kind, eval_str=True).parameters.values() if p.name not in skip]
    annotations = {p.name: p.annotation for p in options}
    renamed = {old: new for old, new in getattr(kind, "RENAMED", {}).items() if new in annotations}
    for old, new in renamed.items():
        hidden: Any = Annotated[get_args(annotations[new])[0], typer.Option(flag(old), hidden=True)]
        options.append(inspect.Parameter(old, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hidden))
    return _with(name, options, renamed, lambda values: kind(**values))


def _with(
    name: str, options: list[inspect.Parameter], renamed: Mapping[str, str], collect: Callable[[Any], Any]
) -> Decorator:
    """Replace a command's parameter `name` by `options`; `collect` makes its value of theirs."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def command(**arguments: Any) -> Any:
            values = {p.name: arguments.pop(p.name) for p in options}
            for old, new in renamed.items():
                if (value := values.pop(old)) is not None:
                    if values[new] is not None:
                        raise BadRecipe(
                            f"Give {flag(new)} alone: {flag(old)} is its name of an earlier version."
                        )
                    values[new] = value
                    _note_renamed(flag(old), flag(new))
            return function(**arguments, **{name: collect(values)})

        parameters = inspect.signature(function, eval_str=True).parameters.values()
        keyword_only = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for p in (*(p for p in parameters if p.name != name), *options)
        ]
        command.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in keyword_only}
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate


def flag(name: str) -> str:
    """The option of a field: value_lr is --value-lr."""
    return "--" + name.replace("_", "-")


def _note_renamed(old: str, new: str) -> None:
    from minikin.cli import display

    display.note(renamed_text(old, new))


def _option(recipe: type[Recipe], name: str, f: FieldInfo, old_name: str = "") -> inspect.Parameter:
    """One option of the command line.

    old_name  makes the hidden, optional one that has the field's name of an earlier version
    """
    option_name = flag(old_name or name)
    is_bool = bool in (f.annotation, *get_args(f.annotation))
    names = [f"{option_name}/--no-{option_name[2:]}" if is_bool else option_name]
    if name in SHORT and not old_name:
        names.append(SHORT[name])
    text = f.description or ""
    if not f.is_required() and f.default not in (None, "", ()) and "default" not in text:
        text += f" [{shown_default(f.default)}]"
    required = f.is_required() and not old_name
    kind: Any = str if _is_list(f.annotation) else f.annotation  # lists and ranges are parsed by the recipe
    metavar = None
    if name in recipe.RENAMED_VALUES:  # values of an earlier version are accepted, and not in the help
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
    """True for a tuple type, bare, annotated or optional."""
    inner = [annotation, *get_args(annotation)]
    inner += [part for kind in inner for part in get_args(kind)]
    return any(get_origin(kind) is tuple for kind in inner)


def shown_default(default: Any) -> str:
    """A default as it is written on the command line."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        is_ranges = isinstance(default[0], tuple)
        return ",".join("-".join(f"{v:g}" for v in item) if is_ranges else f"{item:g}" for item in default)
    return str(default)
