"""Scores of generated images by one encoder: prompt fidelity, subject fidelity, diversity.

    references = References.encode(encoder, photos, held_out=held_out_photos)
    scores = score(encoder, images, [plain(p, {"tom": "cat"}) for p in prompts], references)
    scores.subject_fidelity, scores.text_alignment

Photos are encoded once and serve many calls: a sweep scores hundreds of grid points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.evaluation import metrics
from minikin.evaluation.encoder_registry import open_encoder
from minikin.evaluation.encoders import Encoder, Images, Masks
from minikin.evaluation.intervals import Estimate, bootstrap_mean
from minikin.images.photos import Photo, load_photos
from minikin.models.base import Base
from minikin.models.prompt import parse

HELD_OUT = "unseen"  # folder beside the photos: other photos of the same thing, not used for training


@dataclass(frozen=True)
class References:
    """Unit vectors (m, d) of the subject's photos."""

    photos: Tensor
    held_out: Tensor | None = None  # photos of the same thing that were not trained on

    @classmethod
    def encode(
        cls,
        encoder: Encoder,
        photos: Images,
        masks: Masks | None = None,
        held_out: Images | None = None,
        held_out_masks: Masks | None = None,
    ) -> References:
        """Give masks for the photos exactly when the generated images will have them."""
        others = None if held_out is None else encoder.encode_subjects(held_out, held_out_masks)
        return cls(encoder.encode_subjects(photos, masks), others)

    @property
    def upper_bound(self) -> float | None:
        """Real-image upper bound of subject fidelity; None for a single photo."""
        return metrics.real_image_upper_bound(self.photos) if len(self.photos) > 1 else None


@dataclass(frozen=True)
class ImageScores:
    """Scores of one image.

    subject_fidelity, held_out  mean cosine with the photos, and with the held-out photos
    alignments                  cosine with each different plain prompt of the run
    """

    subject_fidelity: float
    held_out: float | None
    alignments: tuple[float, ...]


@dataclass(frozen=True)
class Scores:
    """Scores of all images with 95 % intervals over prompts; None where a score does not apply.

    text_alignment  None without a text encoder
    r_precision     None without a text encoder, or for one prompt
    held_out        None without held-out photos
    diversity       None for one image per prompt
    """

    encoder: str
    text_alignment: Estimate | None
    r_precision: Estimate | None
    subject_fidelity: Estimate
    held_out: Estimate | None
    diversity: Estimate | None = None

    def prompt_fidelity(self, metric: str) -> Estimate:
        """Text alignment or R-precision, by name. Raises BadRecipe where it does not apply."""
        estimate: Estimate | None = getattr(self, metric)
        if estimate is None:
            raise BadRecipe(
                f"There is no {metric.replace('_', ' ')} of these images by the encoder {self.encoder}: it "
                "needs a text encoder and, for R-precision, two different prompts."
            )
        return estimate

    def point(self, metric: str = "text_alignment") -> tuple[float, float]:
        """(subject fidelity, prompt fidelity), as Pareto fronts take it. Raises BadRecipe as above."""
        return self.subject_fidelity.value, self.prompt_fidelity(metric).value


def prompt_fidelity_metric(encoder: Encoder) -> str:
    """Field of Scores that measures prompt fidelity.

    R-precision for tiny's encoder, which gives a low cosine to any unusual drawing of a category; text
    alignment (CLIP-T) for the published ones, as in the literature.
    """
    return "r_precision" if encoder.name == "tiny" else "text_alignment"


def plain(prompt: str, categories: Mapping[str, str]) -> str:
    """The prompt with each concept replaced by its category, as text alignment is defined.

    Weights and adapters are removed too. Raises UnknownName for a concept without a category.
    """
    return parse(prompt, categories).text


