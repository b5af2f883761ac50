"""Prompt syntax: A1111's emphasis, LoRA tags, BREAK and prompt editing, and concepts in angle brackets.

    a photo of <tom> on the beach        a concept, at its operating point
    <tom:0.8>  <concept:tom:0.8>         with a strength
    <tom@left>  <tom@0,20,50,100:0.8>    in a part of the image; see `regions`
    <tom:faithful>                       at another operating point that a sweep measured
    (word:1.2)  ((word))  [word]         more or less attention (x1.1 a bracket, /1.1 a square one)
    \\(  \\)  \\[  \\]  \\<  \\|  \\:       the characters themselves
    <lora:style:0.8>  <lora:style:0:1>   an adapter, and with weights of text encoder and U-Net; removed
    BREAK                                ends a chunk of tokens
    [cat:dog:0.5]  [cat|dog]             another prompt in later steps; see `prompt_editing`

Syntax of other tools is not followed and said in `Prompt.notes`, one sentence each.

`parse` returns plain text in which each concept is replaced by its category (the *twin prompt*), with the
character spans of concepts and weights. Tokens are matched to these spans through the tokenizer's offsets.
Parsing takes linear time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from minikin.errors import BadRecipe, UnknownName
from minikin.limits import MAX_STRENGTH, POINT_NAMES
from minikin.models import foreign_syntax, prompt_editing, prompt_tags
from minikin.models.articles import agreeing, article, needs_article
from minikin.models.foreign_syntax import excerpt
from minikin.models.prompt_editing import Edits
from minikin.models.prompt_tags import FOREIGN, number, read_lora, read_tag
from minikin.models.regions import Box, parse_box

__all__ = ["article", "check_length", "concept_tags", "parse", "with_strengths"]
MAX_PROMPT = 32_000  # characters, as in OpenAI's API
MAX_CONCEPTS = 8
CONTEXT = 200  # characters before a tag that are searched for an article

UNKNOWN_HINT = (
    "Teach it with `minikin teach`, put its file into this folder, or write \\< for a plain angle bracket."
)

_TOKEN = re.compile(
    r"\\(?P<escaped>[()\[\]<>\\|:])"
    r"|<(?P<tag>[^<>\n]{1,400})>"
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]<>:]+|[\\<>:])"
)
_BREAK = re.compile(r"\bBREAK\b")
_AND = re.compile(r"\bAND\b")
_EMBEDDING = re.compile(r"(?<![<\w])embedding:[^\s,:()<>\[\]|]+", re.IGNORECASE)
_UNCLOSED = re.compile(r"(?:^|(?<=[\s,(]))<([^\W\d_][\w:.@-]{0,39})")
_UNOPENED = re.compile(r"(?:^|(?<=[\s,(]))([^\W\d_]\w{0,39}(?::[\d.]{1,9})?)>")


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
    """A parsed prompt; `text` is the twin prompt, with categories in place of concepts.

    loras         their names and weights on the U-Net; text_weights has those on the text encoders
    breaks        characters of the twin prompt before which a chunk of tokens ends (BREAK)
    notes         what the prompt asks for and does not get, one sentence each
    edits         of a prompt that changes while an image is sampled: text and uses are those of its end
    edited_uses   with edits: the concepts of all steps, one after the other
    negative      it says what an image should not show: SANA reads it without its instruction
    """

    source: str
    text: str
    uses: tuple[ConceptUse, ...] = ()
    weights: tuple[Weight, ...] = ()
    loras: tuple[tuple[str, float], ...] = ()
    text_weights: tuple[float, ...] = ()
    breaks: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    edits: Edits | None = None
    edited_uses: tuple[ConceptUse, ...] = ()
    negative: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the concepts, each once, in order."""
        return tuple(dict.fromkeys(u.name for u in self.uses))

    @property
    def all_uses(self) -> tuple[ConceptUse, ...]:
        """The uses of concepts in all steps."""
        return self.edited_uses or self.uses

    @property
    def all_names(self) -> tuple[str, ...]:
        """Names of the concepts of all steps, each once."""
        return tuple(dict.fromkeys(u.name for u in self.all_uses))


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
    edits = prompt_editing.read(source)
    if edits is None:
        return _read(source, categories)
    end, every = _read(edits.end(), categories), _read(edits.every(), categories)
    never = (
        f"'{excerpt(edit)}' is prompt editing and adds its words after the last step, never. A weight is "
        "written (word:1.2)."
        for edit in edits.never()
    )
    return replace(
        end,
        source=source,
        loras=every.loras,
        text_weights=every.text_weights,
        notes=(*every.notes, *never),
        edits=edits,
        edited_uses=every.uses,
    )


