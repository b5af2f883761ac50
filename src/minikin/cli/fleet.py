"""The commands fleet teach and fleet paint: many concepts or prompts, on many workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minikin.cli.flags import Json, with_recipe
from minikin.errors import BadRecipe
from minikin.recipes import Paint, Teach

if TYPE_CHECKING:
    from minikin.cluster.pool import Cluster
    from minikin.events import Done, Event

SOME_FAILED = 1

app = typer.Typer(
    invoke_without_command=True, help="Teach many concepts and paint many prompts, on many workers."
)
Workers = Annotated[
    int | None,
    typer.Option(
        min=0, help="worker processes \\[one per GPU, or per four cores]; 0: this process, without Ray"
    ),
]
Address = Annotated[
    str | None, typer.Option(help="a Ray cluster: auto, HOST:PORT, ray://HOST:10001", envvar="RAY_ADDRESS")
]
Cpus = Annotated[float | None, typer.Option(help="CPUs of each worker")]
Gpus = Annotated[
    float | None, typer.Option(help="GPUs of each worker; 0.5 for two on one [1 where there are any]")
]


@app.callback()
def alone(ctx: typer.Context) -> None:
    """Teach many concepts and paint many prompts, on many workers."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


@app.command()
@with_recipe(Teach, skip=("name", "category"))
def teach(
    manifest: Annotated[Path, typer.Argument(help="CSV: photos,name,category, and options of `minikin teach`")],
    out: Annotated[Path, typer.Option(help="folder for the concepts and results.csv")] = Path("concepts"),
    workers: Workers = None, address: Address = None, cpus_each: Cpus = None, gpus_each: Gpus = None,
    as_json: Json = False, *, values: dict[str, Any],
) -> None:  # fmt: skip
    """Teach every concept of a CSV; repeat the command to resume: minikin fleet teach pets.csv --workers 4"""
    from minikin.cluster.concept_table import rows
    from minikin.cluster.teach import teach as teaching

    where = cluster(workers, address, cpus_each, gpus_each)
    done = _run(teaching(rows(manifest, values), out, where), as_json)
    f = done.facts
    if not as_json:
        _print(
            f"{done.result}  {f['taught']} taught, {f['kept']} kept, {f['failed']} failed of {f['concepts']} "
            f"in {f['seconds']:.0f} s" + (f"\n{f['sheet']}  contact sheet" if f["sheet"] else "")
        )
    if f["failed"]:
        raise typer.Exit(SOME_FAILED)


@app.command()
@with_recipe(Paint, skip=("prompt", "points", "n", "seed"))
def paint(
    prompts: Annotated[Path, typer.Argument(help='one JSON object a line: {"prompt": "...", "seed": 7}')],
    out: Annotated[  # the folder's name is that of 0.1: the same command resumes there
        Path, typer.Option(help="folder for the images and manifest.jsonl")
    ] = Path("pictures"),  # word: as in 0.1
    concepts: Annotated[
        Path | None, typer.Option(help="folder of concepts \\[this one and your library]")
    ] = None,
    chunk: Annotated[int, typer.Option(min=1, help="lines that a worker takes at once")] = 16,
    workers: Workers = None, address: Address = None, cpus_each: Cpus = None, gpus_each: Gpus = None,
    as_json: Json = False, *, values: dict[str, Any],
) -> None:  # fmt: skip
    """Paint every prompt of a file; repeat the command to resume: minikin fleet paint p.jsonl --preset turbo"""
    from minikin.cluster.paint import paint as painting
    from minikin.cluster.paint_worker import studio_engine
    from minikin.cluster.prompts import Prompts

    _refuse_filter()
    lines = Prompts(prompts, values, concepts)
    usual: Paint = Paint.make(prompt="", **{k: v for k, v in values.items() if v is not None})
    opening = partial(studio_engine, usual.base, usual.device, usual.dtype)
    where = cluster(workers, address, cpus_each, gpus_each)
    done = _run(painting(lines, out, where, opening, batch=usual.batch, chunk=chunk), as_json)
    f = done.facts
    if not as_json:
        _print(
            f"{done.result}  {f['lines']:,} lines: {f['kept']:,} kept, {f['painted']:,} images painted, "
            f"{f['failed']:,} lines failed in {f['seconds']:.0f} s"
        )
    if f["failed"]:
        raise typer.Exit(SOME_FAILED)


def cluster(
    workers: int | None, address: str | None, cpus: float | None = None, gpus: float | None = None
) -> Cluster | None:
    """The cluster to work on; None for this process. Raises BadRecipe."""
    if workers == 0:
        return None
    from minikin.cluster.pool import Cluster

    return Cluster(workers, address, cpus, gpus)


def _refuse_filter() -> None:
    """Raise BadRecipe when MINIKIN_FILTER is set: fleets do not filter."""
    if mode := os.environ.get("MINIKIN_FILTER"):
        raise BadRecipe(
            f"MINIKIN_FILTER={mode} is set, and `fleet paint` has no content filter. Paint with "
            "`minikin paint` or `minikin serve`, or unset it for this command."
        )


def _run(work: Iterator[Event], as_json: bool) -> Done:
    from minikin.cli import display

    done = display.run(work, as_json=as_json)
    if as_json:
        display.emit({"event": "done", "result": str(done.result), **done.facts})
    return done


def _print(text: str) -> None:
    from minikin.cli import display

    display.out.print(text, soft_wrap=True)
