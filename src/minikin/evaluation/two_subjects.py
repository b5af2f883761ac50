"""Two-subject test: is each of two subjects on its own side of an image, and how much does one bleed.

The similarity of a half to a subject is the mean cosine of that half's vector with the vectors of its photos.
The scores are rises over the same half of the plain image: same words with the categories in place of the
concepts, same seed.

    gain     mean rise of a half towards its own subject
    bleed    mean rise of a half towards the other subject: 0 where neither shows in the other
    success  share of images in which both halves rise more towards their own subject than towards the other
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.evaluation.encoders import Encoder, Images
from minikin.evaluation.intervals import Estimate, bootstrap_mean, wilson_share


@dataclass(frozen=True)
class TwoSubjectScores:
    """Scores over all images, with 95 % intervals: over prompts for gain and bleed, Wilson's for success."""

    success: Estimate
    gain: Estimate
    bleed: Estimate


def two_subject_scores(
    encoder: Encoder,
    images: Images,
    plain: Images,
    photos: tuple[Tensor, Tensor],
    prompts: Sequence[str],
    seed: int = 0,
) -> TwoSubjectScores:
    """Score images of one subject on the left and another on the right.

    plain   plain image for each image, of equal prompt and seed
    photos  unit vectors (m, d) of the photos of the left and of the right subject
    Raises BadRecipe when there is not one plain image and one prompt for each image.
    """
    if not len(images) == len(plain) == len(prompts) > 0:
        raise BadRecipe(
            f"{len(images)} images, {len(plain)} plain ones, {len(prompts)} prompts: give as many of each."
        )
    rise = half_similarities(encoder, images, photos) - half_similarities(encoder, plain, photos)
    to_own, to_other = rise[:, (0, 1), (0, 1)], rise[:, (0, 1), (1, 0)]
    right = (to_own > to_other).all(1)
    return TwoSubjectScores(
        wilson_share(int(right.sum()), len(right)),
        bootstrap_mean(to_own.mean(1), seed, prompts),
        bootstrap_mean(to_other.mean(1), seed, prompts),
    )


def half_similarities(encoder: Encoder, images: Images, photos: tuple[Tensor, Tensor]) -> np.ndarray:
    """(n, half, subject) = (n, 2, 2): mean cosine of each half with the photos of each subject."""
    halves = []
    for side in (0, 1):
        vectors = encoder.encode_subjects(images, [_half_mask(image.size, side) for image in images])
        halves.append(np.stack([(vectors @ subject.T).mean(1).numpy() for subject in photos], -1))
    return np.stack(halves, 1)


def _half_mask(size: tuple[int, int], side: int) -> np.ndarray:
    """Mask (height, width) of the left (0) or right (1) half."""
    mask = np.zeros((size[1], size[0]), bool)
    middle = size[0] // 2
    mask[:, slice(0, middle) if side == 0 else slice(middle, None)] = True
    return mask
