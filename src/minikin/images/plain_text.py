"""Text files of other programs: UTF-8, or UTF-16 and UTF-32 as Windows' editors save them."""

from __future__ import annotations

import codecs

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


def decode_text(data: bytes) -> str:
    """A file's text without its byte order mark, and with "\\n" between lines.

    UTF-16 without a mark is recognised by its zero bytes. Older encodings do not say which they are:
    guessing would give wrong letters. Raises UnicodeError for them.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in data:
        even, odd = data[::2].count(0), data[1::2].count(0)
        encoding = "utf-16-le" if odd > even else "utf-16-be"
    text = data.decode(encoding)
    return text.replace("\r\n", "\n").replace("\r", "\n")
