"""Text from files of strangers, made safe to print: terminals obey control characters, readers direction marks.

Everything that the command line prints goes through `escaped` (`cli/display.py`).
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, formats (directions, invisible), half pairs, separators
_JOINERS = "\u200c\u200d"  # of Persian, Indic scripts and emoji
_ORDINARY = re.compile(r"[\w !-/:-@\[-`{-~\n\t]*")


def escaped(text: str) -> str:
    r"""The text with `\x1b` and the like in place of characters that are obeyed; lines and tabs stay."""
    if _ORDINARY.fullmatch(text):
        return text
    return "".join(_escape(c) if is_obeyed(c) and c not in f"\n\t{_JOINERS}" else c for c in text)


def escaped_json(value: Any) -> str:
    """A value as JSON in one line; characters that a terminal obeys are escaped as JSON does it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if text.isprintable() else "".join(json.dumps(c)[1:-1] if is_obeyed(c) else c for c in text)


def without_controls(text: str) -> str:
    """The text without characters that are obeyed, lines and tabs included."""
    return text if text.isprintable() else "".join(c for c in text if not is_obeyed(c))


def is_obeyed(character: str) -> bool:
    """Whether a terminal or a reader obeys this character in place of showing it."""
    return unicodedata.category(character) in _OBEYED


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
