"""The header of a safetensors file of a stranger: shapes and places of its tensors, and its metadata."""

from __future__ import annotations

from typing import Any

from minikin import strict_json
from minikin.strict_json import BadJson

MAX_TENSORS = 100_000
_VALUES = 20  # of a tensor's entry: type, shape and place
_DEPTH = 4  # the file, an entry, its shape; what other tools nest in metadata is text


def parse(raw: bytes, most: int = MAX_TENSORS) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Entries of the tensors by name (dtype, shape, data_offsets), and the metadata.

    raw   the header without its length
    most  tensors that it may list
    Raises BadJson, a ValueError, for what is no such header.
    """
    max_values = most * _VALUES + 10_000
    header = strict_json.loads(raw, kind=dict, max_bytes=len(raw), max_depth=_DEPTH, max_values=max_values)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise BadJson("its metadata is not an object of texts")
    if len(header) > most:
        raise BadJson(f"it lists {len(header):,} tensors, more than {most:,}")
    for name, entry in header.items():
        if not _is_entry(entry):
            raise BadJson(f"the entry of tensor {name[:60]!r} is not one of dtype, shape and data_offsets")
    return header, metadata


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return isinstance(entry.get("dtype"), str) and all(type(n) is int and n >= 0 for n in (*shape, *offsets))
