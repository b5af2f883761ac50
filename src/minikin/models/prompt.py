"""Prompt syntax: A1111's emphasis and LoRA tags, and concepts in angle brackets.

    a photo of <tom> on the beach        a concept, at its operating point
    <tom:0.8>  <concept:tom:0.8>         with a strength
    <tom@left>  <tom@0,20,50,100:0.8>    in a part of the image; see `regions`
    <tom:faithful>                       at another operating point that a sweep measured
    (word:1.2)  ((word))  [word]         more or less attention (x1.1 a bracket, /1.1 a square one)
    \\(  \\)  \\[  \\]  \\<               the characters themselves
    <lora:style:0.8>                     an adapter; removed from the text

`parse` returns plain text in which each concept is replaced by its category (the *twin prompt*), with the
character spans of concepts and weights. Tokens are matched to these spans through the tokenizer's offsets.
Parsing takes linear time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from minikin.errors import BadRecipe, UnknownName
from minikin.models.regions import Box, parse_box
from minikin.recipes.base import MAX_STRENGTH, POINT_NAMES

MAX_PROMPT = 32_000  # characters, as in OpenAI's API
MAX_CONCEPTS = 8
CONTEXT = 200  # characters before a tag that are searched for an article

UNKNOWN_HINT = (
    "Teach it with `minikin teach`, put its file into this folder, or write \\< for a plain angle bracket."
)

_TOKEN = re.compile(
    r"\\(?P<escaped>[()\[\]<>\\])"
    r"|<(?P<tag>(?:[a-z]+:)?[^<>:]{1,80}(?::[^<>:]{0,20})?)>"
    r"|(?P<open>[(\[])"
    r"|:(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]<>:]+|[\\<>:])"
)


@dataclass(frozen=True)
class ConceptUse:
    """A concept in the twin prompt: characters [start, end) are its category.

    point         operating point by name; "" for none
    has_strength  true if the prompt states the strength
    box           region of the image; None for all of it
    """

    name: str
    strength: float
    start: int
    end: int
    point: str = ""
    has_strength: bool = False
    box: Box | None = None


@dataclass(frozen=True)
class Weight:
    """Emphasis: characters [start, end) of the twin prompt have this attention weight."""

    start: int
    end: int
    value: float


@dataclass(frozen=True)
class Prompt:
    """A parsed prompt; `text` is the twin prompt, with categories in place of concepts."""

    source: str
    text: str
    uses: tuple[ConceptUse, ...] = ()
    weights: tuple[Weight, ...] = ()
    loras: tuple[tuple[str, float], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the concepts, each once, in order."""
        return tuple(dict.fromkeys(u.name for u in self.uses))


def check_length(source: str) -> None:
    """Raise BadRecipe for a prompt of more than MAX_PROMPT characters."""
    if len(source) > MAX_PROMPT:
        raise BadRecipe(f"The prompt has {len(source)} characters; at most {MAX_PROMPT} are allowed.")


def parse(source: str, categories: Mapping[str, str]) -> Prompt:
    """Parse a prompt.

    categories  category of each known concept, by name
    Raises UnknownName for an unknown concept, BadRecipe for a strength or weight that is no number in range,
    and for too many concepts or characters.
    """
    check_length(source)
    reader = _Reader(source, categories)
    for m in _TOKEN.finditer(source):
        reader.take(m)
    return reader.finish()


def concept_tags(source: str) -> list[str]:
    """Names of concepts in `<...>` tags, known or not."""
    tags = (m["tag"] for m in _TOKEN.finditer(source) if m["tag"])
    parts = [t.split(":") for t in tags if not t.startswith("lora:")]
    names = (p[1] if p[0] == "concept" and len(p) > 1 else p[0] for p in parts)
    return list(dict.fromkeys(name.partition("@")[0].strip() for name in names))


def with_strengths(source: str, strengths: Mapping[str, float]) -> str:
    """The prompt with these strengths in the tags of the concepts they belong to."""

    def replace_tag(m: re.Match[str]) -> str:
        names = concept_tags(m.group()) if m["tag"] else []
        if not names or names[0] not in strengths:
            return m.group()
        _, at, where = m["tag"].removeprefix("concept:").partition(":")[0].partition("@")
        return f"<{names[0]}{at}{where}:{strengths[names[0]]:g}>"

    return _TOKEN.sub(replace_tag, source)


def article(word: str) -> str:
    """The indefinite article of a word."""
    return "an" if word[0].lower() in "aeiou" else "a"


