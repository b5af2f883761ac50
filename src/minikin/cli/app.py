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
from minikin.cli import concepts, fleet, models
from minikin.cli.flags import Json, with_recipe
from minikin.errors import BadRecipe, MinikinError
from minikin.images.encode import Marking
from minikin.recipes import (
    Baseline,
    BaselineMethod,
    Best,
    Compare,
    Distill,
    EngineName,
    Inpaint,
    Method,
    Mode,
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
app.add_typer(fleet.app, name="fleet")

_MADE = "Origin and filter"  # the help's group
Metadata = Annotated[
    bool, typer.Option("--metadata/--no-metadata", help="recipes inside images; the mark stays without")
]
Mark = Annotated[
    bool,
    typer.Option("--mark/--no-mark", help="mark images as made by a model (XMP)", rich_help_panel=_MADE),
]
Certificate = Annotated[
    Path | None,
    typer.Option(
        help="sign Content Credentials (C2PA): certificates, PEM", envvar="MINIKIN_C2PA_CERT",
        rich_help_panel=_MADE,
    ),
]  # fmt: skip
Key = Annotated[
    Path | None,
    typer.Option(help="... and the private key, PEM", envvar="MINIKIN_C2PA_KEY", rich_help_panel=_MADE),
]
Filter = Annotated[
    Mode | None,
    typer.Option(
        help="look for sexual content, and flag, blur or block it \\[off]", envvar="MINIKIN_FILTER",
        rich_help_panel=_MADE,
    ),
]  # fmt: skip


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
    from minikin.cli import commands

    recipe: Teach = Teach.make(**values)
    commands.advise({k for k, v in values.items() if v is not None}, recipe, as_json=as_json)
    commands.teach(photos, recipe, out, resume=resume, overwrite=overwrite, as_json=as_json)


@app.command()
@with_recipe(Paint, skip=("prompt", "points"))
def paint(
    prompt: Annotated[str, typer.Argument(help="what to paint; <tom> stands for the concept tom")],
    out: Annotated[Path, typer.Option(help="folder, or a .png file for one image")] = Path("out"),
    metadata: Metadata = True, mark: Mark = True, c2pa_cert: Certificate = None, c2pa_key: Key = None,
    filter: Filter = None,
    best_of: Annotated[
        int | None, typer.Option(help="paint so many, and keep the -n that a judge finds best")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="best-of: tiny, clip-b32 or clip-l14")] = None,
    photos: Annotated[str | None, typer.Option(help="best-of: the concept's photos, for likeness")] = None,
    as_json: Json = False, *, values: dict[str, Any],
) -> None:  # fmt: skip
    """Paint images: minikin paint "a photo of <tom> on the beach" -n 4 --seed 7"""
    from minikin.cli import images

    if best_of is None and (judge or photos):
        raise BadRecipe("--judge and --photos choose among drafts: say of how many with --best-of.")
    best = None if best_of is None else Best.make(of=best_of, judge=judge, photos=photos)
    giving = images.Giving(metadata, Marking.of(mark, c2pa_cert, c2pa_key), filter)
    images.paint(Paint.make(prompt=prompt, **values), out, giving, as_json=as_json, best=best)


@app.command()
@with_recipe(Refine, skip=("points", "times"))
def refine(
    pictures: Annotated[list[Path], typer.Argument(help="images to take up, PNG, JPEG or WebP")],
    out: Annotated[Path, typer.Option(help="folder, or a .png file for one image")] = Path("out"),
    metadata: Metadata = True, mark: Mark = True, c2pa_cert: Certificate = None, c2pa_key: Key = None,
    filter: Filter = None,
    as_json: Json = False, *, values: dict[str, Any],
) -> None:  # fmt: skip
    """Paint images again from themselves: minikin refine out/draft.png --preset quality --strength 0.4"""
    from minikin.cli import images as painting

    giving = painting.Giving(metadata, Marking.of(mark, c2pa_cert, c2pa_key), filter)
    painting.refine(pictures, values, out, giving, as_json=as_json)


@app.command()
@with_recipe(Inpaint, skip=("prompt", "points", "size", "width", "height"))
def inpaint(
    picture: Annotated[Path, typer.Argument(help="the image, PNG, JPEG or WebP")],
    prompt: Annotated[
        str | None, typer.Argument(help="what to paint there; the image's own prompt by default")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="image of the same size: white or transparent is painted")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder, or a .png file for one image")] = Path("out"),
    metadata: Metadata = True, mark: Mark = True, c2pa_cert: Certificate = None, c2pa_key: Key = None,
    filter: Filter = None,
    as_json: Json = False, *, values: dict[str, Any],
) -> None:  # fmt: skip
    """Paint a part of an image: minikin inpaint out/draft.png "a photo of <tom>" --mask mask.png"""
    from minikin.cli import images

    giving = images.Giving(metadata, Marking.of(mark, c2pa_cert, c2pa_key), filter)
    images.inpaint(picture, mask, {**values, "prompt": prompt}, out, giving, as_json=as_json)


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
    workers: Annotated[int, typer.Option(min=1, help="processes that share every batch, one a GPU")] = 1,
    address: Annotated[str | None, typer.Option(help="the Ray cluster of the workers \\[this machine]")] = None,
    as_json: Json = False, *, values: dict[str, Any],
) -> None:  # fmt: skip
    """Distil a base to 1-4 steps: minikin distill lcm-lora --base tiny --data scenes:small --out fast"""
    from minikin.cli import distill as training

    recipe: Distill = Distill.make(method=method, **values)
    training.start(recipe, out, workers=workers, address=address, resume=resume, as_json=as_json)


