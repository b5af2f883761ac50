"""What the text tower has to know of a caption: batches of tokens with the truth behind them.

Every caption comes with a *twin*: the same words with each one-token noun replaced by another. Where
both have the same token, both must get the same encoding; otherwise a causal encoder smears the
subject over everything behind it, and an edit of the subject's encoding leaks there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minikin.tiny import vocabulary as words
from minikin.tiny.captions import Caption, caption
from minikin.tiny.world import Scene, Split, World
from minikin.training.plan import Turn

SEED = 11  # the stream of scenes for captions
RANDOM_SHARE = 6  # one random row of tokens for so many captions: words no caption has
CATEGORIES = tuple(words.CATEGORIES)
LOOKS = ("none", *words.COLOURS, *words.PATTERNS)
BACKGROUNDS = (*words.BACKGROUNDS, *(f"plain_{c}" for c in words.WIDE.plain), "not said")
ART = (*words.ART_SETS, "not said")
LAYOUTS = ("single", "pair", "hat", "top", "hold", "count", "empty")
SIZES = ("normal", *words.SIZES)
COUNTS = ("1", "2", "3")
TREATMENTS = ("none", *words.TREATMENTS)
STANDS = (*CATEGORIES, "no pair")
CHOICES = (BACKGROUNDS, ART, LAYOUTS, COUNTS, SIZES, TREATMENTS, STANDS, STANDS)  # one answer each; left, right
SIDES = ("left", "right")
UNKNOWN = -100  # what cross entropy leaves out


@dataclass(frozen=True)
class Batch:
    """B captions, their twins, and R rows of random tokens, of one width L.

    ids, twins (B, L); noise (R, L); end (B,) position of the end token; alike (B, L) bool: where a
    caption and its twin have the same token before the end
    nouns (P, 2) row and position; kinds, looks (P,) their category and look; sides (P,) where the second
    noun of a pair stands, UNKNOWN for the others: a causal encoder cannot know it at the first
    objects (B, C), colours (B, K) 0 or 1; choices (B, 8) indices into CHOICES
    """

    ids: Tensor
    twins: Tensor
    noise: Tensor
    end: Tensor
    alike: Tensor
    nouns: Tensor
    kinds: Tensor
    looks: Tensor
    sides: Tensor
    objects: Tensor
    colours: Tensor
    choices: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(**{k: v.to(device, non_blocking=True) for k, v in self.__dict__.items()})


class Captions:
    """Draws batches of captions of several worlds, in turn."""

    def __init__(self, worlds: Sequence[World], tokenizer: Any, context: int) -> None:
        self.worlds, self.tokenizer, self.context = worlds, tokenizer, context
        self._lengths: dict[str, int] = {}
        self.replacements = [c for c in CATEGORIES if self._length(c) == 1]

    def batch(self, turn: Turn, split: Split = "train") -> Batch:
        rng = turn.rng
        scenes, said, twins = [], [], []
        for k in range(turn.size):
            number = turn.step * turn.size + k
            scene = self.worlds[k % len(self.worlds)].scene(SEED + turn.seed[0], number, split)
            c = caption(scene, rng)
            scenes.append(scene)
            said.append(c)
            twins.append(self._twin(c, rng))
        ids, offsets = self._tokens([c.text for c in said])
        twin_ids, _ = self._tokens(twins)
        end_token = self.tokenizer.eos_token_id
        end = (ids == end_token).int().argmax(1)
        width = min(self.context, max(24, int(end.max()) + 4))
        same_length = (twin_ids == end_token).int().argmax(1) == end
        before = torch.arange(self.context)[None] < end[:, None]
        alike = (ids == twin_ids) & before & same_length[:, None]
        nouns, kinds, looks, sides = self._nouns(scenes, said, offsets, end)
        return Batch(
            ids[:, :width], twin_ids[:, :width], self._noise(rng, turn.size, width), end, alike[:, :width],
            nouns, kinds, looks, sides, *_whole(scenes, said),
        )  # fmt: skip

    def _tokens(self, texts: list[str]) -> tuple[Tensor, np.ndarray]:
        """Ids (B, context) and the characters of every token (B, context, 2)."""
        found = self.tokenizer(
            texts, padding="max_length", max_length=self.context, truncation=True, return_offsets_mapping=True
        )
        return torch.tensor(found["input_ids"]), np.asarray(found["offset_mapping"])

    def _length(self, word: str) -> int:
        if word not in self._lengths:
            self._lengths[word] = len(self.tokenizer(word, add_special_tokens=False)["input_ids"])
        return self._lengths[word]

    def _twin(self, c: Caption, rng: np.random.Generator) -> str:
        text = c.text
        for _, start, end in sorted(c.nouns, key=lambda n: -n[1]):
            if self.replacements and self._length(text[start:end]) == 1:
                other = self.replacements[int(rng.integers(len(self.replacements)))]
                text = text[:start] + other + text[end:]
        return text

    def _noise(self, rng: np.random.Generator, captions: int, width: int) -> Tensor:
        t = self.tokenizer
        n = max(1, captions // RANDOM_SHARE)
        rows = torch.full((n, width), t.pad_token_id)
        rows[:, 0] = t.bos_token_id
        ordinary = min(t.bos_token_id, t.eos_token_id)  # the special tokens are the last ones
        for row, length in zip(rows, rng.integers(3, width - 3, n).tolist(), strict=True):
            row[1 : 1 + length] = torch.from_numpy(rng.integers(0, ordinary, length))
        return rows

    def _nouns(
        self, scenes: Sequence[Scene], said: Sequence[Caption], offsets: np.ndarray, end: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The last token of every noun, what it names, and where that stands."""
        places, kinds, looks, sides = [], [], [], []
        for row, (scene, c) in enumerate(zip(scenes, said, strict=True)):
            look = {t.category: t.look.pattern or t.look.colour or "none" for t in scene.things}
            starts, ends = offsets[row, : int(end[row]), 0], offsets[row, : int(end[row]), 1]
            for number, (category, first, last) in enumerate(c.nouns):
                inside = np.nonzero((ends > first) & (starts < last))[0]
                if len(inside):
                    places.append((row, int(inside[-1])))
                    kinds.append(CATEGORIES.index(category))
                    looks.append(LOOKS.index(look[category]))
                    second = scene.layout == "pair" and number == 1
                    sides.append(_standing(scene).index(category) if second else UNKNOWN)
        told = [torch.tensor(t).long() for t in (kinds, looks, sides)]
        return torch.tensor(places).view(-1, 2), told[0], told[1], told[2]


