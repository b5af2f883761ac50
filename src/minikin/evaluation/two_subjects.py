"""Two things in one image: whether each stands on its own side, and how much of one is in the other.

A half's likeness to a thing is the mean cosine of what the judge sees in that half with its photos. What
counts is by how much it rises over the same half of the plain image: the same words with the
categories in place of the concepts, and the same seed.

    gain     mean rise of a half to its own thing
    bleed    mean rise of a half to the other thing: 0 where neither shows in the other
    success  share of images in which both halves rise more to their own thing than to the other
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.evaluation.encoders import Judge, Pictures
from minikin.evaluation.intervals import Measured, mean, share


@dataclass(frozen=True)
class Together:
    """Of all images, with 95 % intervals: over prompts for gain and bleed, Wilson's for success."""

    success: Measured
    gain: Measured
    bleed: Measured


def together(
    judge: Judge, pictures: Pictures, plain: Pictures, photos: tuple[Tensor, Tensor],
    prompts: Sequence[str], seed: int = 0,
) -> Together:  # fmt: skip
    """Judge images of one thing on the left and another on the right.

    plain   the plain image of each, of equal prompt and seed
    photos  what the judge sees in the photos of the left and of the right thing, unit vectors (m, d)
    Raises BadRecipe when there is not one plain image and prompt for each.
    """
    if not len(pictures) == len(plain) == len(prompts) > 0:
        raise BadRecipe(
            f"{len(pictures)} images, {len(plain)} plain ones, {len(prompts)} prompts: give as many of each."
        )
    rise = halves(judge, pictures, photos) - halves(judge, plain, photos)
    own, other = rise[:, (0, 1), (0, 1)], rise[:, (0, 1), (1, 0)]
    right = (own > other).all(1)
    return Together(
        share(int(right.sum()), len(right)),
        mean(own.mean(1), seed, prompts),
        mean(other.mean(1), seed, prompts),
    )


def halves(judge: Judge, pictures: Pictures, photos: tuple[Tensor, Tensor]) -> np.ndarray:
    """(n, 2, 2): the mean cosine of the left and the right half with the photos of either thing."""
    found = []
    for side in (0, 1):
        seen = judge.likeness(pictures, [_half(p.size, side) for p in pictures])
        found.append(np.stack([(seen @ known.T).mean(1).numpy() for known in photos], -1))
    return np.stack(found, 1)


def _half(size: tuple[int, int], side: int) -> np.ndarray:
    """The mask (height, width) of one half."""
    mask = np.zeros((size[1], size[0]), bool)
    middle = size[0] // 2
    mask[:, slice(0, middle) if side == 0 else slice(middle, None)] = True
    return mask
