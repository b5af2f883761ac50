"""The one reader of JSON from strangers: records in images, headers, manifests, messages and lists.

    values = strict_json.loads(data, kind=dict, max_values=1_000)

Depth and number of values are counted before anything is built: Python's reader spends 40 s and gigabytes on
32 MB of `[{},{},...]`, and ends with RecursionError on deep brackets. Refused are also keys that occur twice,
NaN and Infinity, numbers beyond a float's range, and texts that are not Unicode (half a surrogate pair), which
cannot be written to a file, a terminal or a response.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, overload

from minikin.files import read_small

MAX_BYTES = 1 << 20
MAX_DEPTH = 32  # of nested brackets
MAX_VALUES = 20_000  # numbers, texts, lists and objects together
T = TypeVar("T")
# a run without meaning, then a character that begins, ends or separates values, or the end; a string as a whole
_TOKEN = re.compile(r'[^"\[\]{},]*+(["\[\]{},]|\Z)(?:(?<=")[^"\\]*+(?:\\.[^"\\]*+)*+"?)?', re.DOTALL)
# also of whole pairs, which are looked at then; decoded bytes have none of the second, which takes longer
_ESCAPED_HALF, _HALF = re.compile(r"\\u[dD][89a-fA-F]"), re.compile("[\ud800-\udfff]")
_NAMES: dict[type, str] = {
    dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number",
    type(None): "null",
}  # fmt: skip


class BadJson(ValueError):
    """JSON that is refused. The message is the reason, to follow "it is not valid JSON: "."""


@overload
def loads(
    data: bytes | str, *, kind: type[T], max_bytes: int = ..., max_depth: int = ..., max_values: int = ...,
    nan_as_null: bool = ..., parse_int: Callable[[str], Any] | None = ...,
) -> T: ...  # fmt: skip


@overload
def loads(
    data: bytes | str, *, kind: None = None, max_bytes: int = ..., max_depth: int = ..., max_values: int = ...,
    nan_as_null: bool = ..., parse_int: Callable[[str], Any] | None = ...,
) -> Any: ...  # fmt: skip


def loads(
    data: bytes | str,
    *,
    kind: type[Any] | None = None,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    max_values: int = MAX_VALUES,
    nan_as_null: bool = False,
    parse_int: Callable[[str], Any] | None = None,
) -> Any:
    """Parse JSON, UTF-8 with or without a byte order mark if it is bytes.

    kind         the type that the outermost value must have; None for any
    max_bytes    of bytes; characters of a text
    nan_as_null  read NaN and Infinity, which ComfyUI writes, as None; refused by default
    parse_int    builds integers from their digits
    Raises BadJson.
    """
    if len(data) > max_bytes:
        raise BadJson(f"it has {len(data):,} bytes, more than {max_bytes:,}")
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data.removeprefix("\ufeff")
        check_size(text, max_depth, max_values)
        value = json.loads(
            text, object_pairs_hook=_unique, parse_float=_null_or_finite if nan_as_null else _finite,
            parse_constant=_null if nan_as_null else _refused, parse_int=parse_int,
        )  # fmt: skip
        if _ESCAPED_HALF.search(text) or (isinstance(data, str) and _HALF.search(text)):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise BadJson("a text in it is not valid Unicode") from None
    except BadJson:
        raise
    except (ValueError, RecursionError) as e:
        raise BadJson("a number in it has too many digits" if "digits" in str(e) else str(e)[:120]) from None
    if kind is not None and not isinstance(value, kind):
        raise BadJson(f"it is {kind_name(value)}, not {_NAMES[kind]}")
    return value


def read(
    path: Path, *, kind: type[T], max_bytes: int = MAX_BYTES, max_values: int = MAX_VALUES,
    nan_as_null: bool = False,
) -> T:  # fmt: skip
    """Parse a JSON file; a pipe, device or folder is refused. Raises BadJson and OSError."""
    data = read_small(path, max_bytes)
    if data is None:
        raise BadJson(f"it is no file, or one of more than {max_bytes:,} bytes")
    return loads(data, kind=kind, max_bytes=max_bytes, max_values=max_values, nan_as_null=nan_as_null)


def check_size(text: str, max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES) -> int:
    """Count nested brackets and values without building any; returns the number of brackets left open.

    Takes linear time and stops at the first excess. Raises BadJson.
    """
    depth, values, strings = 0, 1, 0  # strings: also keys
    for match in _TOKEN.finditer(text):
        token = match[1]
        if token == ",":
            values += 1
        elif token in ("[", "{"):
            values += 1
            depth += 1
            if depth > max_depth:
                raise BadJson(f"it is nested more than {max_depth} deep")
        elif token in ("]", "}"):
            depth -= 1
        elif token:
            strings += 1
        if values > max_values or strings > 2 * max_values:
            raise BadJson(f"it has more than {max_values:,} values")
    return depth


def kind_name(value: Any) -> str:
    """The JSON type of a value in words."""
    return _NAMES.get(type(value), type(value).__name__)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise BadJson("a key occurs twice")
    return unique


def _refused(name: str) -> Any:
    raise BadJson(f"{name} is no number of JSON")


def _null(name: str) -> None:
    return None


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise BadJson(f"{text[:20]} is too large")
    return value


def _null_or_finite(text: str) -> float | None:
    value = float(text)
    return None if value in (float("inf"), float("-inf")) else value
