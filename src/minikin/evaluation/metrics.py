"""Metrics of generated images from an encoder's unit vectors, each with its 95 % interval.

    text_alignment           does the image show its prompt                 CLIP-T (arXiv:2208.01618)
    r_precision              does its own prompt fit best of all            R-precision (arXiv:1711.10485)
    subject_fidelity         does the image show the thing of the photos    CLIP-I, DINO (arXiv:2208.12242)
    diversity                do images of one prompt differ                 DIV there, cosine instead of LPIPS
    drift                    did images without the concept change          PEFT's image benchmark
    ccd                      how far is confidence below that on photos     CCD (arXiv:2306.04695)
    background_preservation  did anything outside the subject change        Seg-Cons (arXiv:2603.07561)

docs/evaluation.md defines each. Vectors are rows (n, d) of length 1, as encoders return them. `prompts` gives
the prompt of each image (any hashable values). Intervals are a percentile bootstrap over prompts, because
images of one prompt resemble each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.evaluation.intervals import (
    RESAMPLES,
    Estimate,
    Groups,
    bootstrap_counts,
    bootstrap_mean,
    percentile_interval,
)

PIXEL_TOLERANCE = 0.1  # of a channel's range: a pixel that moves less counts as preserved


def text_alignment(images: Tensor, texts: Tensor, prompts: Groups, seed: int = 0) -> Estimate:
    """Mean cosine of each image (n, d) with its plain prompt (n, d), the category in place of <tom>: CLIP-T."""
    _require_same_shape(images, texts, "texts")
    return bootstrap_mean((images.double() * texts.double()).sum(1).numpy(), seed, prompts)


def r_precision(images: Tensor, texts: Tensor, prompts: Groups, seed: int = 0) -> Estimate:
    """Share of images (n, d) whose own prompt fits best of all k prompts; chance is 1 / k.

    texts    (k, d), of the different prompts in the order in which `prompts` first names them
    The category is in every prompt and cancels out, so this does not fall when the thing is unlike others of
    its category, as text alignment does. Raises BadRecipe for a single prompt.
    """
    names = list(dict.fromkeys(prompts))
    if len(names) < 2 or len(names) != len(texts) or len(prompts) != len(images):
        raise BadRecipe(
            f"R-precision needs at least two different prompts, with one text each; got {len(names)} "
            f"different ones in {len(prompts)}, {len(texts)} texts and {len(images)} images."
        )
    labels = torch.tensor([names.index(p) for p in prompts])
    best = (images.double() @ texts.double().T).argmax(1)
    return bootstrap_mean((best == labels).double().numpy(), seed, prompts)


def subject_fidelity(subjects: Tensor, photos: Tensor, prompts: Groups, seed: int = 0) -> Estimate:
    """Mean cosine over all pairs of an image (n, d) and a photo (m, d): CLIP-I or DINO, by the encoder.

    The photos are taken as given; the interval is over prompts. Raises BadRecipe without photos.
    """
    if not len(photos):
        raise BadRecipe("Subject fidelity compares with photos; none were given.")
    return bootstrap_mean((subjects.double() @ photos.double().T).mean(1).numpy(), seed, prompts)


def real_image_upper_bound(photos: Tensor) -> float:
    """Mean cosine over all pairs of different photos (m, d): the subject fidelity of real images.

    DreamBooth, table 1, row "Real Images". Raises BadRecipe for fewer than two photos.
    """
    if len(photos) < 2:
        raise BadRecipe(
            f"The real-image upper bound compares photos with each other; got {len(photos)} of them."
        )
    return 1 - _mean_distance(photos)


def diversity(images: Tensor, prompts: Sequence[object] | np.ndarray, seed: int = 0) -> Estimate:
    """Mean cosine distance between two images of one prompt, averaged over prompts.

    Prompts with a single image are left out. Raises BadRecipe when no prompt has two.
    """
    rows: dict[object, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    distances = [_mean_distance(images[indices]) for indices in rows.values() if len(indices) > 1]
    if not distances:
        raise BadRecipe("Diversity needs at least two images of one prompt. Generate more of each.")
    return bootstrap_mean(np.array(distances), seed)


def drift(before: Tensor, after: Tensor, prompts: Groups | None = None, seed: int = 0) -> Estimate:
    """(1 - cosine) / 2 between images (n, d) of the same prompts and seeds before and after a change.

    Exactly 0 for equal images: for unit vectors it is a quarter of the squared distance.
    """
    _require_same_shape(before, after, "images after the change")
    return bootstrap_mean(((before.double() - after.double()).square().sum(1) / 4).numpy(), seed, prompts)


def ccd(real: np.ndarray, generated: np.ndarray, prompts: Groups | None = None, seed: int = 0) -> Estimate:
    """Concept confidence deviation: mean confidence in the true concept, real (m,) minus generated (n,).

    0 means as good as real, larger is worse, below 0 the classifier is surer of generated ones. Both sets are
    resampled for the interval. Raises BadRecipe when one is empty.
    """
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    if not (len(real) and len(generated)):
        raise BadRecipe(f"CCD needs real and generated images, got {len(real)} and {len(generated)}.")
    rng = np.random.default_rng(seed)
    a = bootstrap_counts(len(real), RESAMPLES, rng)
    b = bootstrap_counts(len(generated), RESAMPLES, rng, prompts)
    resampled = a @ real / a.sum(1) - b @ generated / b.sum(1)
    return percentile_interval(float(real.mean() - generated.mean()), resampled, len(generated))


def background_preservation(
    without: np.ndarray,
    generated: np.ndarray,
    masks: Sequence[np.ndarray],
    prompts: Groups | None = None,
    seed: int = 0,
) -> Estimate:
    """Share of pixels outside the subject that the concept left as they were.

    without, generated  (n, h, w, 3) uint8: same prompts (with the category, with the concept) and seeds
    masks               (h, w) each, above 0.5 where the subject is in either of the two images
    A pixel is preserved when no channel moved by more than a tenth of its range. Images that are all subject
    are left out; raises BadRecipe when all are.
    """
    if without.shape != generated.shape or len(masks) != len(generated):
        raise BadRecipe(
            f"Images without and with the concept and masks must be as many and of one size; got "
            f"{without.shape}, {generated.shape} and {len(masks)} masks."
        )
    preserved = np.abs(without.astype(np.int16) - generated).max(-1) <= 255 * PIXEL_TOLERANCE  # (n, h, w)
    background = np.stack([np.asarray(mask) <= 0.5 for mask in masks])
    usable = np.asarray(background.any((1, 2)))
    if not usable.any():
        raise BadRecipe("The masks leave nothing outside the subject to compare.")
    shares = (preserved & background).sum((1, 2))[usable] / background.sum((1, 2))[usable]
    groups = None if prompts is None else [p for p, use in zip(prompts, usable, strict=True) if use]
    return bootstrap_mean(shares, seed, groups)


def _mean_distance(vectors: Tensor) -> float:
    """Mean of 1 - cosine over all pairs of different rows."""
    n = len(vectors)
    cosines = vectors.double() @ vectors.double().T
    return float(1 - (cosines.sum() - torch.diagonal(cosines).sum()) / (n * (n - 1)))


def _require_same_shape(a: Tensor, b: Tensor, what: str) -> None:
    if a.shape != b.shape:
        raise BadRecipe(
            f"Expected as many {what} as images, of one encoder; got {tuple(b.shape)} for {tuple(a.shape)}."
        )