# a determiner, number or possessive and at most two more words; no article is inserted after them
_DETERMINED = re.compile(
    r"(?:^|[\s(\[,])(?:an?|the|my|your|his|her|its|our|their|this|that|these|those|one|two|three|four|"
    r"five|six|some|any|every|each|no|\w+'s)(?:\s+(?!(?:of|in|on|at|with|and|or|by|to|from|next|near|under)\b)"
    r"[\w-]+){0,2}\s+$",
    re.IGNORECASE,
)


class _Reader:
    """Parser state: plain text, concept uses and weights of the tokens read so far."""

    def __init__(self, source: str, categories: Mapping[str, str]) -> None:
        self.source, self.categories = source, categories
        self.out: list[str] = []
        self.length = 0
        self.uses: list[ConceptUse] = []
        self.loras: list[tuple[str, float]] = []
        self.open: list[tuple[str, int]] = []  # open brackets: kind, position
        self.factors: list[Weight] = []

    def take(self, m: re.Match[str]) -> None:
        if m["tag"] is not None:
            self._tag(m["tag"])
        elif m["open"]:
            self.open.append((m["open"], self.length))
        elif m["weight"] is not None:
            if self.open and self.open[-1][0] == "(":
                self._close("(", float(m["weight"]))
            else:
                self._add(m.group())
        elif m["close"]:
            kind = "(" if m["close"] == ")" else "["
            self._close(kind, 1.1 if kind == "(" else 1 / 1.1)
        else:
            self._add(m["escaped"] or m["text"])

    def _add(self, text: str) -> None:
        self.out.append(text)
        self.length += len(text)

    def _last(self) -> str:
        """The last CONTEXT characters of the text so far; the whole text would make parsing quadratic."""
        tail = ""
        for part in reversed(self.out):
            tail = part[-CONTEXT:] + tail
            if len(tail) >= CONTEXT:
                return "-" + tail  # marks that it begins in the middle of a word
        return tail

    def _close(self, kind: str, factor: float) -> None:
        if not self.open or self.open[-1][0] != kind:
            self._add(")" if kind == "(" else "]")
            return
        if not 0 <= factor <= 10:
            raise BadRecipe(f"The attention weight {factor:g} is outside 0 to 10.")
        self.factors.append(Weight(self.open.pop()[1], self.length, factor))

    def _tag(self, tag: str) -> None:
        parts = tag.split(":")
        kind = parts.pop(0) if parts[0] in ("lora", "concept") and len(parts) > 1 else "concept"
        name, *rest = (p.strip() for p in parts)
        point = rest[0] if kind == "concept" and rest and rest[0] in POINT_NAMES else ""
        has_strength = bool(rest and rest[0]) and not point
        amount = _number(rest[0], tag) if has_strength else 1.0
        if kind == "lora":
            self.loras.append((name, amount))
            return
        name, at, region = (part.strip() for part in name.partition("@"))
        if name not in self.categories:
            raise UnknownName("concept", name, self.categories, UNKNOWN_HINT)
        if not 0 <= amount <= MAX_STRENGTH:
            raise BadRecipe(
                f"The strength in <{tag}> must lie between 0 and {MAX_STRENGTH:g}; 1 is the concept's "
                "own operating point."
            )
        category = self.categories[name]
        if not _DETERMINED.search(self._last()):
            self._add(article(category) + " ")
        start = self.length
        self._add(category)
        box = parse_box(region) if at else None
        self.uses.append(ConceptUse(name, amount, start, self.length, point, has_strength, box))

    def finish(self) -> Prompt:
        for kind, start in self.open:  # as in A1111, an open bracket ends at the end of the prompt
            self.factors.append(Weight(start, self.length, 1.1 if kind == "(" else 1 / 1.1))
        if len({u.name for u in self.uses}) > MAX_CONCEPTS:
            raise BadRecipe(f"At most {MAX_CONCEPTS} concepts fit in one prompt.")
        text = "".join(self.out)
        if self.loras:  # a removed tag leaves no double blank
            text, moved = _squeeze(text)
            self.uses = [replace(u, start=moved[u.start], end=moved[u.end]) for u in self.uses]
            self.factors = [Weight(moved[w.start], moved[w.end], w.value) for w in self.factors]
        return Prompt(self.source, text, tuple(self.uses), tuple(self.factors), tuple(self.loras))


def _squeeze(text: str) -> tuple[str, list[int]]:
    """The text without double blanks, and the new position of each character."""
    out, moved = "", []
    for c in text:
        moved.append(len(out))
        if c != " " or (out and not out.endswith(" ")):
            out += c
    moved.append(len(out))
    return out, moved


def _number(text: str, tag: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadRecipe(
            f"'{text}' in <{tag}> is not a number; write for example <tom:0.8>, or the name of an operating "
            f"point: {', '.join(POINT_NAMES)}."
        ) from None
