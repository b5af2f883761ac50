"""The command line: verbs to recipes to the Studio, and nothing else.

Models and libraries are imported inside the verbs, so that `minikin --help` is quick.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from minikin import __version__
from minikin.cli import concepts, models
from minikin.cli.flags import with_recipe
from minikin.errors import BadRecipe, MinikinError
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

app = typer.Typer(
    name="minikin", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Teach a text-to-image model a personal concept from a few photos, and paint it into any scene.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.add_typer(concepts.app, name="concepts")
app.add_typer(models.app, name="models")

Metadata = Annotated[bool, typer.Option("--metadata/--no-metadata", help="recipes inside pictures")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object a line, for programs")]


def _version(asked: bool) -> None:
    if asked:
        print(f"minikin {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
) -> None:
    """Options of every verb."""
    if debug:
        os.environ["MINIKIN_DEBUG"] = "1"


@app.command()
@with_recipe(Teach)
def teach(
    photos: Annotated[Path, typer.Argument(help="folder with 3 to 6 photos, or one photo")],
    out: Annotated[Path | None, typer.Option(help="the concept file [NAME.safetensors]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on where an earlier run stopped")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a concept of that name")] = False,
    as_json: Json = False, *, values: dict[str, Any],
) -> None:  # fmt: skip
    """Teach a concept from photos: minikin teach photos/ --name tom --category cat"""
    from minikin.cli import verbs

    verbs.teach(photos, Teach.make(**values), out, resume=resume, overwrite=overwrite, as_json=as_json)


@app.command()
@with_recipe(Paint, skip=("prompt", "points"))
def paint(
    prompt: Annotated[str, typer.Argument(help="what to paint; <tom> stands for the concept tom")],
    out: Annotated[Path, typer.Option(help="folder, or a .png file for one picture")] = Path("out"),
    metadata: Metadata = True,
    best_of: Annotated[
        int | None, typer.Option(help="paint so many, and keep the -n that a judge finds best")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="best-of: tiny, clip-b32 or clip-l14")] = None,
    photos: Annotated[str | None, typer.Option(help="best-of: the concept's photos, for likeness")] = None,
    as_json: Json = False, *, values: dict[str, Any],
) -> None:  # fmt: skip
    """Paint pictures: minikin paint "a photo of <tom> on the beach" -n 4 --seed 7"""
    from minikin.cli import pictures

    if best_of is None and (judge or photos):
        raise BadRecipe("--judge and --photos choose among drafts: say of how many with --best-of.")
    best = None if best_of is None else Best.make(of=best_of, judge=judge, photos=photos)
    pictures.paint(Paint.make(prompt=prompt, **values), out, metadata=metadata, as_json=as_json, best=best)


@app.command()
@with_recipe(Refine, skip=("points", "times"))
def refine(
    pictures: Annotated[list[Path], typer.Argument(help="pictures to take up, PNG, JPEG or WebP")],
    out: Annotated[Path, typer.Option(help="folder, or a .png file for one picture")] = Path("out"),
    metadata: Metadata = True,
    as_json: Json = False, *, values: dict[str, Any],
) -> None:  # fmt: skip
    """Paint pictures again from themselves: minikin refine out/draft.png --preset quality --strength 0.4"""
    from minikin.cli import pictures as painting

    painting.refine(pictures, values, out, metadata=metadata, as_json=as_json)


@app.command()
@with_recipe(Inpaint, skip=("prompt", "points", "size", "width", "height"))
def inpaint(
    picture: Annotated[Path, typer.Argument(help="the picture, PNG, JPEG or WebP")],
    prompt: Annotated[
        str | None, typer.Argument(help="what to paint there; the picture's own prompt by default")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="picture of the same size: white or transparent is painted")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder, or a .png file for one picture")] = Path("out"),
    metadata: Metadata = True,
    as_json: Json = False, *, values: dict[str, Any],
) -> None:  # fmt: skip
    """Paint a part of a picture: minikin inpaint out/draft.png "a photo of <tom>" --mask mask.png"""
    from minikin.cli import pictures

    pictures.inpaint(picture, mask, {**values, "prompt": prompt}, out, metadata=metadata, as_json=as_json)


@app.command()
@with_recipe(Sweep, skip=("concept",))
def sweep(
    concept: Annotated[str, typer.Argument(help="the concept's name or file")],
    out: Annotated[
        Path | None, typer.Option(help="folder for the page, the front and the cache [NAME-sweep]")
    ] = None,
    as_json: Json = False, *, values: dict[str, Any],
) -> None:  # fmt: skip
    """Find a concept's best operating points and keep them in its file: minikin sweep tom --preset lcm-lora"""
    from minikin.cli import sweep as searching

    searching.run(Sweep.make(concept=concept, **values), out, as_json=as_json)


