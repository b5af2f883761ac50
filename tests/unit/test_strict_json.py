"""JSON from strangers: read within limits, or refused with a reason, whatever it holds."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from minikin import strict_json
from minikin.strict_json import BadJson

REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "Expecting value"),
    "cut": (b'{"a": [1, 2', "Expecting"),
    "deep lists": (b"[" * 100_000, "nested more than 32 deep"),
    "deep objects": (b'{"a":' * 33 + b"1" + b"}" * 33, "nested more than 32 deep"),
    "empty objects": (b"[" + b"{}," * 100_000 + b"{}]", "more than 20,000 values"),
    "empty texts": (b"[" + b'""' * 200_000, "more than 20,000 values"),
    "keys": (b'{"a":' * 31 + b'{"a"' + b':"a"' * 100_000, "more than 20,000 values"),
    "half a pair": (b'{"a": "\\ud800"}', "not valid Unicode"),
    "half a pair as a key": (b'{"\\uDfff": 1}', "not valid Unicode"),
    "half a pair in UTF-8": (b'["\xed\xa0\x80"]', "not valid Unicode"),
    "latin": (b'["caf\xe9"]', "not valid Unicode"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not valid Unicode"),
    "a key twice": (b'{"a": 1, "a": 2}', "occurs twice"),
    "NaN": (b"[NaN]", "NaN is no number"),
    "Infinity": (b"[-Infinity]", "-Infinity is no number"),
    "too large": (b"[1e999]", "1e999 is too large"),
    "a long integer": (b"[" + b"9" * 5_000 + b"]", "too many digits"),
    "two values": (b"{} {}", "Extra data"),
    "bytes": (b'"' + b"a" * (1 << 20) + b'"', "more than 1,048,576"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    data, words = REFUSED[case]
    with pytest.raises(BadJson, match=words) as e:
        strict_json.loads(data)
    assert len(str(e.value)) < 160
    str(e.value).encode()


@pytest.mark.parametrize("value", [[], {}, "text", 1, 1.5, True, None])
def test_expected_type(value: Any) -> None:
    """The outermost value has the type that is asked for, or is refused by name."""
    data = json.dumps(value)
    for kind in (dict, list, str):
        if isinstance(value, kind):
            assert strict_json.loads(data, kind=kind) == value
        else:
            with pytest.raises(BadJson, match="it is .*, not "):
                strict_json.loads(data, kind=kind)


def test_what_is_sound_is_read_as_json_reads_it() -> None:
    value = {
        "brackets in a text": '[[[[{{{{,,,,"\\" \\\\', "emoji": "😀 猫", "numbers": [0, -1, 1.5e-7, 2**60],
        "deep": [[[[{"a": {"b": [None, True, False]}}]]]], "control": "\0\x1b\n",
    }  # fmt: skip
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=2)):
        assert strict_json.loads(text) == value
        assert strict_json.loads(text.encode("utf-8-sig")) == value == strict_json.loads("\ufeff" + text)
    assert strict_json.loads("[NaN, 1e999, 2.5]", nan_as_null=True) == [None, None, 2.5]


def test_the_limits_are_exact() -> None:
    """Values within the limit are read, one more is refused."""
    assert len(strict_json.loads("[" + ",".join("1" * 9) + "]", max_values=10)) == 9
    with pytest.raises(BadJson, match="more than 10 values"):
        strict_json.loads("[" + ",".join("1" * 10) + "]", max_values=10)
    assert strict_json.loads("[[]]", max_depth=2) == [[]]
    with pytest.raises(BadJson, match="nested more than 2 deep"):
        strict_json.loads("[[[]]]", max_depth=2)


@pytest.mark.parametrize("data", ["[" + "{}," * 5_000_000, "[" * 15_000_000, "{" + ":" * 15_000_000])
def test_nothing_is_built_of_a_huge_input(data: str) -> None:
    """32 MB of empty objects took 40 s and gigabytes before; colons once took quadratic time here."""
    tracemalloc.start()
    try:
        with pytest.raises(BadJson):
            strict_json.loads(data, max_bytes=1 << 30)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_pipe_or_a_folder_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(BadJson, match="no file"):
            strict_json.read(path, kind=dict)
    with pytest.raises((BadJson, OSError)):
        strict_json.read(tmp_path, kind=dict)
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert strict_json.read(tmp_path / "a.json", kind=dict) == {"a": 1}
