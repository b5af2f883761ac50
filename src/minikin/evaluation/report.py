"""HTML reports from jinja2 templates: one self-contained file each, with its images inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from minikin.evaluation.experiment import jpeg, open_images

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **values: Any) -> str:
    """The page; values are escaped, except SVG drawings, which are given as `svg` returns them."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    environment.filters["data_uri"] = _data_uri
    return environment.get_template(template).render(**values)


def svg(drawing: bytes) -> Markup:
    """A drawing for the inside of a page, without the XML header."""
    return Markup(drawing[drawing.index(b"<svg") :].decode())


def spread(paths: Sequence[Path], n: int) -> Sequence[Path]:
    """At most n of these images, evenly: of different prompts."""
    return paths[:: max(1, len(paths) // n)][:n]


def _data_uri(path: Path, side: int | None) -> str:
    """A stored image as a data URI; with `side`, as a JPEG of at most so many px."""
    data = path.read_bytes() if side is None else jpeg(open_images([path])[0], side)
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