def _standing(scene: Scene) -> list[str]:
    """The categories from left to right."""
    return [t.category for t in sorted(scene.things, key=lambda t: t.centre_x)]


def _whole(scenes: Sequence[Scene], said: Sequence[Caption]) -> tuple[Tensor, Tensor, Tensor]:
    """What the end token has to tell: objects and colours in the image, and what the caption says."""
    objects, colours = torch.zeros(len(scenes), len(CATEGORIES)), torch.zeros(len(scenes), len(LOOKS))
    choices = []
    for row, (s, c) in enumerate(zip(scenes, said, strict=True)):
        objects[row, [CATEGORIES.index(o) for o in s.objects]] = 1
        colours[row, [LOOKS.index(t.look.pattern or t.look.colour or "none") for t in s.things]] = 1
        phrases = words.BACKGROUNDS.get(s.background, ())
        placed = "background" in c.text if s.is_plain else any(p in c.text for p in phrases)
        styled = any(p in c.text for p in words.ART_SETS[s.art].words)
        answers = (
            s.background if placed else "not said", s.art if styled else "not said", s.layout, str(s.count),
            s.size or "normal", s.treatment or "none",
            *(_standing(s) if s.layout == "pair" else ("no pair", "no pair")),
        )  # fmt: skip
        choices.append([names.index(a) for names, a in zip(CHOICES, answers, strict=True)])
    return objects, colours, torch.tensor(choices)
