"""One judge's opinion of some painted images: alignment, likeness, diversity.

    known = References.of(judge, photos, held_out=unseen)
    found = score(judge, images, [plain(p, {"tom": "cat"}) for p in prompts], known)
    found.likeness, found.alignment

The photos are looked at once and serve for many calls: a sweep scores hundreds of settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from minikin.errors import BadRecipe
from minikin.evaluation import metrics
from minikin.evaluation.encoders import Judge, Masks, Pictures
from minikin.evaluation.intervals import Measured
from minikin.models.prompt import parse


@dataclass(frozen=True)
class References:
    """What a judge sees in the photos: unit vectors (m, d)."""

    photos: Tensor
    held_out: Tensor | None = None  # photos of the same thing that teaching was not shown

    @classmethod
    def of(
        cls, judge: Judge, photos: Pictures, masks: Masks | None = None,
        held_out: Pictures | None = None, held_out_masks: Masks | None = None,
    ) -> References:  # fmt: skip
        """Give masks for the photos exactly when the images will have them, so that like meets like."""
        unseen = None if held_out is None else judge.likeness(held_out, held_out_masks)
        return cls(judge.likeness(photos, masks), unseen)

    @property
    def among(self) -> float | None:
        """Likeness of the photos among themselves: the mark to reach; None for a single photo."""
        return metrics.among(self.photos) if len(self.photos) > 1 else None


@dataclass(frozen=True)
class Scores:
    """Each with its 95 % interval over prompts; None where it cannot be told."""

    judge: str
    alignment: Measured | None  # the judge does not read
    recognised: Measured | None  # the same, or there is one prompt only
    likeness: Measured
    held_out: Measured | None  # no held-out photos
    diversity: Measured | None  # one image a prompt

    @property
    def point(self) -> tuple[float, float]:
        """(likeness, alignment), as fronts take it. Raises BadRecipe when the judge does not read."""
        if self.alignment is None:
            raise BadRecipe(f"The judge {self.judge} does not read, so it gives no text alignment.")
        return self.likeness.value, self.alignment.value


def plain(prompt: str, categories: Mapping[str, str]) -> str:
    """The prompt with every concept's category in its place, as text alignment is defined.

    Weights and adapters are taken out too. Raises UnknownName for a concept without a category.
    """
    return parse(prompt, categories).text


def score(
    judge: Judge, pictures: Pictures, prompts: Sequence[str], known: References, masks: Masks | None = None,
    seed: int = 0,
) -> Scores:  # fmt: skip
    """Judge painted images.

    prompts  the plain prompt of each image; images with equal ones are of one prompt
    masks    of the subject, for likeness alone
    Raises BadRecipe when images and prompts are not as many or there are none.
    """
    if len(pictures) != len(prompts):
        raise BadRecipe(f"{len(pictures)} images but {len(prompts)} prompts: give the prompt of each image.")
    if not prompts:
        raise BadRecipe("There are no images to judge.")
    things, whole = judge.likeness(pictures, masks), judge.images(pictures)
    different = list(dict.fromkeys(prompts))
    aligned = recognised = None
    if judge.reads:
        texts = judge.texts(different)
        own = texts[[different.index(p) for p in prompts]]
        aligned = metrics.alignment(whole, own, prompts, seed)
        recognised = metrics.recognised(whole, texts, prompts, seed) if len(different) > 1 else None
    return Scores(
        judge.name,
        aligned,
        recognised,
        metrics.likeness(things, known.photos, prompts, seed),
        None if known.held_out is None else metrics.likeness(things, known.held_out, prompts, seed),
        metrics.diversity(whole, prompts, seed) if len(different) < len(prompts) else None,
    )
