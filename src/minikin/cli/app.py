"""The command line: each command turns its options into a recipe and calls the Studio.

Models and libraries are imported inside the commands, so that `minikin --help` is quick.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from minikin import __version__, lazy_imports
from minikin.cli import concepts, fleet, models
from minikin.cli.flags import Json, with_options, with_recipe
from minikin.cli.options import BestOfOptions, Cluster, ImageOptions, Out, Resume, ServerOptions
from minikin.cli.output import OutputLost, guarded
from minikin.errors import BadRecipe, MinikinError
from minikin.printable import escaped
from minikin.recipes import (
    Baseline,
    BaselineMethod,
    Best,
    Compare,
    Distill,
    Inpaint,
    Method,
    Paint,
    Refine,
    Sweep,
    Teach,
)
from minikin.training.signals import as_ctrl_c

app = typer.Typer(
    name="minikin", invoke_without_command=True, add_completion=False, pretty_exceptions_enable=False,
    help="Teach a text-to-image model a personal concept from a few photos, and paint it into any scene.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.add_typer(concepts.app, name="concepts")
app.add_typer(models.app, name="models")
app.add_typer(fleet.app, name="fleet")


Shell = Literal["bash", "zsh", "fish"]
COMPLETE = "_MINIKIN_COMPLETE"  # set by a shell that asks what a line may go on with


def _version(requested: bool) -> None:
    if requested:
        print(f"minikin {__version__}")
        raise typer.Exit


@app.callback()
def common(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
    no_resident: Annotated[
        bool, typer.Option("--no-resident", help="run in this process alone: start and use no resident one")
    ] = False,
) -> None:
    """Options of every command."""
    if debug:
        os.environ["MINIKIN_DEBUG"] = "1"
    if ctx.invoked_subcommand is None:  # `minikin` alone: the overview, which is no error
        print(ctx.get_help())


@app.command("help", hidden=True)
def help_(command: Annotated[list[str] | None, typer.Argument(help="the command")] = None) -> None:
    """Show the overview, or the help of a command: minikin help concepts export"""
    app([*(command or []), "--help"], prog_name="minikin")


@app.command()
def completion(shell: Annotated[Shell, typer.Argument(help="your shell")]) -> None:
    """Print what completes commands and options with Tab: eval "$(minikin completion bash)" in ~/.bashrc"""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    print(get_completion_script(prog_name="minikin", complete_var=COMPLETE, shell=shell))


@app.command("train", hidden=True)
@app.command()
@with_recipe(Teach)
def teach(
    photos: Annotated[Path, typer.Argument(help="folder with 3 to 6 photos, or one photo")],
    out: Annotated[Path | None, typer.Option(help="the concept file \\[NAME.safetensors]")] = None,
    resume: Resume = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing concept file")] = False,
    as_json: Json = False, *, values: dict[str, Any],
) -> None:  # fmt: skip
    """Teach a concept from photos: minikin teach photos/ --name tom --category cat"""
    from minikin.cli import commands

    recipe: Teach = Teach.make(**values)
    commands.advise({k for k, v in values.items() if v is not None}, recipe, as_json=as_json)
    commands.teach(photos, recipe, out, resume=resume, overwrite=overwrite, as_json=as_json)


@app.command("generate", hidden=True)
@app.command()
@with_recipe(Paint, skip=("prompt", "points"))
@with_options("best_of", BestOfOptions)
@with_options("options", ImageOptions)
def paint(
    prompt: Annotated[str, typer.Argument(help="what to paint; <tom> stands for the concept tom")],
    out: Out = Path("out"),
    as_json: Json = False, *, options: ImageOptions, best_of: BestOfOptions, values: dict[str, Any],
) -> None:  # fmt: skip
    """Paint images: minikin paint "a photo of <tom> on the beach" -n 4 --seed 7"""
    from minikin.cli import images

    recipe: Paint = Paint.make(prompt=prompt, **values)
    if best_of.best_of is not None:
        best = Best.make(of=best_of.best_of, encoder=best_of.encoder, photos=best_of.photos)
        images.paint(recipe, out, options, as_json=as_json, best=best)
    elif best_of.encoder or best_of.photos:
        raise BadRecipe("--encoder and --photos choose among drafts: say how many drafts with --best-of.")
    else:
        images.paint(recipe, out, options, as_json=as_json)


@app.command()
@with_recipe(Refine, skip=("points", "times"))
@with_options("options", ImageOptions)
def refine(
    images: Annotated[list[Path], typer.Argument(help="images to start from")],
    out: Out = Path("out"),
    as_json: Json = False, *, options: ImageOptions, values: dict[str, Any],
) -> None:  # fmt: skip
    """Paint images again from themselves: minikin refine out/draft.png --preset quality --strength 0.4"""
    from minikin.cli import images as commands

    commands.refine(images, values, out, options, as_json=as_json)


@app.command()
@with_recipe(Inpaint, skip=("prompt", "points", "size", "width", "height"))
@with_options("options", ImageOptions)
def inpaint(
    image: Annotated[Path, typer.Argument(help="the image")],
    prompt: Annotated[
        str | None, typer.Argument(help="what to paint there; the image's own prompt by default")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="image of the same size: white or transparent is painted")
    ] = None,
    out: Out = Path("out"),
    as_json: Json = False, *, options: ImageOptions, values: dict[str, Any],
) -> None:  # fmt: skip
    """Paint a part of an image: minikin inpaint out/draft.png "a photo of <tom>" --mask mask.png"""
    from minikin.cli import images

    images.inpaint(image, mask, {**values, "prompt": prompt}, out, options, as_json=as_json)


@app.command()
@with_recipe(Sweep, skip=("concept",))
def sweep(
    concept: Annotated[str, typer.Argument(help="the concept's name or file")],
    out: Annotated[
        Path | None, typer.Option(help="folder for the report, the Pareto front and the cache \\[NAME-sweep]")
    ] = None,
    as_json: Json = False, *, values: dict[str, Any],
) -> None:  # fmt: skip
    """Find a concept's best operating points and store them in its file: minikin sweep tom --preset lcm-lora"""
    from minikin.cli import sweep as commands

    commands.run(Sweep.make(concept=concept, **values), out, as_json=as_json)