@app.command()
@with_recipe(Baseline, skip=("method",))
def baseline(
    method: Annotated[BaselineMethod, typer.Argument(help="the method to compare with")],
    photos: Annotated[Path, typer.Argument(help="folder with 3 to 6 photos, or one photo")],
    out: Annotated[Path, typer.Option(help="folder for the result, checkpoint and log")],
    resume: Annotated[bool, typer.Option("--resume", help="go on where an earlier run stopped")] = False,
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
    from minikin.cli import compare as comparing

    comparing.run(Compare.make(photos=str(photos), **values), out, as_json=as_json)


@app.command()
@with_recipe(Distill, skip=("method",))
def distill(
    method: Annotated[Method, typer.Argument(help="lcm, lcm-lora, turbo (adversarial) or tdm (distribution)")],
    out: Annotated[Path, typer.Option(help="folder for the result, checkpoint, log and samples")],
    resume: Annotated[bool, typer.Option("--resume", help="go on where an earlier run stopped")] = False,
    as_json: Json = False, *, values: dict[str, Any],
) -> None:  # fmt: skip
    """Distil a base to 1-4 steps: minikin distill lcm-lora --base tiny --data scenes:small --out fast"""
    from minikin.cli import distill as training

    training.run(Distill.make(method=method, **values), out, resume=resume, as_json=as_json)


@app.command()
def serve(
    base: Annotated[str, typer.Option(help="base model: a name, folder, .safetensors file or hub id")] = "tiny",
    host: Annotated[
        str, typer.Option(help="address to listen on; others than this machine need a key")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 7860,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="key that requests must carry; again for more clients", envvar="MINIKIN_API_KEY"),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="jobs, results and uploads [the data folder's server/]")
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="cuda, cuda:1, mps, xpu or cpu; again for more")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="a name this server answers to")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="a web page's origin that may call it")] = None,
    insecure_no_auth: Annotated[
        bool, typer.Option("--insecure-no-auth", help="listen for everybody without a key")
    ] = False,
) -> None:
    """Serve pictures over HTTP: a native API, OpenAI's and A1111's."""
    from minikin.cli import serve as serving

    serving.run(
        base=base, host=host, port=port, keys=api_key or (), folder=folder, devices=device or (), dtype=dtype,
        hosts=allow_host or (), origins=allow_origin or (), insecure=insecure_no_auth,
    )  # fmt: skip


@app.command()
def studio(
    base: Annotated[str, typer.Option(help="base model: a name, folder, .safetensors file or hub id")] = "tiny",
    host: Annotated[
        str, typer.Option(help="address to listen on; others than this machine need a key")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 7860,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="key that requests must carry; again for more clients", envvar="MINIKIN_API_KEY"),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="jobs, results and uploads [the data folder's server/]")
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="cuda, cuda:1, mps, xpu or cpu; again for more")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="a name this server answers to")] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="do not open the page in a browser")] = False,
) -> None:
    """Open the page: paint as you type, refine, inpaint, teach; served with the API of `minikin serve`."""
    from minikin.cli import serve as serving

    serving.run(
        base=base, host=host, port=port, keys=api_key or (), folder=folder, devices=device or (), dtype=dtype,
        hosts=allow_host or (), page=True, browser=not no_browser,
    )  # fmt: skip


@app.command()
def show(picture: Path, as_json: Json = False) -> None:
    """Show the recipe inside a picture."""
    from minikin.cli import verbs

    verbs.show(picture, as_json=as_json)


@app.command()
def redo(
    picture: Path,
    out: Annotated[Path, typer.Option(help="folder, or a .png file")] = Path("out"),
    source: Annotated[
        list[Path] | None, typer.Option(help="file or folder of what it was made from; its own folder anyway")
    ] = None,
    as_json: Json = False,
) -> None:
    """Paint a picture, and what it was made from, again from the recipe inside; says how much it differs."""
    from minikin.cli import pictures

    pictures.redo(picture, out, sources=source or [], as_json=as_json)


@app.command()
def presets(as_json: Json = False) -> None:
    """List the presets: adapter, scheduler, steps and guidance under one name."""
    from minikin.cli import presets as listing

    listing.show(as_json=as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: versions, device, memory, models; one repair line for each problem."""
    from minikin.cli import doctor as checks

    raise typer.Exit(checks.report(as_json=as_json))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Teach two example concepts on the embedded model and paint them, offline."""
    from minikin.cli import demo as show_case

    show_case.run(out, as_json=as_json)


def main() -> None:
    """The entry point: errors become one message and an exit code, never a traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if "--debug" in sys.argv:  # before or after the verb
        sys.argv.remove("--debug")
        os.environ["MINIKIN_DEBUG"] = "1"
    debug = bool(os.environ.get("MINIKIN_DEBUG"))
    try:
        app(prog_name="minikin")
    except MinikinError as e:
        if debug:
            raise
        print(f"minikin: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("\nminikin: interrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        if debug:
            raise
        print(
            f"minikin: something unexpected went wrong: {type(e).__name__}: {e}. Run again with --debug "
            "for the traceback; please report it with the output of `minikin doctor`.",
            file=sys.stderr,
        )
        sys.exit(1)
