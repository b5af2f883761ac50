"""Images of strangers whose records are hostile or broken: an answer, or one sentence; nothing is obeyed."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minikin import events
from minikin.errors import BadPhoto, BadRecipe, MinikinError
from minikin.generation import lineage
from minikin.generation.image import GeneratedImage
from minikin.generation.source import SourceImage, inherited
from minikin.images import metadata
from minikin.printable import escaped, escaped_json
from minikin.recipes import Paint, Refine
from minikin.server import decode
from minikin.server.errors import RequestRejected
from minikin.server.limits import Limits


def png(record: Any = None, parameters: str | None = None) -> bytes:
    info, file = PngInfo(), io.BytesIO()
    if record is not None:
        info.add_itxt("minikin", record if isinstance(record, str) else json.dumps(record))
    if parameters is not None:
        info.add_itxt("parameters", parameters)
    Image.new("RGB", (128, 128), (200, 100, 50)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def flat(side: int, extra: bytes = b"", depth: int = 1) -> bytes:
    row = bytes(1 + (side * depth + 7) // 8)
    head = struct.pack(">IIBBBBB", side, side, depth, 0, 0, 0, 0)
    body = zlib.compress(row * side, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


R = {"prompt": "a cat", "base": "tiny", "steps": 1}
RECORD = {"recipe": R, "seed": 1}
ESC = "a\x1b]0;owned\x07 \x1b[2J cat \x9b31m \u202e"


def chain(n: int) -> dict[str, Any]:
    record: dict[str, Any] = RECORD
    for _ in range(n):
        record = {**RECORD, "work": "refine", "parent": {"pixels": "x", "made": record}}
    return record


RECORDS: dict[str, Any] = {
    "escapes": {"recipe": {**R, "prompt": ESC}, "seed": 1, "concepts": {ESC: {"sha256": ESC}},
                "parent": {"file": ESC, "pixels": ESC}},
    "half a pair": '{"recipe": {"prompt": "a \\ud800 cat", "steps": 1}, "seed": 1}',
    "a parent that is a text": {**RECORD, "parent": "x"}, "a parent that is a list": {**RECORD, "parent": [1]},
    "huge": {"recipe": {**R, "width": 4096, "height": 4096, "steps": 1000}, "seed": 1, "batch": {"seed": 1,
    "n": 64}},
    "a base in a folder": {"recipe": {**R, "base": "/tmp/a-strangers-base"}, "seed": 1},
    "a base above": {"recipe": {**R, "base": "../x"}, "seed": 1}, "a base that is a number": {"recipe": {**R,
    "base": 5},
                                                                                            "seed": 1},
    "engine": {"recipe": {**R, "engine": "compile"}, "seed": 1},
    "device": {"recipe": {**R, "device": "cuda", "backend": "openvino"}, "seed": 1},
    "a negative batch": {**RECORD, "seed": -5, "batch": {"seed": -6, "n": 3}},
    "a seed at the end": {**RECORD, "seed": 2**63 - 1, "batch": {"seed": 2**63 - 1, "n": 2}},
    "a mask that is none": {**RECORD, "work": "inpaint", "mask": {"png": "AAAA"}, "parent": {"pixels": "x",
    "made": RECORD}},
    "a mask elsewhere": {**RECORD, "work": "inpaint", "mask": {"file": "../../../../etc/passwd"},
                         "parent": {"pixels": "x", "made": RECORD}},
    "a mask that is huge": {**RECORD, "work": "inpaint", "mask": {"png": base64.b64encode(flat(9000)).decode()},
                            "parent": {"pixels": "x", "made": RECORD}},
    "a file that is a number": {**RECORD, "work": "refine", "parent": {"pixels": "x", "file": 5}},
    "a file with a NUL": {**RECORD, "work": "refine", "parent": {"pixels": "x", "file": "a\0b"}},
    "a file that is a pipe": {**RECORD, "work": "refine", "parent": {"pixels": "x", "file": "pipe"}},
    "a hash that is a number": {**RECORD, "work": "refine", "parent": {"pixels": "x", "sha256": 5,
    "file": "a.png"}},
    "a batch in the recipe": {"recipe": {**R, "batch": 3}, "seed": 1},
    "no work": {**RECORD, "work": "__class__"},
    "work of a number": {**RECORD, "work": 5}, "a seed that is true": {"recipe": R, "seed": True},
    "a field that is none": {"recipe": {**R, "__class__": 1}, "seed": 1},
    "a prompt that is a list": {"recipe": {**R, "prompt": [1]},
                                                                                                  "seed": 1},
    "long lineage": chain(45), "too long lineage": chain(70), "a list": [1], "deep": "[" * 90_000,
    "long": json.dumps({"recipe": {**R, "prompt": "a" * 99_000}, "seed": 1}),
    "too long": json.dumps({"recipe": {**R, "prompt": "a" * 150_000}, "seed": 1}),
    "recipe of a text": {"recipe": "x"},
    "concepts of a list": {**RECORD, "concepts": [1]},
    "an adapter of a text": {**RECORD, "adapters": {"x": "y"}},
}  # fmt: skip
REPEATABLE = {"huge", "engine", "device", "a batch in the recipe", "long lineage", "long"}
BOMBS = {
    "178 megapixels": flat(13_340), "profile": flat(64, chunk(b"iCCP",
    b"x\0\0" + zlib.compress(bytes(50 << 20), 9))),
    "texts": flat(64, b"".join(chunk(b"zTXt", b"parameters%d\0\0" % k + zlib.compress(b"a" * (1 << 20), 9))
                               for k in range(80))),
    "one text": flat(64, chunk(b"iTXt",
    b"minikin\0\1\0\0\0" + zlib.compress(b'{"recipe": "' + b"a" * (20 << 20), 9))),
}  # fmt: skip


def repeated(record: dict[str, Any], folder: Path) -> list[Paint]:
    """The recipes that a replay runs."""
    recipes = []

    def generate(recipe: Paint, init: Any) -> Iterator[events.Event]:
        recipes.append(recipe)
        image = Image.new("RGB", (128, 128), (200, 100, 50))
        yield events.Done([GeneratedImage(image, recipe.seed + k) for k in range(recipe.n)], {})

    list(lineage.replay(record, generate, (folder,)))
    return recipes


@pytest.mark.parametrize("name", RECORDS)
def test_a_hostile_record_is_answered(name: str, tmp_path: Path) -> None:
    """By show, redo, refine and the server alike: with an image, or by one error of ours."""
    path = tmp_path / "a.png"
    path.write_bytes(png(RECORDS[name]))
    os.mkfifo(tmp_path / "pipe")
    try:
        record = metadata.read(path).recipe
    except BadPhoto:
        record = {}
    assert len(lineage.ancestors(record)) <= metadata.MAX_ANCESTORS + 10 and isinstance(
        lineage.concepts_of(record), dict
    )
    try:
        cost, recipes = lineage.cost(record, (128, 128)), repeated(record, tmp_path)
    except MinikinError as e:
        assert name not in REPEATABLE, e
        escaped(str(e)).encode()
    else:
        assert name in REPEATABLE and cost.images == sum(r.n for r in recipes)
        assert all((r.base, r.device, r.backend) == ("tiny", None, "eager") for r in recipes)
    source = SourceImage.of(path)
    server = decode.decode(path.read_bytes(), "image", Limits())
    assert SourceImage.of(server).record == source.record
    try:
        refined = inherited(Refine, source, {})
        assert refined.base == "tiny" and refined.device is None and refined.backend == "eager"
    except BadRecipe as e:
        escaped(str(e)).encode()


def test_cost_is_said_and_bounded(tmp_path: Path, cli: Any) -> None:
    """512 bytes once asked for 64 images of 4096 pixels in 1,000 steps, and were obeyed."""
    (tmp_path / "a.png").write_bytes(png(RECORDS["huge"]))
    code, _, message = cli("redo", "a.png")
    assert code == 2 and "64 images of up to 4096x4096 with tiny" in message and "--yes" in message
    (tmp_path / "b.png").write_bytes(png(RECORDS["a base in a folder"]))
    for order in ("redo", "refine"):
        code, _, message = cli(order, "b.png")
        assert code == 2 and "names its base by a path" in message and "--base" in message


@pytest.mark.parametrize("name", ["escapes", "a base above", "no work"])
def test_nothing_that_is_printed_is_obeyed(name: str, tmp_path: Path, cli: Any) -> None:
    text = f"{ESC}\nNegative prompt: {ESC}\nSteps: 1, Seed: 1, A\x1b[1mb: 3, Evil: {ESC}"
    (tmp_path / "a.png").write_bytes(png(RECORDS[name], parameters=text))
    for order in (("show", "a.png"), ("show", "a.png", "--json"), ("redo", "a.png")):
        _, output, errors = cli(*order)
        assert output + errors and not set("\x1b\x07\x9b\u202e") & set(output + errors)


@pytest.mark.parametrize("text", [ESC, "\ud800", "a\u2028b", "\U000e0041", "a\x00\x7f\x85b"])
def test_escapes(text: str) -> None:
    text_shown = escaped(text)
    assert text_shown.isprintable() and "\\" in text_shown
    line = escaped_json({"a": text})
    assert line.isprintable() and json.loads(line) == {"a": text}
    assert escaped("a\n\tкот 猫 👩‍👩‍👧") == "a\n\tкот 猫 👩‍👩‍👧"


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_little(name: str, tmp_path: Path) -> None:
    """By every reader: refused, or read in the memory of the pixels that are there."""
    path = tmp_path / "a.png"
    path.write_bytes(BOMBS[name])
    tracemalloc.start()
    try:
        for read in (metadata.read, SourceImage.of):
            try:
                read(path)
            except BadPhoto:
                pass
        assert tracemalloc.get_traced_memory()[1] < 120_000_000
    finally:
        tracemalloc.stop()
    try:
        decode.decode(BOMBS[name], "image", Limits())
    except RequestRejected as e:
        assert e.status in (413, 415, 422)


def test_ancestors_are_bounded_where_they_are_written() -> None:
    """A chain of refinements keeps the nearest; what is written is always read again."""
    record = metadata.bounded(chain(400), 10**9)
    text = json.dumps(record)
    assert (
        metadata.recorded({"minikin": text, "parameters": ""}, source_type="x").recipe == {}
        or len(text) < 10**6
    )
    assert len(lineage.ancestors(record)) == metadata.MAX_ANCESTORS + 1
    bounded_record = metadata.bounded(chain(400))
    assert metadata.recorded({"minikin": json.dumps(bounded_record)}).recipe == bounded_record
    assert sys.getrecursionlimit() > 4 * metadata.MAX_ANCESTORS
