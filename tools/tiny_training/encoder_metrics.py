"""How good the judges are, on scenes and identities that training never saw.

Nothing here draws or changes images except `Held.draw`; an image changer (an autoencoder's round
trip, say) can be put between, so that judges are measured on what they will really be shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from minikin.tiny.captions import caption
from minikin.tiny.encoders.classifier import Verdicts
from minikin.tiny.encoders.dual_encoder import Judge
from minikin.tiny.encoders.fields import UNKNOWN, Field, truth
from minikin.tiny.encoders.preprocess import Masks, Pictures
from minikin.tiny.world import Scene, World

if TYPE_CHECKING:
    from tools.tiny_training.hard_negatives import Lookalikes

HELD_SEED = 4242  # of the scenes that judges are measured on
AMONG = 50  # captions


@dataclass(frozen=True)
class Held:
    """Held-out scenes: images (n, 128, 128, 3) uint8 and all that is true of them."""

    scenes: tuple[Scene, ...]
    pictures: np.ndarray
    captions: tuple[str, ...]
    truth: Mapping[str, np.ndarray]

    @classmethod
    def draw(cls, world: World, n: int = 400, seed: int = HELD_SEED) -> Held:
        """n scenes of the test split, of a seed that nothing is trained on.

        The model never met these combinations; the judges did (build/material.py says why).
        """
        scenes = tuple(world.scene(seed, i, "test") for i in range(n))
        rows = [truth(s, world.spec) for s in scenes]
        return cls(
            scenes,
            np.stack([np.asarray(world.draw(s)[0]) for s in scenes]),
            tuple(caption(s, np.random.default_rng((seed, i))).text for i, s in enumerate(scenes)),
            {k: np.stack([r[k] for r in rows]) for k in rows[0]},
        )


def caption_of(judge: Judge, pictures: Pictures, captions: tuple[str, ...]) -> float:
    """Share of images whose own caption fits best among those of 50 images.

    Groups of 50 follow each other; an equal caption of another image counts as its own.
    """
    n = len(captions) // AMONG * AMONG
    fit = judge.fit(pictures, captions)
    hits = 0
    for start in range(0, n, AMONG):
        here = slice(start, start + AMONG)
        best = fit[here, here].argmax(1)
        hits += sum(captions[start + i] == captions[start + int(k)] for i, k in enumerate(best))
    return hits / n


def auc(higher: np.ndarray, lower: np.ndarray) -> float:
    """The chance that one of the first numbers is above one of the second; ties count half."""
    low = np.sort(lower)
    below = np.searchsorted(low, higher, "left") + np.searchsorted(low, higher, "right")
    return float(below.mean() / (2 * len(low)))


def identity_auc(
    likeness: Callable[[Pictures, Masks | None], Tensor], seen: Lookalikes, *, masked: bool = False,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
) -> float:  # fmt: skip
    """AUC of cosines: two views of one thing, against views of two things of one block.

    A block holds things of one category, of which two are the same drawing and two share their
    look. masked: with true masks; otherwise only images in which the thing is alone (or in a hat).
    """
    pictures = np.asarray(seen.pictures)
    use = np.ones(len(pictures), bool) if masked else ~seen.needs_mask
    masks = seen.mask(np.arange(len(pictures))) if masked else None
    vectors = likeness(change(pictures) if change else pictures, masks)
    cosine = (vectors @ vectors.T).numpy()
    same_block = seen.identity[:, None] // 4 == seen.identity[None] // 4
    one, two = np.nonzero(np.triu(same_block & use[:, None] & use[None], 1))
    same = seen.identity[one] == seen.identity[two]
    values = cosine[one, two]
    return auc(values[same], values[~same])


def examples_auc(vectors: Mapping[str, Tensor], category: Mapping[str, str]) -> tuple[float, float]:
    """AUC over named things with some vectors (n, d) each: against all others, and within a category."""
    same = [float(v) for t in vectors.values() for v in _pairs(t)]
    other: list[float] = []
    near: list[float] = []
    for a, b in combinations(vectors, 2):
        values = (vectors[a] @ vectors[b].T).flatten().tolist()
        other += values
        near += values if category[a] == category[b] else []
    return auc(np.array(same), np.array(other)), auc(np.array(same), np.array(near)) if near else 1.0


def accuracies(verdicts: Verdicts, true: Mapping[str, np.ndarray]) -> dict[str, tuple[int, int]]:
    """(right, asked) by field; of several answers, all must be right."""
    out = {}
    for name, field in verdicts.fields.items():
        known = true[name] != UNKNOWN
        asked = known.all(-1) if field.is_multiple else known
        out[name] = (int(_right(verdicts, field, true[name])[asked].sum()), int(asked.sum()))
    return out


def _right(verdicts: Verdicts, field: Field, true: np.ndarray) -> np.ndarray:
    p = verdicts.probability(field.name)
    if field.is_multiple:
        return np.asarray(((p > 0.5) == (true == 1)).all(-1))
    return np.asarray(p.argmax(-1) == true)


def _pairs(vectors: Tensor) -> Tensor:
    cosine = vectors @ vectors.T
    return cosine[torch.triu(torch.ones_like(cosine), 1) > 0]
