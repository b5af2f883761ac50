"""Write docs/options.md, the reference of all commands and options, from the command line itself.

    python -m tools.options_doc

tests/unit/test_docs.py fails when the page is older than the options.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import typer.main

from minikin.cli.app import app
from minikin.recipes import Baseline, Best, Compare, Distill, Inpaint, Paint, Recipe, Refine, Sweep, Teach

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
RECIPES: dict[str, type[Recipe]] = {
    "teach": Teach, "paint": Paint, "refine": Refine, "inpaint": Inpaint, "sweep": Sweep, "compare": Compare,
    "baseline": Baseline, "distill": Distill, "paint --best-of": Best,
}  # fmt: skip
HEAD = """# Commands and options

This page is written by `python -m tools.options_doc` from the same recipes that validate the options. The
values in brackets are defaults. In Python and in JSON an option has the same name with `_`: `--value-lr 0.1` is
`value_lr=0.1`. `minikin COMMAND --help` shows the same. `minikin train` is another name of `minikin teach`, and
`minikin generate` of `minikin paint`.
"""


def page() -> str:
    """The page's text."""
    return "\n".join([HEAD, *_group(typer.main.get_command(app), "minikin"), *_renamed()])


def _group(group: Any, name: str) -> list[str]:
    lines = []
    for command_name, command in group.commands.items():
        if command.hidden:
            continue
        full_name = f"{name} {command_name}"
        lines += _group(command, full_name) if hasattr(command, "commands") else _command(command, full_name)
    return lines


def _command(command: Any, name: str) -> list[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden and p.name != "help"]
    usage = " ".join([name, *((p.name or "").upper() for p in arguments)])
    lines = [f"## {name}", "", f"`{usage}`", "", _text(command.help or ""), ""]
    if arguments or options:
        lines += ["| | value | |", "|---|---|---|"]
        lines += [f"| {(p.name or '').upper()} | {_value(p)} | {_text(p.help or '')} |" for p in arguments]
        lines += [f"| `{_names(p)}` | {_value(p)} | {_text(p.help or '')} |" for p in options]
        lines.append("")
    return lines


def _names(option: Any) -> str:
    names = sorted(option.opts, key=len, reverse=True) + option.secondary_opts
    return "`, `".join(names)


def _value(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return ""
    if parameter.metavar:
        return _text(parameter.metavar.strip("[]").replace("|", ", "))
    annotation = parameter.type_descriptor.annotation
    choices = get_args(annotation)
    if choices and all(isinstance(c, str) for c in choices):
        return _text(", ".join(choices))
    return {"Path": "path", "str": "text", "int": "integer", "float": "number"}.get(annotation.__name__, "text")


def _text(text: str) -> str:
    """Text as Markdown: in a table, without Rich's escapes and HTML tags."""
    text = re.sub(r"\\+\[", "[", " ".join(text.split()))
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _renamed() -> list[str]:
    """The options that had another name in the version before."""
    rows, excuse = [], "<!-- word: the name of 0.1 -->"
    for command, recipe in RECIPES.items():
        rows += [f"| {command} | `{old}` | `{new}` {excuse} |" for old, new in recipe.RENAMED.items()]
        rows += [
            f"| {command} | `{option}={old}` | `{option}={new}` {excuse} |"
            for option, values in recipe.RENAMED_VALUES.items()
            for old, new in values.items()
        ]
    note = "The old name works in 0.2, and says so once: on the command line, in Python and in JSON."
    return ["## Renamed in 0.2", "", note, "", "| command | 0.1 | 0.2 |", "|---|---|---|", *rows, ""]


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
