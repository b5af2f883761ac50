"""Scores of images from a judge's unit vectors, each with its 95 % interval.

    alignment   does the image show what the prompt says    CLIP-T (Gal et al. 2022, arXiv:2208.01618)
    recognised  does its prompt fit it better than others     R-precision (Xu et al. 2017, arXiv:1711.10485)
    likeness    is the thing of the photos in the image     CLIP-I, DINO (Ruiz et al. 2022, arXiv:2208.12242)
    diversity   do images of one prompt differ              as DIV there, by cosine instead of LPIPS
    drift       did images without the concept change       PEFT's image benchmark
    deviation   how far is an oracle's confidence from real   CCD (Patel et al. 2023, arXiv:2306.04695)
    kept        is all outside the subject as it was          after Seg-Cons (PureCC, arXiv:2603.07561)

Definitions are in docs/judging.md. Vectors are rows (n, d) of length 1, as judges give them. `prompts`
says which prompt each image was painted for (anything that compares); intervals are a percentile
bootstrap over prompts, because images of one prompt resemble each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.evaluation.intervals import RESAMPLES, Groups, Measured, around, draws, mean

KEPT_WITHIN = 0.1  # of the range of a channel: how far a pixel may move and still count as kept


def alignment(pictures: Tensor, texts: Tensor, prompts: Groups, seed: int = 0) -> Measured:
    """Mean cosine of each image (n, d) with its own plain prompt (n, d), the category in place of <tom>."""
    _same(pictures, texts, "texts")
    return mean(_cosines(pictures, texts), seed, prompts)


def recognised(pictures: Tensor, texts: Tensor, prompts: Groups, seed: int = 0) -> Measured:
    """Share of images (n, d) whose own prompt fits best among all of them; chance is 1 in k.

    texts    (k, d), of the different prompts in the order in which `prompts` first names them
    What all prompts have in common, the category, cancels out: this is the part of alignment that does not
    fall when the thing is unlike others of its category. Raises BadRecipe for a single prompt.
    """
    names = list(dict.fromkeys(prompts))
    if len(names) < 2 or len(names) != len(texts) or len(prompts) != len(pictures):
        raise BadRecipe(
            f"Prompts are told apart among at least two different prompts, with a text each; got {len(names)} "
            f"different ones in {len(prompts)}, {len(texts)} texts and {len(pictures)} images."
        )
    own = torch.tensor([names.index(p) for p in prompts])
    best = (pictures.double() @ texts.double().T).argmax(1)
    return mean((best == own).double().numpy(), seed, prompts)


def likeness(pictures: Tensor, photos: Tensor, prompts: Groups, seed: int = 0) -> Measured:
    """Mean cosine over all pairs of an image (n, d) and a photo (m, d).

    The photos are a given; the interval is that of other prompts. Raises BadRecipe without photos.
    """
    if not len(photos):
        raise BadRecipe("Likeness needs photos to compare with; none were given.")
    return mean((pictures.double() @ photos.double().T).mean(1).numpy(), seed, prompts)


def among(photos: Tensor) -> float:
    """Mean cosine of all pairs of different photos (m, d): what likeness can be expected to reach.

    Raises BadRecipe for fewer than two.
    """
    if len(photos) < 2:
        raise BadRecipe(f"The likeness of photos among themselves needs two photos, got {len(photos)}.")
    return 1 - _mean_distance(photos)


def diversity(pictures: Tensor, prompts: Sequence[object] | np.ndarray, seed: int = 0) -> Measured:
    """Mean cosine distance between two images of one prompt, averaged over prompts.

    Prompts with a single image say nothing and are left out. Raises BadRecipe when all are such.
    """
    rows: dict[object, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    found = [_mean_distance(pictures[at]) for at in rows.values() if len(at) > 1]
    if not found:
        raise BadRecipe("Diversity needs at least two images of one prompt. Paint more of each.")
    return mean(np.array(found), seed)


def drift(before: Tensor, after: Tensor, prompts: Groups | None = None, seed: int = 0) -> Measured:
    """(1 - cosine) / 2 of images (n, d) of the same prompts and seeds before and after a change.

    0 for the same images, exactly: for unit vectors it is a quarter of the squared distance.
    """
    _same(before, after, "pictures")
    return mean(((before.double() - after.double()).square().sum(1) / 4).numpy(), seed, prompts)


def deviation(real: np.ndarray, painted: np.ndarray, prompts: Groups | None = None, seed: int = 0) -> Measured:
    """CCD: an oracle's mean confidence in the true concept, on real images (m,) less on painted ones (n,).

    0 is as good as real, larger is worse; below 0 the oracle is surer of painted ones. Both sets are
    drawn again for the interval.
    """
    real, painted = np.asarray(real, np.float64), np.asarray(painted, np.float64)
    if not (len(real) and len(painted)):
        raise BadRecipe(f"CCD needs real and painted images, got {len(real)} and {len(painted)}.")
    rng = np.random.default_rng(seed)
    a, b = draws(len(real), RESAMPLES, rng), draws(len(painted), RESAMPLES, rng, prompts)
    again = a @ real / a.sum(1) - b @ painted / b.sum(1)
    return around(float(real.mean() - painted.mean()), again, len(painted))


def kept(
    without: np.ndarray, painted: np.ndarray, masks: Sequence[np.ndarray], prompts: Groups | None = None,
    seed: int = 0,
) -> Measured:  # fmt: skip
    """Share of pixels outside the subject that a concept left as they were.

    without, painted  (n, h, w, 3) uint8: same prompts (category, concept) and seeds
    masks             (h, w) each, above 0.5 where the subject is in either of the two
    A pixel is as it was when no channel moved by more than a tenth of its range. Images that are all
    subject are left out; raises BadRecipe when all are.
    """
    if without.shape != painted.shape or len(masks) != len(painted):
        raise BadRecipe(
            f"Images without and with the concept and masks must be as many and of one size; got "
            f"{without.shape}, {painted.shape} and {len(masks)} masks."
        )
    same = np.abs(without.astype(np.int16) - painted).max(-1) <= 255 * KEPT_WITHIN  # (n, h, w)
    around_it = np.stack([np.asarray(m) <= 0.5 for m in masks])
    use = np.asarray(around_it.any((1, 2)))
    if not use.any():
        raise BadRecipe("The masks leave nothing outside the subject to compare.")
    values = (same & around_it).sum((1, 2))[use] / around_it.sum((1, 2))[use]
    own = None if prompts is None else [p for p, u in zip(prompts, use, strict=True) if u]
    return mean(values, seed, own)


def _cosines(a: Tensor, b: Tensor) -> np.ndarray:
    return (a.double() * b.double()).sum(1).numpy()


def _mean_distance(vectors: Tensor) -> float:
    """Mean of 1 - cosine over all pairs of different rows."""
    n = len(vectors)
    cosines = vectors.double() @ vectors.double().T
    return float(1 - (cosines.sum() - torch.diagonal(cosines).sum()) / (n * (n - 1)))


def _same(a: Tensor, b: Tensor, what: str) -> None:
    if a.shape != b.shape:
        raise BadRecipe(
            f"Expected as many {what} as images, of one judge; got {tuple(b.shape)} for {tuple(a.shape)}."
        )
