"""Groups of options that several commands share, each a dataclass for `flags.with_options`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from minikin.images.encode import Marking
from minikin.recipes import BackendName, FilterMode

_PROVENANCE = "Provenance and content filter"  # panel of the help

Out = Annotated[Path, typer.Option(help="folder, or a .png file for one image")]
Resume = Annotated[bool, typer.Option("--resume", help="continue an earlier run from its checkpoint")]
Cluster = Annotated[str | None, typer.Option(help="address of a Ray cluster \\[this machine]")]


def _option(**settings: object) -> object:
    return typer.Option(rich_help_panel=_PROVENANCE, **settings)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ImageOptions:
    """How images are written: metadata, the XMP mark, a C2PA signature, the content filter."""

    metadata: Annotated[
        bool,
        typer.Option(
            "--metadata/--no-metadata",
            rich_help_panel=_PROVENANCE,
            help="write the recipe into images; the mark is written in any case",
        ),
    ] = True
    mark: Annotated[
        bool,
        typer.Option("--mark/--no-mark", rich_help_panel=_PROVENANCE, help="mark images as AI-generated (XMP)"),
    ] = True
    c2pa_cert: Annotated[
        Path | None,
        _option(help="certificates (PEM) that sign Content Credentials", envvar="MINIKIN_C2PA_CERT"),
    ] = None
    c2pa_key: Annotated[
        Path | None, _option(help="private key (PEM) of the certificate", envvar="MINIKIN_C2PA_KEY")
    ] = None
    filter: Annotated[
        FilterMode | None,
        _option(help="look for sexual content, and flag, blur or block it \\[off]", envvar="MINIKIN_FILTER"),
    ] = None

    def marking(self) -> Marking:
        """The marking of these options. Raises BadRecipe and BadCredentials."""
        return Marking.of(self.mark, self.c2pa_cert, self.c2pa_key)


@dataclass(frozen=True)
class BestOfOptions:
    """Choosing the best of many generated images."""

    RENAMED: ClassVar[Mapping[str, str]] = {"judge": "encoder"}  # word: the option of an earlier version

    best_of: Annotated[
        int | None, typer.Option(help="generate this many images, and keep the best -n by an image encoder")
    ] = None
    encoder: Annotated[str | None, typer.Option(help="best-of: tiny, clip-b32 or clip-l14")] = None
    photos: Annotated[
        str | None, typer.Option(help="best-of: the concept's photos, to measure subject fidelity")
    ] = None


@dataclass(frozen=True)
class ServerOptions:
    """Options of `serve` and `studio`."""

    RENAMED: ClassVar[Mapping[str, str]] = {"live_engine": "live_backend"}

    base: Annotated[str, typer.Option(help="base model: a name, folder, .safetensors file or hub id")] = "tiny"
    host: Annotated[str, typer.Option(help="address to listen on; any but this machine needs an API key")] = (
        "127.0.0.1"
    )
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 7860
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="API key that requests must carry; repeatable \\[one in MINIKIN_API_KEY]"),
    ] = None
    folder: Annotated[
        Path | None, typer.Option(help="folder of jobs, results and uploads \\[server/ in the data folder]")
    ] = None
    device: Annotated[list[str] | None, typer.Option(help="cuda, cuda:1, mps, xpu or cpu; repeatable")] = None
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16")] = None
    live_backend: Annotated[
        BackendName | None,
        typer.Option(help="inference backend of live images \\[studio: openvino, if installed]"),
    ] = None
    allow_host: Annotated[
        list[str] | None, typer.Option(help="host name the server answers to; repeatable")
    ] = None
