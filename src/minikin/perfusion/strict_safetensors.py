"""Reading and writing small safetensors files, strictly and deterministically.

The safetensors library accepts duplicate keys, holes, absurd shapes and values that are not finite,
and writes metadata in an order that changes from run to run. A concept file comes from strangers
and must be equal for equal seeds, so this small reader refuses whatever is not canonical, from
bytes in memory (never mmap), and the writer sorts. Files of either are ordinary safetensors files.
"""

from __future__ import annotations

import json
import math
import re
import struct
from typing import Any

import torch
from torch import Tensor

from minikin.errors import BadConceptFile

MAX_FILE = 16 * 2**20
MAX_HEADER = 64 * 2**10
MAX_TENSORS = 64
MAX_KEYS = 64
MAX_VALUE = 4 * 2**10  # characters of one metadata value,
MAX_LONG = 48 * 2**10  # and of one of these
LONG = ("modelspec.thumbnail", "minikin.recipe", "minikin.points")
MAX_DEPTH = 4  # of nested brackets: a tensor's shape is at 3, and so is an operating point
MAX_DIMS = 4

DTYPES = {"F16": torch.float16, "F32": torch.float32, "I8": torch.int8}
_NAMES = {v: k for k, v in DTYPES.items()}
_FACTS = {"dtype", "shape", "data_offsets"}
_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}(\.[0-9]{1,2})?")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)  # a text, ended or not; a bracket


def serialize(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file as bytes: tensors and metadata sorted by name, header padded to 8."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    data = b""
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().cpu().contiguous().numpy().tobytes()
        header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }  # fmt: skip
        data += raw
    text = json.dumps(header, ensure_ascii=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def parse(data: bytes, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file; raises BadConceptFile naming the first rule broken."""

    def refuse(why: str, code: str = "concept_malformed", to_do: str = "Get the file again.") -> BadConceptFile:
        return BadConceptFile(f"{what} is not a sound concept file: {why}. {to_do}", code)

    if len(data) > MAX_FILE:
        raise refuse(
            f"it has {len(data)} bytes, more than the {MAX_FILE} a concept may have", "concept_too_large"
        )
    if len(data) < 10 or data[8:9] != b"{":
        raise refuse(
            "it is not in the safetensors format",
            "unsupported_concept_format",
            "Pickle-based files (.pt, .ckpt, .bin) are never opened.",
        )
    (n,) = struct.unpack("<Q", data[:8])
    if n > MAX_HEADER:
        raise refuse(f"its header claims {n} bytes, more than the {MAX_HEADER} allowed", "concept_too_large")
    if 8 + n > len(data):
        raise refuse(
            f"the file is incomplete: its header declares {n} bytes, {len(data) - 8} are there",
            "concept_corrupt",
        )
    header = _header(data[8 : 8 + n], refuse)
    metadata = _metadata(header.pop("__metadata__", {}), refuse)
    body = data[8 + n :]
    if len(header) > MAX_TENSORS:
        raise refuse(f"it has {len(header)} tensors, more than {MAX_TENSORS}", "concept_too_large")
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda kv: _offsets(kv[1], refuse)):
        start, stop = _offsets(entry, refuse)
        if not _NAME.fullmatch(name):
            raise refuse(f"a tensor is named {name[:40]!r}", "concept_unexpected_tensor")
        if start != end or stop < start or stop > len(body):
            why = "concept_corrupt" if start == end <= stop else "concept_malformed"  # cut off, or never right
            raise refuse(f"tensor '{name}' lies at bytes {start} to {stop} of {len(body)}", why)
        tensors[name] = _tensor(name, entry, body[start:stop], refuse)
        end = stop
    if end != len(body):
        raise refuse(f"{len(body) - end} bytes after the last tensor belong to nothing", "concept_corrupt")
    return tensors, metadata


def brackets(text: str) -> tuple[int, int]:
    """How deep brackets are nested in JSON, and how many are open at its end; in linear time, unparsed."""
    deepest = now = 0
    for token in _TOKEN.findall(text):
        now += (token in "[{") - (token in "]}")
        deepest = max(deepest, now)
    return deepest, now


def _header(raw: bytes, refuse: Any) -> dict[str, Any]:
    """The header's JSON: no key twice, and for every number but whole ones from 0 on, None."""

    def natural(text: str) -> int | None:
        return int(text) if text.isdecimal() else None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [k for k, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    broken = refuse(f"its header is not whole in the {len(raw)} bytes that it declares", "concept_corrupt")
    if not raw.rstrip(b" ").endswith(b"}"):
        raise broken
    try:
        text = raw.decode("utf-8")
        deepest, left_open = brackets(text)
        if deepest > MAX_DEPTH:
            raise refuse(f"its header is nested {deepest} deep, more than {MAX_DEPTH}", "concept_too_large")
        if left_open:
            raise broken
        header = json.loads(text, object_pairs_hook=unique, parse_int=natural,
                            parse_float=natural, parse_constant=natural)  # fmt: skip
    except (ValueError, RecursionError) as e:
        raise refuse(f"its header is not valid JSON ({e})") from None
    if not isinstance(header, dict):
        raise refuse("its header is not a JSON object")
    return header


def _metadata(found: Any, refuse: Any) -> dict[str, str]:
    if not isinstance(found, dict) or len(found) > MAX_KEYS:
        raise refuse("its metadata is not an object of at most 64 texts")
    for key, value in found.items():
        most = MAX_LONG if key in LONG else MAX_VALUE
        if not isinstance(value, str) or len(value) > most or len(key) > 64:
            raise refuse(f"its metadata '{key[:40]}' is not a text of at most {most} characters")
        if not (key + value).isascii() and any("\ud800" <= c <= "\udfff" for c in key + value):
            raise refuse(f"its metadata '{key[:40]!a}' holds half a character")
    return found


def _offsets(entry: Any, refuse: Any) -> tuple[int, int]:
    try:
        start, stop = entry["data_offsets"]
        if type(start) is not int or type(stop) is not int or set(entry) != _FACTS:
            raise ValueError
        return start, stop
    except (KeyError, TypeError, ValueError):
        raise refuse("a tensor has no valid place in the file") from None


def _tensor(name: str, entry: dict[str, Any], raw: bytes, refuse: Any) -> Tensor:
    dtype, shape = DTYPES.get(str(entry.get("dtype"))), entry.get("shape")
    if dtype is None:
        raise refuse(f"tensor '{name}' has the type {str(entry.get('dtype'))[:20]!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(
        type(d) is int and 0 < d <= 2**24 for d in shape
    ):  # fmt: skip
        raise refuse(f"tensor '{name}' has the shape {str(shape)[:40]}")
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise refuse(f"tensor '{name}' of shape {shape} does not fill its {len(raw)} bytes")
    tensor = torch.frombuffer(bytearray(raw), dtype=dtype).view(shape)
    if dtype is not torch.int8 and not bool(torch.isfinite(tensor).all()):
        raise refuse(
            f"tensor '{name}' holds numbers that are not finite", "concept_non_finite", "Teach it again."
        )
    return tensor