@app.command()
@with_recipe(Baseline, skip=("method",))
def baseline(
    method: Annotated[BaselineMethod, typer.Argument(help="the method to compare with")],
    photos: Annotated[Path, typer.Argument(help="folder with 3 to 6 photos, or one photo")],
    out: Annotated[Path, typer.Option(help="folder for the result, checkpoint and log")],
    resume: Resume = False,
    as_json: Json = False, *, values: dict[str, Any],
) -> None:  # fmt: skip
    """Teach by another method: minikin baseline dreambooth-lora photos/ --name tom --category cat --out tom"""
    from minikin.cli import baselines

    baselines.run(photos, Baseline.make(method=method, **values), out, resume=resume, as_json=as_json)


@app.command()
@with_recipe(Compare, skip=("photos",))
def compare(
    photos: Annotated[Path, typer.Argument(help="folder with 3 to 6 photos, and others in unseen/")],
    out: Annotated[Path, typer.Option(help="folder for the report and its parts")] = Path("compare"),
    as_json: Json = False, *, values: dict[str, Any],
) -> None:  # fmt: skip
    """Compare Perfusion with other methods on the same photos: minikin compare photos/ --category cat"""
    from minikin.cli import compare as commands

    commands.run(Compare.make(photos=str(photos), **values), out, as_json=as_json)


@app.command()
@with_recipe(Distill, skip=("method",))
def distill(
    method: Annotated[Method, typer.Argument(help="lcm, lcm-lora, turbo (adversarial) or tdm (distribution)")],
    out: Annotated[Path, typer.Option(help="folder for the result, checkpoint, log and samples")],
    resume: Resume = False,
    workers: Annotated[int, typer.Option(min=1, help="processes that share every batch, one per GPU")] = 1,
    address: Cluster = None,
    as_json: Json = False, *, values: dict[str, Any],
) -> None:  # fmt: skip
    """Distil a base to 1-4 steps: minikin distill lcm-lora --base tiny --data scenes:small --out fast"""
    from minikin.cli import distill as commands

    recipe: Distill = Distill.make(method=method, **values)
    commands.start(recipe, out, workers=workers, address=address, resume=resume, as_json=as_json)


