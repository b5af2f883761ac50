"""Prompt syntax of other tools that is not followed: match, and said in one note each."""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_EXCERPT = 40  # characters of the prompt in a note
_INVOKE = "InvokeAI's weight and is not followed: it is painted as words. Write (word:1.2)"
_WORDS = "is not followed: it is painted as words"

_SYNTAX = tuple(
    (re.compile(pattern), sentence)
    for pattern, sentence in (
        (r"[^\s()]{0,30}\w(?:\+\+|--)[+-]*(?=[\s,.)]|$)", _INVOKE),
        (r"(?<![^\W\d_])[^\W\d_]{3,40}\+(?=[\s,)]|$)", _INVOKE),
        (r"\)(?:\++|-+)(?=[\s,.)]|$)", _INVOKE),
        (r"\)\d*\.\d+", _INVOKE),
        (r"\)?\.(?:and|blend|swap)\([^()]{0,60}\)?", f"InvokeAI's syntax and {_WORDS}"),
        (r"\([^()]{1,60}:\s*\d+(?:,\d+|\.\d+\.\d+|(?:\.\d+)?e[+-]?\d+)\s*\)",
         "no weight: write one number with a point, as in (word:1.2)"),
        (r"\b(?:ADDCOL|ADDROW|ADDCOMM|ADDBASE|AND_PERP|AND_SALT|AND_TOPK)\b",
         f"the syntax of an extension of A1111 and {_WORDS}. Write <name@left> for a concept in a region"),
        (r"\{[^{}]{0,80}(?:\||\$\$)[^{}]{0,80}\}", f"a choice of wildcards and {_WORDS}"),
        (r"(?<!\w)__[\w/*.-]{1,60}__(?!\w)", f"a wildcard and {_WORDS}"),
        (r"\{[^{}|]{1,80}\}", f"NovelAI's emphasis and {_WORDS}. Write (word:1.05)"),
        (r"(?<!\S)-?\d+(?:\.\d+)?::[^:]{0,80}(?:::)?", f"NovelAI's weight and {_WORDS}. Write (word:1.2)"),
        (r"\w{1,30}\s*::\s*-?\d+(?:\.\d+)?", f"Midjourney's weight and {_WORDS}. Write (word:1.2)"),
        (r"(?:(?<=\s)|^)(?:--|—)(?:ar|aspect|v|version|niji|stylize|s|chaos|c|q|quality|no|seed|iw|style|tile|sref|"
         r"cref|raw|w|h|n|d|l)\b[^\-]{0,20}",
         f"an option of Midjourney or of kohya's scripts and {_WORDS}. Give it as an option of the command"),
        (r"^\s*/imagine\b", f"Midjourney's command and {_WORDS}"),
    )
)  # fmt: skip


def notes(source: str) -> Iterator[str]:
    """One sentence for each kind of foreign syntax in a prompt, with the first place where it stands."""
    kinds = set()
    for pattern, sentence in _SYNTAX:
        match = pattern.search(source)
        if match and sentence not in kinds:
            kinds.add(sentence)
            yield f"'{excerpt(match.group())}' is {sentence}."


def excerpt(text: str) -> str:
    """A piece of a prompt for a message: on one line, not too long."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_EXCERPT else f"{line[: MAX_EXCERPT - 3]}..."
