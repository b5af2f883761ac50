"""Training data of the text encoder: batches of captions as tokens, with labels of their scenes.

Every caption comes with a *minimal pair*: the same words with each one-token noun replaced by another.
Where both have the same token, both must get the same encoding; otherwise a causal encoder spreads the
subject over all later positions, and an edit of the subject's encoding leaks there.
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
from minikin.tiny.encoders.fields import SLOTS, slots_of
from minikin.tiny.world import Scene, Split, World
from minikin.training.config import StepContext

SEED = 11  # of the scenes for captions
RANDOM_SHARE = 6  # captions for one row of random tokens, which trains words that captions lack
CATEGORIES = tuple(words.CATEGORIES)
LOOKS = ("none", *words.COLOURS, *words.PATTERNS)
BACKGROUNDS = (*words.BACKGROUNDS, *(f"plain_{c}" for c in words.WIDE.plain), "not said")
ART = (*words.ART_SETS, "not said")
LAYOUTS = words.LAYOUTS
SIZES = ("normal", *words.SIZES)
COUNTS = ("1", "2", "3")
TREATMENTS = ("none", *words.TREATMENTS)
NOTHING = "nothing"
STANDS = (*CATEGORIES, NOTHING)
# one answer each; the last three: the category in each slot of a scene with different things
CHOICES = (BACKGROUNDS, ART, LAYOUTS, COUNTS, SIZES, TREATMENTS, *(STANDS for _ in SLOTS))
UNKNOWN = -100  # what cross entropy leaves out


@dataclass(frozen=True)
class Batch:
    """B captions, their minimal pairs, and R rows of random tokens, all of width L.

    ids, minimal_pairs  (B, L) tokens
    noise     (R, L) random tokens
    end       (B,) position of the end token
    is_same   (B, L) True where a caption and its minimal pair have the same token before the end
    nouns     (P, 2) row and position of every noun
    kinds, looks  (P,) its category and look
    slots     (P,) slot of every noun but the first, UNKNOWN there: a causal encoder cannot know it yet
    objects (B, C), colours (B, K)  0 or 1
    choices   (B, 9) indices into CHOICES
    """

    ids: Tensor
    minimal_pairs: Tensor
    noise: Tensor
    end: Tensor
    is_same: Tensor
    nouns: Tensor
    kinds: Tensor
    looks: Tensor
    slots: Tensor
    objects: Tensor
    colours: Tensor
    choices: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(**{k: v.to(device, non_blocking=True) for k, v in self.__dict__.items()})


class Captions:
    """Draws batches of captions, from several worlds by turns."""

    def __init__(self, worlds: Sequence[World], tokenizer: Any, context: int) -> None:
        self.worlds, self.tokenizer, self.context = worlds, tokenizer, context
        self._lengths: dict[str, int] = {}
        self.replacements = [c for c in CATEGORIES if self._length(c) == 1]

    def batch(self, ctx: StepContext, split: Split = "train") -> Batch:
        rng = ctx.rng
        scenes, captions, minimal_pairs = [], [], []
        for k in range(ctx.batch_size):
            number = ctx.step * ctx.batch_size + k
            scene = self.worlds[k % len(self.worlds)].scene(SEED + ctx.seed[0], number, split)
            scene_caption = caption(scene, rng)
            scenes.append(scene)
            captions.append(scene_caption)
            minimal_pairs.append(self._minimal_pair(scene_caption, rng))
        ids, offsets = self._tokens([c.text for c in captions])
        minimal_ids, _ = self._tokens(minimal_pairs)
        end_token = self.tokenizer.eos_token_id
        end = (ids == end_token).int().argmax(1)
        width = min(self.context, max(24, int(end.max()) + 4))
        same_length = (minimal_ids == end_token).int().argmax(1) == end
        before = torch.arange(self.context)[None] < end[:, None]
        is_same = (ids == minimal_ids) & before & same_length[:, None]
        nouns, kinds, looks, slots = self._nouns(scenes, captions, offsets, end)
        return Batch(
            ids[:, :width],
            minimal_ids[:, :width],
            self._noise(rng, ctx.batch_size, width),
            end,
            is_same[:, :width],
            nouns,
            kinds,
            looks,
            slots,
            *_whole(scenes, captions),
        )

    def _tokens(self, texts: list[str]) -> tuple[Tensor, np.ndarray]:
        """Ids (B, context) and the characters of every token (B, context, 2)."""
        encoded = self.tokenizer(
            texts, padding="max_length", max_length=self.context, truncation=True, return_offsets_mapping=True
        )
        return torch.tensor(encoded["input_ids"]), np.asarray(encoded["offset_mapping"])

    def _length(self, word: str) -> int:
        if word not in self._lengths:
            self._lengths[word] = len(self.tokenizer(word, add_special_tokens=False)["input_ids"])
        return self._lengths[word]

    def _minimal_pair(self, c: Caption, rng: np.random.Generator) -> str:
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
        self, scenes: Sequence[Scene], captions: Sequence[Caption], offsets: np.ndarray, end: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Position of the last token of every noun, its category, look and slot."""
        places, kinds, looks, slots = [], [], [], []
        for row, (scene, c) in enumerate(zip(scenes, captions, strict=True)):
            looks_by_category = {t.category: t.look.pattern or t.look.colour or "none" for t in scene.things}
            starts, ends = offsets[row, : int(end[row]), 0], offsets[row, : int(end[row]), 1]
            for number, (category, first, last) in enumerate(c.nouns):
                inside = np.nonzero((ends > first) & (starts < last))[0]
                if len(inside):
                    places.append((row, int(inside[-1])))
                    kinds.append(CATEGORIES.index(category))
                    looks.append(LOOKS.index(looks_by_category[category]))
                    slots.append(_standing(scene).index(category) if number else UNKNOWN)
        tensors = [torch.tensor(t).long() for t in (kinds, looks, slots)]
        return torch.tensor(places).view(-1, 2), tensors[0], tensors[1], tensors[2]


def _standing(scene: Scene) -> list[str]:
    """The category in each slot of a scene with different things."""
    things = slots_of(scene) if len(scene.objects) > 1 else ()
    return [t.category for t in things] + [NOTHING] * (len(SLOTS) - len(things))


def _whole(scenes: Sequence[Scene], captions: Sequence[Caption]) -> tuple[Tensor, Tensor, Tensor]:
    """Labels of the end token: objects and colours in the image, and choices that the caption names."""
    objects, colours = torch.zeros(len(scenes), len(CATEGORIES)), torch.zeros(len(scenes), len(LOOKS))
    choices = []
    for row, (s, c) in enumerate(zip(scenes, captions, strict=True)):
        objects[row, [CATEGORIES.index(o) for o in s.objects]] = 1
        colours[row, [LOOKS.index(t.look.pattern or t.look.colour or "none") for t in s.things]] = 1
        phrases = words.BACKGROUNDS.get(s.background, ())
        placed = "background" in c.text if s.is_plain else any(p in c.text for p in phrases)
        styled = any(p in c.text for p in words.ART_SETS[s.art].words)
        answers = (
            s.background if placed else "not said",
            s.art if styled else "not said",
            s.layout,
            str(s.count),
            s.size or "normal",
            s.treatment or "none",
            *_standing(s),
        )
        choices.append([names.index(a) for names, a in zip(CHOICES, answers, strict=True)])
    return objects, colours, torch.tensor(choices)