@app.command()
@with_options("options", ImageOptions, skip=("metadata",))
@with_options("server", ServerOptions)
def serve(
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="origin of web pages that may call the server; repeatable")
    ] = None,
    insecure_no_auth: Annotated[
        bool, typer.Option("--insecure-no-auth", help="accept requests from anywhere without a key")
    ] = False,
    replicas: Annotated[
        int, typer.Option(min=0, help="paint in this many processes, through Ray; one that dies is replaced")
    ] = 0,
    address: Cluster = None,
    *, server: ServerOptions, options: ImageOptions,
) -> None:  # fmt: skip
    """Serve images over HTTP: a native API, OpenAI's and A1111's."""
    from minikin.cli import serve as commands

    commands.run(
        server, options, origins=allow_origin or (), insecure=insecure_no_auth, replicas=replicas,
        address=address,
    )  # fmt: skip


@app.command()
@with_options("options", ImageOptions, skip=("metadata",))
@with_options("server", ServerOptions)
def studio(
    no_browser: Annotated[bool, typer.Option("--no-browser", help="do not open the page in a browser")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="folder that keeps the images \\[out; none where others reach the page: deleted in 24 hours]"
        ),
    ] = None,
    *, server: ServerOptions, options: ImageOptions,
) -> None:  # fmt: skip
    """Open the page: paint as you type, refine, inpaint, teach; served with the API of `minikin serve`."""
    from minikin.cli import serve as commands

    commands.run(server, options, page=True, browser=not no_browser, out=out)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="an image, or a concept's name or file")], as_json: Json = False
) -> None:
    """Show the recipe inside an image and what the image was made from, or the facts in a concept file."""
    from minikin.cli import commands

    if Path(name).suffix == ".safetensors" or not (Path(name).suffix or Path(name).exists()):
        concepts.show(name, as_json=as_json)
    else:
        commands.show(Path(name), as_json=as_json)


@app.command()
@with_options("options", ImageOptions, skip=("metadata",))
def redo(
    image: Path,
    out: Out = Path("out"),
    source: Annotated[
        list[Path] | None,
        typer.Option(help="file or folder of images it was made from; its own folder is searched in any case"),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="the base; needed where the recipe names it by a path")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="also an image that takes unusually much work")] = False,
    as_json: Json = False, *, options: ImageOptions,
) -> None:  # fmt: skip
    """Repeat an image, and the images it was made from, from the recipe inside; reports the difference."""
    from minikin.cli import images

    images.redo(image, out, options, sources=source or [], base=base, yes=yes, as_json=as_json)


@app.command()
def presets(as_json: Json = False) -> None:
    """List the presets: adapter, scheduler, steps and guidance under one name."""
    from minikin.cli import presets as commands

    commands.show(as_json=as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: versions, device, memory, models; prints one fix for each problem."""
    from minikin.cli import doctor as commands

    raise typer.Exit(commands.report(as_json=as_json))


@app.command()
def ps(as_json: Json = False) -> None:
    """List the resident processes, which make the second image from the shell quick, and what they run."""
    from minikin.cli.resident import processes

    processes.show(as_json=as_json)


@app.command()
def stop(as_json: Json = False) -> None:
    """End the resident processes, after the commands that they run."""
    from minikin.cli.resident import processes

    processes.stop(as_json=as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the images")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Teach two example concepts on the embedded model and paint them, offline."""
    from minikin.cli import demo as commands

    commands.run(out, as_json=as_json)


@cache
def command() -> Any:
    """The command line as click runs it; made once, also for the forks of a resident process."""
    from typer.main import get_command

    return get_command(app)


def main() -> None:
    """The entry point: errors become one message and an exit code, never a traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if "--debug" in sys.argv:  # before or after the command
        sys.argv.remove("--debug")
        os.environ["MINIKIN_DEBUG"] = "1"
    if not {"serve", "studio"}.intersection(sys.argv[1:2]):  # whose threads could wait for each other's imports
        lazy_imports.install()
    debug = bool(os.environ.get("MINIKIN_DEBUG"))
    if COMPLETE in os.environ:
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()
    try:
        with guarded(), as_ctrl_c():
            command()(prog_name="minikin")
    except OutputLost as e:
        if not e.quiet:
            print(f"minikin: {escaped(str(e))}", file=sys.stderr)
        sys.exit(e.exit_code)
    except MinikinError as e:
        if debug:
            raise
        print(f"minikin: {escaped(str(e))}", file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("\nminikin: interrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        if debug:
            raise
        print(
            f"minikin: something unexpected went wrong: {type(e).__name__}: {escaped(str(e))}. Run again with "
            "--debug for the traceback; please report it with the output of `minikin doctor`.",
            file=sys.stderr,
        )
        sys.exit(1)
