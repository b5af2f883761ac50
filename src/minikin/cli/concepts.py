"""The commands concepts list, show, check, add, remove, export and import."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from minikin.cli.flags import JsonOnce
from minikin.perfusion import operating_points

app = typer.Typer(
    invoke_without_command=True, help="List, inspect, check, export and import concepts; alone: list."
)


@app.callback()
def alone(ctx: typer.Context) -> None:
    """List, inspect, check, export and import concepts; alone: list."""
    if ctx.invoked_subcommand is None:
        list_()


@app.command("list")
def list_(
    search: Annotated[str, typer.Option(help="show concepts whose name contains this")] = "",
    category: Annotated[str, typer.Option(help="show concepts of this category")] = "",
    limit: Annotated[int, typer.Option(min=1, help="show at most this many")] = 1000,
    as_json: JsonOnce = False,
) -> None:
    """Concepts in this folder and in your library."""
    from minikin.cli import display
    from minikin.errors import MinikinError
    from minikin.perfusion import library
    from minikin.perfusion.concept_file import load

    results = library.search(search, category=category, limit=limit)
    if not results and not as_json:
        fitting = " that fits" if search or category else ""
        display.note(f"No concept{fitting} in this folder or in your library, {library.library_folder()}.")
    for name, path, *_ in results:
        try:
            facts: dict[str, Any] = _facts(load(path), path)
        except MinikinError as e:
            facts = {"name": name, "path": str(path), "problem": str(e)}
        in_library = library.path_in_library(name)
        facts["library"] = str(in_library) if in_library else None
        if as_json:
            display.emit(facts)
        elif "problem" in facts:
            display.out.print(f"{name:16} ", end="")
            display.out.print(facts["problem"], style="red", soft_wrap=True)
        else:
            display.out.print(
                f"{name:16} {facts['category']:14} {facts['architecture']:6} {facts['mode']:6} "
                f"{facts['bytes']:>8,} bytes  {path}",
                soft_wrap=True,
            )
            if in_library and in_library != path:
                display.out.print(f"{'':16} and in your library: {in_library}", soft_wrap=True)
    more = library.count(search, category=category) - len(results) if len(results) == limit else 0
    if more > 0 and not as_json:
        display.out.print(
            f"... and {more:,} more; show them with --limit, or some with --search or --category."
        )


@app.command()
def show(concept: str, as_json: JsonOnce = False) -> None:
    """Show the facts in a concept file. Give a name or a file."""
    from minikin.cli import display
    from minikin.perfusion import library
    from minikin.perfusion.concept_file import load

    path = library.resolve(concept)
    facts = _facts(load(path), path)
    if as_json:
        display.emit(facts)
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None) or "none"
        display.out.print(f"{key:14} {value}", soft_wrap=True)


@app.command()
def check(
    concept: str,
    base: Annotated[str | None, typer.Option(help="also check that it fits this base")] = None,
) -> None:
    """Check a concept file, and with --base that it fits this base."""
    from minikin.cli import display
    from minikin.perfusion import library
    from minikin.perfusion.concept_file import load

    path = library.resolve(concept)
    loaded = load(path)
    verdict = "sound"
    if base:
        from minikin.studio import Studio

        studio = Studio.open(base)
        studio.add(loaded)
        from minikin.perfusion.compatibility import OTHER_TEXT, compatibility, difference_note

        relation = compatibility(studio.base, loaded)
        verdict += f"; fits {base} ({relation if relation == OTHER_TEXT else f'{relation} base'})"
        if note := difference_note(studio.base, loaded):
            display.note(note)
    display.out.print(f"{path}: {verdict}")


@app.command()
def add(file: Annotated[Path, typer.Argument(help="a concept file")]) -> None:
    """Put a concept into your library, where every folder finds it."""
    from minikin.cli import display
    from minikin.perfusion import library

    display.out.print(f"{library.add(library.resolve(str(file)))}", soft_wrap=True)


@app.command()
def remove(name: str) -> None:
    """Take a concept out of your library."""
    from minikin.cli import display
    from minikin.perfusion import library

    display.out.print(f"{library.remove(name)} removed", soft_wrap=True)


@app.command()
def export(
    concept: str,
    to: Annotated[
        str,
        typer.Option(
            help="kohya (comfyui, a1111): a LoRA for them; peft: a LoRA for diffusers; textual-inversion"
        ),
    ] = "kohya",
    base: Annotated[
        str | None, typer.Option(help="the base it was taught on \\[its family's usual one]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the file to write")] = None,
) -> None:
    """Write a concept as an ordinary LoRA or embedding (mode gated) for other tools; says what is lost."""
    from minikin.cli import display
    from minikin.perfusion import library
    from minikin.perfusion.concept_file import load
    from minikin.perfusion.export import check_exportable, format_of
    from minikin.perfusion.export import export as write
    from minikin.studio import Studio

    to = format_of(to)
    loaded = load(library.resolve(concept))
    path = out or Path(f"{loaded.name}-{to}.safetensors")
    usual = check_exportable(loaded)
    if loaded.mode == "value" and to != "textual-inversion":
        display.note(
            "A value-only edit has no key direction: it is computed from captions now, which takes a while."
        )
    lost = write(Studio.open(base or usual).base, loaded, to, path)
    display.out.print(f"{path}  {path.stat().st_size:,} bytes\n{lost}")


@app.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(help="a textual-inversion embedding (.safetensors), or a LoRA with one in it")
    ],
    name: Annotated[str, typer.Option(help="the concept's word in prompts")],
    category: Annotated[str, typer.Option(help="what kind of thing it is")],
    base: Annotated[str, typer.Option(help="the base it was made for")] = "tiny",
    out: Annotated[Path | None, typer.Option(help="the concept file")] = None,
) -> None:
    """Make a concept of a textual-inversion embedding."""
    from minikin.cli import display
    from minikin.perfusion.export import import_embedding
    from minikin.studio import Studio

    concept = import_embedding(Studio.open(base).base, file, name, category)
    path = concept.save(out or Path(f"{name}.safetensors"))
    display.out.print(f"{path}  {path.stat().st_size:,} bytes")


def _facts(c: Any, path: Path) -> dict[str, Any]:
    """Facts to print. sha256 is that of the file, as the server and fleets have it; images record content."""
    from minikin.perfusion.concept_file import content

    return {
        "name": c.name, "path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "content": content(c), "category": c.category, "mode": c.mode,
        "architecture": c.origin.architecture, "fingerprint": c.origin.fingerprint[:16],
        "bytes": path.stat().st_size, "values": c.n_values,
        "gate": f"beta {c.gate.beta:g}, tau {c.gate.tau:g}" if c.mode == "gated" else "none",
        "points": operating_points.as_json(c.points), "licence": c.origin.licence, "recipe": c.recipe,
    }  # fmt: skip