def _read(source: str, categories: Mapping[str, str]) -> Prompt:
    """Parse a prompt that is the same in every step."""
    reader = _Reader(source, categories)
    text, left_out = _EMBEDDING.subn("", source)
    if left_out and (match := _EMBEDDING.search(source)):
        reader.removed = True
        reader.note(
            f"'{excerpt(match.group())}' is ComfyUI's syntax and is left out: import the embedding (`minikin "
            "concepts import`) and write <name>."
        )
    for m in _TOKEN.finditer(text):
        reader.take(m)
    return reader.finish()


def concept_tags(source: str) -> list[str]:
    """Names of concepts in `<...>` tags, known or not."""
    tags = (read_tag(m["tag"]) for m in _TOKEN.finditer(source) if m["tag"])
    names = (tag.name for tag in tags if tag.kind == "concept")
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


class _Reader:
    """Parser state: plain text, concept uses and weights of the tokens read so far."""

    def __init__(self, source: str, categories: Mapping[str, str]) -> None:
        self.source, self.categories = source, categories
        self.out: list[str] = []
        self.length = 0
        self.uses: list[ConceptUse] = []
        self.loras: list[prompt_tags.LoraUse] = []
        self.breaks: list[int] = []
        self.notes: dict[str, None] = {}  # in order, each once
        self.removed = False  # something that left a double blank
        self.open: dict[str, list[int]] = {"(": [], "[": []}  # positions, apart as in A1111
        self.factors: list[Weight] = []

    def note(self, sentence: str) -> None:
        self.notes[sentence] = None

    def take(self, m: re.Match[str]) -> None:
        if m["tag"] is not None:
            self._tag(m["tag"])
        elif m["open"]:
            self.open[m["open"]].append(self.length)
        elif m["weight"] is not None:
            if self.open["("]:
                self._close("(", float(m["weight"]))
            else:
                self._add(m.group())
        elif m["close"]:
            kind = "(" if m["close"] == ")" else "["
            self._close(kind, 1.1 if kind == "(" else 1 / 1.1)
        elif m["escaped"]:
            self._add(m["escaped"])
        else:
            first, *others = _BREAK.split(m["text"])
            self._add(first.rstrip() if others else first)
            for k, text in enumerate(others, 1):
                self._break()
                self._add(text.lstrip() if k == len(others) else text.strip())

    def _add(self, text: str) -> None:
        self.out.append(text)
        self.length += len(text)

    def _break(self) -> None:
        if self.length:
            self._add(" ")
        self.breaks.append(self.length)

    def _last(self) -> str:
        """The last CONTEXT characters of this chunk so far; the whole text would make parsing quadratic."""
        left = self.length - self.breaks[-1] if self.breaks else self.length
        tail = ""
        for part in reversed(self.out):
            tail = part[-CONTEXT:] + tail
            if len(tail) >= min(CONTEXT, left):
                break
        return tail[len(tail) - left :] if left <= len(tail) else "-" + tail  # begins in the middle of a word

    def _close(self, kind: str, factor: float) -> None:
        if not self.open[kind]:
            self._add(")" if kind == "(" else "]")
            return
        if not 0 <= factor <= 10:
            raise BadRecipe(f"The attention weight {factor:g} is outside 0 to 10.")
        self.factors.append(Weight(self.open[kind].pop(), self.length, factor))

    def _tag(self, text: str) -> None:
        tag = read_tag(text)
        if tag.kind == "lora":
            self._lora(read_lora(tag, text))
        elif tag.kind == "concept":
            self._concept(tag, text)
        else:
            self.removed = True
            self.note(f"'<{excerpt(text)}>' is left out: {FOREIGN[tag.kind]}.")

    def _lora(self, lora: prompt_tags.LoraUse) -> None:
        self.removed = True
        self.loras.append(lora)
        if lora.unread:
            self.note(f"'{excerpt(', '.join(lora.unread))}' of LoRA '{excerpt(lora.name)}' is not followed.")

    def _concept(self, tag: prompt_tags.Tag, text: str) -> None:
        name, (first, *more) = tag.name, tag.arguments or ("",)
        point = first if first in POINT_NAMES else ""
        has_strength = bool(first) and not point
        if more:
            raise BadRecipe(f"<{excerpt(text)}> has more than one strength; write <tom:0.8>.")
        amount = number(first, text) if has_strength else 1.0
        name, at, region = (part.strip() for part in name.partition("@"))
        if name not in self.categories:
            raise UnknownName("concept", name, self.categories, UNKNOWN_HINT)
        if not 0 <= amount <= MAX_STRENGTH:
            raise BadRecipe(
                f"The strength in <{text}> must lie between 0 and {MAX_STRENGTH:g}; 1 is the concept's "
                "own operating point."
            )
        category = self.categories[name]
        if self._last()[-1:].isalnum():  # a photo of<tom>
            self._add(" ")
        self._article(category)
        start = self.length
        self._add(category)
        box = parse_box(region) if at else None
        self.uses.append(ConceptUse(name, amount, start, self.length, point, has_strength, box))

    def _article(self, category: str) -> None:
        """Add the article that the category needs here, or make the one that is written agree with it."""
        before = self._last()
        gap = self.length - self.uses[-1].end if self.uses else CONTEXT
        if needs_article(before) or (gap < len(before) and not before[len(before) - gap :].strip()):
            self._add(article(category) + " ")
        elif self.out:
            written, self.out[-1] = self.out[-1], agreeing(self.out[-1], category)
            moved = len(self.out[-1]) - len(written)
            for starts in self.open.values():  # of emphasis that begins between article and concept
                starts[:] = [at + moved * (at == self.length) for at in starts]
            self.length += moved

    def finish(self) -> Prompt:
        for kind, starts in self.open.items():  # as in A1111, an open bracket ends at the end of the prompt
            self.factors += [Weight(start, self.length, 1.1 if kind == "(" else 1 / 1.1) for start in starts]
        if len({u.name for u in self.uses}) > MAX_CONCEPTS:
            raise BadRecipe(f"At most {MAX_CONCEPTS} concepts fit in one prompt.")
        self._find_mistakes()
        text = "".join(self.out)
        if self.removed:  # a removed tag leaves no double blank
            text, moved = _squeeze(text)
            self.uses = [replace(u, start=moved[u.start], end=moved[u.end]) for u in self.uses]
            self.factors = [Weight(moved[w.start], moved[w.end], w.value) for w in self.factors]
            self.breaks = [moved[at] for at in self.breaks]
        return Prompt(
            self.source,
            text,
            tuple(self.uses),
            tuple(self.factors),
            tuple((lora.name, lora.weight) for lora in self.loras),
            tuple(lora.text_weight for lora in self.loras),
            tuple(self.breaks),
            tuple(self.notes),
        )

    def _find_mistakes(self) -> None:
        """Notes for what is painted as words and was probably not meant so."""
        plain = _without_tags(self.source)
        for pattern, kind in ((_UNCLOSED, "closed"), (_UNOPENED, "opened")):
            if match := pattern.search(plain):
                self.note(f"'{match.group()}' is not {kind} and is painted as words: write <{match[1]}>.")
        if match := _AND.search(self.source):
            self.note(
                "'AND' is A1111's way to combine several prompts and is not followed: all is one prompt, with "
                "the word 'and'."
            )
        for name in sorted(plain_words(self.source) & self.categories.keys() - {u.name for u in self.uses}):
            self.note(word_for_concept(name))
        for sentence in foreign_syntax.notes(plain):
            self.note(sentence)


def plain_words(source: str) -> set[str]:
    """The words of a prompt outside of tags, in lower case; tags of which half is missing are none."""
    plain = _UNOPENED.sub(" ", _UNCLOSED.sub(" ", _without_tags(source)))
    return set(re.findall(r"[\w-]+", plain.lower()))


def word_for_concept(name: str) -> str:
    """The note for a prompt that says a concept's name as a plain word."""
    return f"'{name}' is a word here and not your concept: write <{name}> to paint the concept."


def _without_tags(source: str) -> str:
    return _TOKEN.sub(lambda m: " " if m["tag"] or m["escaped"] else m.group(), source)


def _squeeze(text: str) -> tuple[str, list[int]]:
    """The text without double blanks, and the new position of each character."""
    out, moved = "", []
    for c in text:
        moved.append(len(out))
        if c != " " or (out and not out.endswith(" ")):
            out += c
    moved.append(len(out))
    return out, moved
