"""Metrics of the encoders on scenes and identities that training never used.

A function that changes images, such as an autoencoder's round trip, can be given, so that the encoders are
measured on images as a model generates them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from minikin.tiny.captions import caption
from minikin.tiny.encoders.classifier import Predictions
from minikin.tiny.encoders.fields import UNKNOWN, Field, truth
from minikin.tiny.encoders.preprocess import Images, Masks
from minikin.tiny.world import Scene, World

if TYPE_CHECKING:
    from tools.tiny_training.hard_negatives import HardNegatives

HELD_SEED = 4242  # of the scenes for the evaluation of encoders
CANDIDATES = 50  # captions


@dataclass(frozen=True)
class HeldOut:
    """Held-out scenes with images (n, 128, 128, 3) uint8, captions and labels."""

    scenes: tuple[Scene, ...]
    images: np.ndarray
    captions: tuple[str, ...]
    truth: Mapping[str, np.ndarray]

    @classmethod
    def draw(cls, world: World, n: int = 400, seed: int = HELD_SEED) -> HeldOut:
        """n scenes of the test split, of a seed that nothing is trained on.

        The diffusion model was not trained on these combinations, the encoders were (training_data.py).
        """
        scenes = tuple(world.scene(seed, i, "test") for i in range(n))
        rows = [truth(s, world.spec) for s in scenes]
        return cls(
            scenes,
            np.stack([np.asarray(world.draw(s)[0]) for s in scenes]),
            tuple(caption(s, np.random.default_rng((seed, i))).text for i, s in enumerate(scenes)),
            {k: np.stack([r[k] for r in rows]) for k in rows[0]},
        )


def caption_accuracy(fit: Tensor, captions: Sequence[str]) -> float:
    """Share of images whose caption fits best among the captions of a group of 50 images.

    fit  cosine similarity of every image with every caption, as `DualEncoder.fit` returns it
    Groups are consecutive; an equal caption of another image counts as correct.
    """
    n = len(captions) // CANDIDATES * CANDIDATES
    hits = 0
    for start in range(0, n, CANDIDATES):
        here = slice(start, start + CANDIDATES)
        best = fit[here, here].argmax(1)
        hits += sum(captions[start + i] == captions[start + int(k)] for i, k in enumerate(best))
    return hits / n


def auc(higher: np.ndarray, lower: np.ndarray) -> float:
    """Area under the ROC curve.

    It is the probability that a number of `higher` is above one of `lower`; ties count half.
    """
    low = np.sort(lower)
    below = np.searchsorted(low, higher, "left") + np.searchsorted(low, higher, "right")
    return float(below.mean() / (2 * len(low)))


def identity_auc(
    encode: Callable[[Images, Masks | None], Tensor],
    negatives: HardNegatives,
    *,
    masked: bool = False,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
) -> float:
    """AUC of cosine similarities: pairs of one identity against pairs of two identities of one block.

    A block holds identities of one category, of which two are the same drawing and two share their look.

    masked  use the true masks; otherwise only images with one subject (it may wear a hat)
    change  applied to the images before they are encoded
    """
    images = np.asarray(negatives.images)
    use = np.ones(len(images), bool) if masked else ~negatives.needs_mask
    masks = negatives.mask(np.arange(len(images))) if masked else None
    vectors = encode(change(images) if change else images, masks)
    cosine = (vectors @ vectors.T).numpy()
    same_block = negatives.identity[:, None] // 4 == negatives.identity[None] // 4
    first, second = np.nonzero(np.triu(same_block & use[:, None] & use[None], 1))
    same = negatives.identity[first] == negatives.identity[second]
    values = cosine[first, second]
    return auc(values[same], values[~same])


def examples_auc(vectors: Mapping[str, Tensor], category: Mapping[str, str]) -> tuple[float, float]:
    """AUC of named subjects with vectors (n, d) each: against all others, and against those of the category."""
    same = [float(v) for t in vectors.values() for v in _pairs(t)]
    other: list[float] = []
    same_category: list[float] = []
    for a, b in combinations(vectors, 2):
        values = (vectors[a] @ vectors[b].T).flatten().tolist()
        other += values
        same_category += values if category[a] == category[b] else []
    return auc(np.array(same), np.array(other)), auc(
        np.array(same), np.array(same_category)
    ) if same_category else 1.0


def accuracies(predictions: Predictions, true: Mapping[str, np.ndarray]) -> dict[str, tuple[int, int]]:
    """(correct, total) by field; of a field with several answers all must be correct."""
    out = {}
    for name, field in predictions.fields.items():
        has_answer = true[name] != UNKNOWN
        is_asked = has_answer.all(-1) if field.is_multiple else has_answer
        out[name] = (int(_right(predictions, field, true[name])[is_asked].sum()), int(is_asked.sum()))
    return out


def _right(predictions: Predictions, field: Field, true: np.ndarray) -> np.ndarray:
    p = predictions.probability(field.name)
    if field.is_multiple:
        return np.asarray(((p > 0.5) == (true == 1)).all(-1))
    return np.asarray(p.argmax(-1) == true)


def _pairs(vectors: Tensor) -> Tensor:
    cosine = vectors @ vectors.T
    return cosine[torch.triu(torch.ones_like(cosine), 1) > 0]
