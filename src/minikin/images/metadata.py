"""Metadata of images: A1111's `parameters` text, which many tools read, and Minikin's JSON record.

A PNG carries both as text chunks. `read` also reads images of A1111, Forge, ComfyUI, Fooocus, SwarmUI,
InvokeAI, NovelAI and others, in PNG, JPEG, WebP and AVIF.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minikin import __version__, strict_json
from minikin.errors import BadPhoto
from minikin.images import other_tools, texts
from minikin.images.photos import read_image

JSON_KEY = texts.RECORD
MAX_TEXT = 100_000  # characters; a text in a PNG may have megabytes
MAX_ANCESTORS = 50  # whose records an image keeps
MAX_DEPTH = 2 * MAX_ANCESTORS + 20  # of brackets: two for each ancestor
# A1111's grammar. Keys have a bounded length and follow a comma, so that matching takes linear time.
_PAIR = re.compile(r'(?:^|(?<=,))\s*(\w[\w \-/]{1,79}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_STEPS = re.compile(r"(?:^|(?<=[\s,]))Steps: *\d")
_NEGATIVE = "Negative prompt:"


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
    """The inverse of `parameters_text`: prompt, negative prompt, settings.

    The settings' line is found also where extensions wrote lines behind it, and where line breaks were lost.
    """
    lines = text.replace("\r\n", "\n").strip().split("\n")
    at, before, pairs = _settings_line(lines)
    prompt: list[str] = []
    negative: list[str] = []
    target = prompt
    prompt_lines = [*lines[:at], *([before] if before else [])]
    for k, line in enumerate(prompt_lines):
        if line.startswith(_NEGATIVE):
            target = negative
        elif (
            before and k == len(prompt_lines) - 1 and target is prompt and f" {_NEGATIVE}" in line
        ):  # all in one line
            line, _, avoided = line.partition(f" {_NEGATIVE}")
            negative.append(avoided.strip())
        target.append(line.removeprefix(_NEGATIVE).lstrip() if target is negative else line)
    settings = {k: _unquoted(v) for k, v in pairs}
    for line in lines[at + 1 :]:  # "Template: a {cat|dog}"
        key, _, value = line.partition(": ")
        if value and len(key) < 80:
            settings.setdefault(key, value)
    return "\n".join(prompt), "\n".join(negative), settings


def _settings_line(lines: list[str]) -> tuple[int, str, list[tuple[str, str]]]:
    """The settings' line: its number, what precedes the settings in it, and their pairs.

    Without settings the number is that of a line after the last.
    """
    for at in range(len(lines) - 1, -1, -1):
        if lines[at].lstrip().startswith("Steps:") and len(pairs := _PAIR.findall(lines[at])) > 1:
            return at, "", pairs
    if len(pairs := _PAIR.findall(lines[-1])) > 2 and not _STEPS.search(
        lines[-1]
    ):  # A1111's rule: fewer are prompt
        return len(lines) - 1, "", pairs
    for at in range(len(lines) - 1, -1, -1):
        begins = [m.start() for m in _STEPS.finditer(lines[at])]
        if begins and len(pairs := _PAIR.findall(lines[at][begins[-1] :])) > 2:
            return at, lines[at][: begins[-1]].rstrip(" ,"), pairs
    return len(lines), "", []


def png_info(recipe: dict[str, Any], prompt: str, negative: str, settings: dict[str, Any]) -> PngInfo:
    """The text chunks of a PNG, shortened to what `read` accepts."""
    info = PngInfo()
    recipe = bounded({"version": __version__, **recipe})
    info.add_text("parameters", parameters_text(prompt, negative, settings))
    info.add_itxt(JSON_KEY, json.dumps(recipe, ensure_ascii=False))
    return info


def bounded(recipe: dict[str, Any], most: int = MAX_TEXT) -> dict[str, Any]:
    """The record in at most `most` characters and ancestors; records of the farthest are left out.

    The last ancestor that is named keeps its name and hashes, and `left_out` marks its missing record.
    """
    while (depth := _ancestors(recipe)) > MAX_ANCESTORS:
        recipe = _without(recipe, depth)
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
    decoded = read_image(Path(path))
    return recorded(decoded.texts, str(path), decoded.origin)


def texts_of(image: Image.Image) -> dict[str, str]:
    """Texts of an image that record how it was made, by key."""
    return texts.texts_of(image)


def recorded(texts: Mapping[str, str], name: str = "The image", source_type: str | None = None) -> Recorded:
    """Metadata from the texts of an image. Raises BadPhoto if there is none, or too much.

    source_type  of the mark; with one, an image may have no recipe
    """
    longest = max(len(texts.get(k, "")) for k in (JSON_KEY, "parameters"))
    if longest > MAX_TEXT:
        raise BadPhoto(
            f"{name} carries a recipe of {longest:,} characters; at most {MAX_TEXT:,} are read. Minikin "
            "does not write such images."
        )
    recipe = _own_record(texts.get(JSON_KEY, "{}"))
    if infotext := infotext_of(texts):
        return Recorded(recipe, *parse_parameters(infotext), source_type)
    record = other_tools.read(texts)
    if record is not None:
        return Recorded(recipe, record.prompt, record.negative, record.settings, source_type)
    if not recipe and source_type is None:
        others = sorted(set(texts) - {"Software", "Comment", "seed", "width", "height"})
        unread = f" What it carries ({', '.join(others)}) is not understood." if others else ""
        raise BadPhoto(
            f"{name} carries no recipe. It was made with --no-metadata or by another program, or its "
            f"metadata was removed.{unread}"
        )
    return Recorded(recipe, source_type=source_type)


def recorded_or_none(texts: Mapping[str, str]) -> Recorded | None:
    """Metadata from the texts of an image; None for none, or too much."""
    try:
        return recorded(texts)
    except BadPhoto:
        return None


def infotext_of(texts: Mapping[str, str]) -> str:
    """A1111's infotext as it is in the texts of an image; "" for none, and for the JSON of other tools."""
    text = texts.get("parameters", "")
    return "" if text.lstrip().startswith(("{", "[")) else text


def _own_record(text: str) -> dict[str, Any]:
    """Minikin's record; {} for one that is none."""
    try:
        record = strict_json.loads(text, kind=dict, max_bytes=4 * MAX_TEXT, max_depth=MAX_DEPTH)
    except strict_json.BadJson:
        return {}
    return record if isinstance(record.get("recipe", {}), dict) else {}


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n\"]", text) else text


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return strict_json.loads(text, kind=str)
        except strict_json.BadJson:
            return text
    return text
