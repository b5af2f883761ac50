"""Metadata of images: A1111's `parameters` text, which many tools read, and Minikin's JSON record.

A PNG carries both as text chunks. `read` also reads images of A1111, Forge, Fooocus and every other tool that
writes a `parameters` text.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minikin import __version__
from minikin.errors import BadPhoto, reason
from minikin.images.xmp import source_type_of

JSON_KEY = "minikin"
MAX_TEXT = 100_000  # characters; a text in a PNG may have megabytes
# A1111's grammar. Keys have a bounded length and follow a comma, so that matching takes linear time.
_PAIR = re.compile(r'(?:^|(?<=,))\s*(\w[\w \-/]{1,79}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@dataclass(frozen=True)
class Recorded:
    """Metadata of an image.

    recipe                      Minikin's JSON record; {} for images of other tools
    prompt, negative, settings  from the `parameters` text
    source_type                 IPTC's code of the mark (images/xmp.py); None without a mark
    """

    recipe: dict[str, Any]
    prompt: str = ""
    negative: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    source_type: str | None = None


def parameters_text(prompt: str, negative: str, settings: dict[str, Any]) -> str:
    """A1111's infotext: prompt, negative prompt, then `Key: value` pairs, Steps first."""
    lines = [prompt]
    if negative:
        lines.append(f"Negative prompt: {negative}")
    lines.append(", ".join(f"{k}: {_quoted(v)}" for k, v in settings.items() if v not in (None, "")))
    return "\n".join(lines)


def parse_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """The inverse of `parameters_text`: prompt, negative prompt, settings."""
    *lines, last = text.strip().split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < 3:  # A1111's rule: fewer are part of the prompt
        lines, pairs = [*lines, last], []
    prompt: list[str] = []
    negative: list[str] = []
    target = prompt
    for line in lines:
        if line.startswith("Negative prompt:"):
            target = negative
        target.append(line.removeprefix("Negative prompt:").lstrip() if target is negative else line)
    return "\n".join(prompt), "\n".join(negative), {k: _unquoted(v) for k, v in pairs}


def png_info(recipe: dict[str, Any], prompt: str, negative: str, settings: dict[str, Any]) -> PngInfo:
    """The text chunks of a PNG, shortened to what `read` accepts."""
    info = PngInfo()
    recipe = bounded({"version": __version__, **recipe})
    info.add_text("parameters", parameters_text(prompt, negative, settings))
    info.add_itxt(JSON_KEY, json.dumps(recipe, ensure_ascii=False))
    return info


def bounded(recipe: dict[str, Any], most: int = MAX_TEXT) -> dict[str, Any]:
    """The record in at most `most` characters: records of the farthest ancestors are left out.

    The last ancestor that is named keeps its name and hashes, and `left_out` marks its missing record.
    """
    while len(json.dumps(recipe, ensure_ascii=False)) > most and (depth := _ancestors(recipe)) > 0:
        recipe = _without(recipe, depth)
    return recipe


def _ancestors(recipe: dict[str, Any]) -> int:
    """Number of ancestors whose records are in this record."""
    n = 0
    while "made" in (parent := recipe.get("parent", {})):
        n, recipe = n + 1, parent["made"]
    return n


def _without(recipe: dict[str, Any], depth: int) -> dict[str, Any]:
    """The record without that of the ancestor `depth` images before."""
    parent = recipe["parent"]
    if depth > 1:
        return {**recipe, "parent": {**parent, "made": _without(parent["made"], depth - 1)}}
    return {**recipe, "parent": {k: v for k, v in parent.items() if k != "made"} | {"left_out": True}}


def read(path: str | Path) -> Recorded:
    """Metadata of an image file. Raises BadPhoto if it is not an image, or has no metadata or too much."""
    path = Path(path)
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            texts = texts_of(image)
            if "parameters" not in texts and (comment := _exif_comment(image)):
                texts["parameters"] = comment
            source_type = source_type_of(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise BadPhoto(f"{path} cannot be read as an image: {reason(e)}.") from e
    return recorded(texts, str(path), source_type)


def texts_of(image: Image.Image) -> dict[str, str]:
    """Text chunks of an image by key."""
    return {k: v for k, v in image.info.items() if isinstance(k, str) and isinstance(v, str)}


def recorded(texts: dict[str, str], name: str = "The image", source_type: str | None = None) -> Recorded:
    """Metadata from the text chunks of an image. Raises BadPhoto if there is none, or too much.

    source_type  of the mark; with one, an image may have no recipe
    """
    longest = max(len(texts.get(k, "")) for k in (JSON_KEY, "parameters"))
    if longest > MAX_TEXT:
        raise BadPhoto(
            f"{name} carries a recipe of {longest:,} characters; at most {MAX_TEXT:,} are read. Minikin "
            "does not write such images."
        )
    recipe: Any = {}
    with suppress(ValueError, RecursionError):
        recipe = json.loads(texts.get(JSON_KEY, "{}"))
    if not isinstance(recipe, dict) or not isinstance(recipe.get("recipe", {}), dict):
        recipe = {}
    if not recipe and "parameters" not in texts and source_type is None:
        raise BadPhoto(
            f"{name} carries no recipe. It was made with --no-metadata or by another program, or its "
            "metadata was removed."
        )
    prompt, negative, settings = parse_parameters(texts.get("parameters", ""))
    return Recorded(recipe, prompt, negative, settings, source_type)


def _exif_comment(image: Image.Image) -> str:
    """EXIF UserComment (JPEG, WebP) in any encoding that tools write."""
    raw = image.getexif().get_ifd(0x8769).get(0x9286, b"")
    if isinstance(raw, str):
        return raw
    head, body = bytes(raw[:8]), bytes(raw[8:])
    if head.startswith(b"UNICODE"):
        big = body[:1] == b"\0" or body[:2] == b"\xfe\xff"
        return body.decode("utf-16-be" if big else "utf-16-le", errors="replace").lstrip("\ufeff")
    return body.decode("utf-8", errors="replace").strip("\0")


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n\"]", text) else text


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text