# what `serve` and `studio` are both told
ServedBase = Annotated[str, typer.Option(help="base model: a name, folder, .safetensors file or hub id")]
Host = Annotated[str, typer.Option(help="address to listen on; others than this machine need a key")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")]
Keys = Annotated[
    list[str] | None,
    typer.Option(help="key that requests must carry; again for more clients", envvar="MINIKIN_API_KEY"),
]
Jobs = Annotated[Path | None, typer.Option(help="jobs, results and uploads \\[the data folder's server/]")]
Devices = Annotated[list[str] | None, typer.Option(help="cuda, cuda:1, mps, xpu or cpu; again for more")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16")]
Names = Annotated[list[str] | None, typer.Option(help="a name this server answers to")]
LiveEngine = Annotated[
    EngineName | None, typer.Option(help="who computes what is painted live \\[studio: openvino, if installed]")
]


@app.command()
def serve(
    base: ServedBase = "tiny", host: Host = "127.0.0.1", port: Port = 7860, api_key: Keys = None,
    folder: Jobs = None, device: Devices = None, dtype: Dtype = None, live_engine: LiveEngine = None,
    allow_host: Names = None, mark: Mark = True, c2pa_cert: Certificate = None, c2pa_key: Key = None,
    filter: Filter = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="a web page's origin that may call it")] = None,
    insecure_no_auth: Annotated[
        bool, typer.Option("--insecure-no-auth", help="listen for everybody without a key")
    ] = False,
    replicas: Annotated[
        int, typer.Option(min=0, help="paint in so many processes, through Ray; one that dies is replaced")
    ] = 0,
    address: Annotated[
        str | None, typer.Option(help="the Ray cluster of the replicas \\[this machine]")
    ] = None,
) -> None:  # fmt: skip
    """Serve images over HTTP: a native API, OpenAI's and A1111's."""
    from minikin.cli import serve as serving

    serving.run(
        base=base, host=host, port=port, keys=api_key or (), folder=folder, devices=device or (), dtype=dtype,
        hosts=allow_host or (), origins=allow_origin or (), insecure=insecure_no_auth, live_engine=live_engine,
        marking=Marking.of(mark, c2pa_cert, c2pa_key), filter=filter,
        replicas=replicas, address=address,
    )  # fmt: skip


@app.command()
def studio(
    base: ServedBase = "tiny", host: Host = "127.0.0.1", port: Port = 7860, api_key: Keys = None,
    folder: Jobs = None, device: Devices = None, dtype: Dtype = None, live_engine: LiveEngine = None,
    allow_host: Names = None, mark: Mark = True, c2pa_cert: Certificate = None, c2pa_key: Key = None,
    filter: Filter = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="do not open the page in a browser")] = False,
) -> None:  # fmt: skip
    """Open the page: paint as you type, refine, inpaint, teach; served with the API of `minikin serve`."""
    from minikin.cli import serve as serving

    serving.run(
        base=base, host=host, port=port, keys=api_key or (), folder=folder, devices=device or (), dtype=dtype,
        hosts=allow_host or (), live_engine=live_engine, page=True, browser=not no_browser,
        marking=Marking.of(mark, c2pa_cert, c2pa_key), filter=filter,
    )  # fmt: skip


@app.command()
def show(
    what: Annotated[str, typer.Argument(help="an image, or a concept's name or file")], as_json: Json = False
) -> None:
    """Show the recipe inside an image, what it was made from and with; or what a concept says of itself."""
    from minikin.cli import commands

    if Path(what).suffix == ".safetensors" or not (Path(what).suffix or Path(what).exists()):
        concepts.show(what, as_json=as_json)
    else:
        commands.show(Path(what), as_json=as_json)


@app.command()
def redo(
    picture: Path,
    out: Annotated[Path, typer.Option(help="folder, or a .png file")] = Path("out"),
    source: Annotated[
        list[Path] | None, typer.Option(help="file or folder of what it was made from; its own folder anyway")
    ] = None,
    mark: Mark = True, c2pa_cert: Certificate = None, c2pa_key: Key = None, filter: Filter = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Paint an image, and what it was made from, again from the recipe inside; says how much it differs."""
    from minikin.cli import images

    giving = images.Giving(marking=Marking.of(mark, c2pa_cert, c2pa_key), filter=filter)
    images.redo(picture, out, giving, sources=source or [], as_json=as_json)


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
    out: Annotated[Path, typer.Option(help="folder for the images")] = Path("demo"),
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
