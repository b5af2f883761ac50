"""Reading safetensors files from untrusted sources within limits, and writing them deterministically.

The safetensors library refuses holes, overlaps, trailing bytes and wrong shapes. It accepts duplicate keys,
absurd sizes, NaN and Inf, and writes metadata in an order that changes from run to run. `parse` adds limits
and a check of the header, and reads from bytes in memory (never mmap). `serialize` sorts, because equal
concepts must give equal files.
"""

from __future__ import annotations

import json
import re
import struct
from typing import TYPE_CHECKING, Any

from minikin import strict_json
from minikin.errors import BadConceptFile

if TYPE_CHECKING:
    from torch import Tensor

MAX_FILE = 16 * 2**20
MAX_HEADER = 64 * 2**10
MAX_TENSORS = 64
MAX_KEYS = 64
MAX_VALUE = 4 * 2**10  # characters of a metadata value
MAX_LONG = 48 * 2**10  # characters of one of these values:
LONG = ("modelspec.thumbnail", "minikin.recipe", "minikin.points")
MAX_DEPTH = 4  # of nested brackets: a tensor's shape has depth 3, and so has an operating point
MAX_DIMS = 4

DTYPES = {"F16": "float16", "F32": "float32", "I8": "int8"}  # safetensors' names and PyTorch's
_NAMES = {f"torch.{v}": k for k, v in DTYPES.items()}
_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}(\.[0-9]{1,2})?")


def serialize(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file as bytes: tensors and metadata sorted by name, header padded to 8."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    data = b""
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().cpu().contiguous().numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {
            "dtype": _NAMES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        data += raw
    text = json.dumps(header, ensure_ascii=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def parse(data: bytes, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file; raises BadConceptFile with the first violation.

    what  names the file in errors
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

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
    if len(header) > MAX_TENSORS:
        raise refuse(f"it has {len(header)} tensors, more than {MAX_TENSORS}", "concept_too_large")
    end = 0
    for start, stop, name in sorted((*_offsets(name, entry, refuse), name) for name, entry in header.items()):
        if start != end or stop < start:
            raise refuse(f"tensor '{name}' lies at bytes {start} to {stop}, expected it to start at {end}")
        end = stop
    if end != len(data) - 8 - n:
        raise refuse(f"its tensors end at byte {end} of {len(data) - 8 - n}", "concept_corrupt")
    try:
        tensors = load(data)
    except SafetensorError as e:
        raise refuse(str(e)) from None
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise refuse(f"tensor '{name}' holds NaN or Inf", "concept_non_finite", "Teach it again.")
    return tensors, metadata


def _header(raw: bytes, refuse: Any) -> dict[str, Any]:
    """Parse the header."""
    broken = refuse(f"its header is not whole in the {len(raw)} bytes that it declares", "concept_corrupt")
    if not raw.rstrip(b" ").endswith(b"}"):
        raise broken
    try:
        text = raw.decode("utf-8")
        left_open = strict_json.check_size(text, MAX_DEPTH)
    except UnicodeDecodeError as e:
        raise refuse(f"its header is not valid JSON ({e})") from None
    except strict_json.BadJson as e:
        raise refuse(f"its header is not accepted: {e}", "concept_too_large") from None
    if left_open:
        raise broken
    try:
        return strict_json.loads(text, kind=dict, max_depth=MAX_DEPTH)
    except strict_json.BadJson as e:
        raise refuse(f"its header is not valid JSON: {e}") from None


def _metadata(value: Any, refuse: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_KEYS:
        raise refuse("its metadata is not an object of at most 64 texts")
    for key, text in value.items():
        most = MAX_LONG if key in LONG else MAX_VALUE
        if not isinstance(text, str) or len(text) > most or len(key) > 64:
            raise refuse(f"its metadata '{key[:40]}' is not a text of at most {most} characters")
    return value


def _offsets(name: str, entry: Any, refuse: Any) -> tuple[int, int]:
    """First and last byte of a tensor; refuses names, types and shapes that no concept has."""
    if not _NAME.fullmatch(name):
        raise refuse(f"a tensor is named {name[:40]!r}", "concept_unexpected_tensor")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"the header entry of tensor '{name}' is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"tensor '{name}' has the type {str(dtype)[:20]!r}")
    sizes = isinstance(shape, list) and len(shape) <= MAX_DIMS
    if not sizes or not all(type(d) is int and 0 < d <= 2**24 for d in shape):
        raise refuse(f"tensor '{name}' has the shape {str(shape)[:40]}")
    if not isinstance(offsets, list) or [type(o) for o in offsets] != [int, int] or min(offsets) < 0:
        raise refuse(f"tensor '{name}' has no valid place in the file")
    return offsets[0], offsets[1]