def open_references(
    name: str, base: Base, folder: str, encoder: Encoder | None = None, device: str | None = None
) -> tuple[Encoder, list[Photo], References]:
    """Open the encoder of this name, the photos in the folder, and their references.

    encoder  an opened one, in place of the name
    Photos in the subfolder `unseen/` are the held-out ones. Raises BadRecipe for an encoder that does not know
    the base's images, BadPhoto, and what `open_encoder` raises.
    """
    encoder = encoder or open_suitable(name, base, device)
    photos, held_out_folder = load_photos(folder), Path(folder) / HELD_OUT
    held_out = _images(load_photos(held_out_folder)) if held_out_folder.is_dir() else None
    return encoder, photos, References.encode(encoder, _images(photos), held_out=held_out)


def open_suitable(name: str, base: Base, device: str | None = None) -> Encoder:
    """Open an encoder. Raises BadRecipe for tiny's encoder with a base of photographs."""
    if name == "tiny" and base.architecture != "tiny":
        raise BadRecipe(
            f"The encoder tiny knows tiny's sticker world alone and cannot score images of '{base.name}'. "
            "Use --encoder clip-b32 or clip-l14."
        )
    return open_encoder(name, device)


def score_images(encoder: Encoder, images: Images, texts: Tensor, references: References) -> list[ImageScores]:
    """Scores of each image; `texts` are the vectors (k, d) of the run's different plain prompts."""
    return _per_image(encoder.encode_subjects(images), encoder.encode_images(images), texts, references)


def _per_image(
    subjects: Tensor, whole: Tensor, texts: Tensor | None, references: References
) -> list[ImageScores]:
    fidelity = (subjects.double() @ references.photos.double().T).mean(1).tolist()
    held_out: list[float | None] = [None] * len(subjects)
    if references.held_out is not None:
        held_out = (subjects.double() @ references.held_out.double().T).mean(1).tolist()
    alignments: list[list[float]] = [[] for _ in range(len(subjects))]
    if texts is not None:
        alignments = (whole.double() @ texts.double().T).tolist()
    return [ImageScores(f, h, tuple(a)) for f, h, a in zip(fidelity, held_out, alignments, strict=True)]


def summarize(encoder: str, images: Sequence[ImageScores], prompts: Sequence[int], seed: int = 0) -> Scores:
    """Scores over all images, from those of each.

    prompts  for each image, the index of its prompt in `ImageScores.alignments`
    """
    aligned = recognised = held_out = None
    if images[0].alignments:
        alignments = np.array([image.alignments for image in images])  # (images, k)
        aligned = bootstrap_mean(alignments[np.arange(len(images)), list(prompts)], seed, prompts)
        if alignments.shape[1] > 1:
            recognised = bootstrap_mean(alignments.argmax(1) == np.array(prompts), seed, prompts)
    if images[0].held_out is not None:
        held_out = bootstrap_mean(np.array([image.held_out for image in images]), seed, prompts)
    fidelity = bootstrap_mean(np.array([image.subject_fidelity for image in images]), seed, prompts)
    return Scores(encoder, aligned, recognised, fidelity, held_out)


def score(
    encoder: Encoder,
    images: Images,
    prompts: Sequence[str],
    references: References,
    masks: Masks | None = None,
    seed: int = 0,
) -> Scores:
    """Score generated images.

    prompts  plain prompt of each image; images with equal ones are of one prompt
    masks    of the subject, for subject fidelity alone
    Raises BadRecipe when images and prompts are not as many or there are none.
    """
    if len(images) != len(prompts):
        raise BadRecipe(f"{len(images)} images but {len(prompts)} prompts: give the prompt of each image.")
    if not prompts:
        raise BadRecipe("There are no images to score.")
    different = list(dict.fromkeys(prompts))
    texts = encoder.encode_texts(different) if encoder.has_text_encoder else None
    subjects, whole = encoder.encode_subjects(images, masks), encoder.encode_images(images)
    each = _per_image(subjects, whole, texts, references)
    scores = summarize(encoder.name, each, [different.index(p) for p in prompts], seed)
    if len(different) == len(prompts):
        return scores
    return replace(scores, diversity=metrics.diversity(whole, prompts, seed))


def _images(photos: Sequence[Photo]) -> list[Image.Image]:
    return [Image.fromarray(photo.pixels) for photo in photos]
