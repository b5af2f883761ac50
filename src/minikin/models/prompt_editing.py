"""Prompt editing as in A1111: prompts that change while an image is sampled.

    [cat:dog:0.5]   cat in the first half of the steps, dog in the second; [cat:dog:10] from step 10 on
    [dog:0.5]       dog from the middle on         [cat::0.5]  cat until the middle
    [cat|dog]       cat and dog by turns, in every step

Brackets nest. Tags in angle brackets are one word, whatever is in them. `read` finds the edits, `Edits.at` is
the prompt in one step. Brackets without such a meaning stay as they are, as emphasis or as characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from minikin.errors import BadRecipe

MAX_STAGES = 24  # different prompts of one image: each has keys and values of its own
MAX_EDITED = 8_000  # characters of a prompt with edits, which is parsed once for each of them
MAX_DEPTH = 20  # of edits in edits
MAX_SQUARE = 100  # open square brackets; further ones are characters, so that reading takes linear time
MAX_NUMBER = 1e6
END = 10**9

_TOKEN = re.compile(r"(?P<atom>\\.|<[^<>\n]{1,400}>)|(?P<mark>[()\[\]:|])|[^\\()\[\]:|<]+|[\\<]", re.DOTALL)
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*")
Text = tuple["str | Edit", ...]


@dataclass(frozen=True)
class Edit:
    """Options of which one is in the prompt in each step.

    when  the first option until then, the second after; "0.5" a share of the steps, "10" a step.
          "" takes all options by turns
    """

    options: tuple[Text, ...]
    when: str = ""

    def at(self, step: int, total: int) -> Text:
        """The option of a step, counted from 0, of `total`; A1111's rounding."""
        if not self.when:
            return self.options[step % len(self.options)]
        value = max(-MAX_NUMBER, min(float(self.when), MAX_NUMBER))
        until = int(value * total if "." in self.when else value)
        return self.options[0 if step < until else 1]


@dataclass(frozen=True)
class Edits:
    """A prompt with edits."""

    text: Text

    def at(self, step: int, total: int) -> str:
        """The prompt in one step, counted from 0."""
        return "".join(_flat(self.text, lambda edit: (edit.at(step, total),)))

    def end(self) -> str:
        """The prompt after the last step."""
        return self.at(END, END)

    def every(self) -> str:
        """All options one after the other: whatever the prompt names at some time."""
        return "".join(_flat(self.text, lambda edit: (text for o in edit.options for text in (o, (", ",)))))

    def stages(self, total: int) -> tuple[tuple[int, str], ...]:
        """The steps in which another prompt begins, and these prompts.

        Raises BadRecipe for more than MAX_STAGES different ones.
        """
        stages: list[tuple[int, str]] = []
        different: set[str] = set()
        for step in range(total):
            text = self.at(step, total)
            if not stages or stages[-1][1] != text:
                stages.append((step, text))
                different.add(text)
            if len(different) > MAX_STAGES:
                raise BadRecipe(
                    f"Prompt editing makes more than {MAX_STAGES} different prompts of this one, the most that "
                    "an image may have. Use fewer [a:b:0.5] and [a|b]."
                )
        return tuple(stages)

    def never(self) -> tuple[str, ...]:
        """Edits that put nothing in at any time: [word:1.2] asks for step 120 % on."""
        late = (e for e in self.text if isinstance(e, Edit) and "." in e.when and float(e.when) > 1)
        return tuple(
            f"[{':'.join([*(''.join(_flat(o, lambda x: x.options)) for o in e.options if o), e.when])}]"
            for e in late
        )


def _flat(text: Text, choose: Callable[[Edit], Iterable[Text]]) -> Iterator[str]:
    """The text with the chosen options in place of each edit."""
    for part in text:
        if isinstance(part, str):
            yield part
        else:
            for option in choose(part):
                yield from _flat(option, choose)


class _Square:
    """An open square bracket, or the whole prompt: its parts so far, separated by ':' or '|'."""

    def __init__(self) -> None:
        self.parts: list[list[str | Edit]] = [[]]
        self.marks: list[str] = []

    def add(self, part: str | Edit) -> None:
        self.parts[-1].append(part)

    def separate(self, mark: str) -> None:
        self.marks.append(mark)
        self.parts.append([])

    def literal(self) -> list[str | Edit]:
        """The open bracket and its content as characters."""
        out: list[str | Edit] = ["[", *self.parts[0]]
        for mark, part in zip(self.marks, self.parts[1:], strict=True):
            out += [mark, *part]
        return out

    def closed(self) -> list[str | Edit]:
        """The edit that the bracket means, or its characters."""
        *options, last = self._split(":")
        words = [part for part in last if isinstance(part, str)]
        when = _NUMBER.fullmatch("".join(words)) if len(words) == len(last) else None
        if when and len(options) in (1, 2):
            return [Edit((options[0] if len(options) == 2 else (), options[-1]), when[1])]
        if "|" in self.marks:
            return [Edit(tuple(self._split("|")))]
        return [*self.literal(), "]"]

    def _split(self, separator: str) -> list[Text]:
        """The content between these marks; other marks in it are characters."""
        out = [self.parts[0]]
        for mark, part in zip(self.marks, self.parts[1:], strict=True):
            if mark == separator:
                out.append(part)
            else:
                out[-1] = [*out[-1], mark, *part]
        return [tuple(part) for part in out]


def read(source: str) -> Edits | None:
    """The edits of a prompt; None if it has none, and is the same in every step.

    Raises BadRecipe for edits that are nested deeper than MAX_DEPTH, and in a prompt longer than MAX_EDITED.
    """
    if "[" not in source or not (":" in source or "|" in source):
        return None
    squares = [_Square()]
    rounds = [0]  # open round brackets inside each square one: a colon in them is a weight's
    for m in _TOKEN.finditer(source):
        mark = m["mark"]
        if mark == "[" and len(squares) <= MAX_SQUARE:
            squares.append(_Square())
            rounds.append(0)
        elif mark == "]" and len(squares) > 1:
            rounds.pop()
            for part in squares.pop().closed():
                squares[-1].add(part)
        elif mark in (":", "|") and len(squares) > 1 and not rounds[-1]:
            squares[-1].separate(mark)
        else:
            rounds[-1] = max(0, rounds[-1] + {"(": 1, ")": -1}.get(mark or "", 0))
            squares[-1].add(m.group())
    text = (*squares[0].parts[0], *(part for square in squares[1:] for part in square.literal()))
    if not any(isinstance(part, Edit) for part in text):
        return None
    if len(source) > MAX_EDITED:
        raise BadRecipe(
            f"The prompt has {len(source)} characters; one with prompt editing, [a:b:0.5] or [a|b], may have "
            f"{MAX_EDITED}. Shorten it, or write \\[ for a plain bracket."
        )
    _check_depth(text)
    return Edits(text)


def _check_depth(text: Text) -> None:
    level = [text]
    for _ in range(MAX_DEPTH):
        level = [o for t in level for part in t if isinstance(part, Edit) for o in part.options]
        if not level:
            return
    raise BadRecipe(f"Prompt editing is nested more than {MAX_DEPTH} deep; write fewer brackets in brackets.")
