"""Best-of-n: the best of many drafts, by an encoder's scores.

    text alignment     how well the image fits its prompt, the category in place of <tom>
    subject fidelity   how similar it is to the concept's photos, where there are some

The two cosines have different scales, so drafts are ranked by the sum of their standard scores among the
drafts. Equal drafts keep the order of their seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.evaluation.encoders import Encoder
from minikin.evaluation.scores import open_references, open_suitable, plain
from minikin.generation.image import GeneratedImage
from minikin.models.base import Base
from minikin.models.prompt import concept_tags
from minikin.recipes import Best, Paint


def rank(*scores: Sequence[float]) -> list[int]:
    """Indices, best first, by the sum of standard scores; a score that is the same for all has no weight."""
    total = np.zeros(len(scores[0]))
    for values in (np.asarray(s, np.float64) for s in scores):
        spread = values.std()
        if spread > 1e-9:
            total += (values - values.mean()) / spread
    return [int(i) for i in np.argsort(-total.round(9), kind="stable")]


@dataclass(frozen=True)
class Chooser:
    """Chooses among drafts of one prompt.

    prompt  the plain one
    photos  vectors (m, d) of the concept's photos; None without photos
    """

    encoder: Encoder
    prompt: str
    photos: Tensor | None
    warnings: tuple[str, ...] = ()

    @classmethod
    def open(
        cls,
        best: Best,
        base: Base,
        recipe: Paint,
        categories: Mapping[str, str],
        encoder: Encoder | None = None,
    ) -> Chooser:
        """Open the encoder and the photos, before anything is generated.

        Raises BadRecipe for an encoder that does not know the base's images or has no text encoder, BadPhoto,
        and what `open_encoder` raises: NoNetwork when its weights are not on this machine.
        """
        best.drafts(recipe)
        name = best.encoder or ("tiny" if base.architecture == "tiny" else "clip-b32")
        photos = None
        if best.photos:
            encoder, _, references = open_references(name, base, best.photos, encoder, recipe.device)
            photos = references.photos
        encoder = encoder or open_suitable(name, base, recipe.device)
        if not encoder.has_text_encoder:
            raise BadRecipe(
                f"The encoder {encoder.name} has no text encoder, so it cannot tell which image fits "
                "the prompt. Use clip-b32."
            )
        warnings: tuple[str, ...] = ()
        if photos is None and concept_tags(recipe.prompt):
            warnings = ("Without its photos, subject fidelity is not measured: --photos FOLDER.",)
        return cls(encoder, plain(recipe.prompt, categories), photos, warnings)

    def best(
        self, drafts: Sequence[GeneratedImage], n: int
    ) -> tuple[list[GeneratedImage], dict[int, dict[str, Any]]]:
        """The n best drafts, best first, and the scores of all by seed, as image metadata records them."""
        images = [draft.image for draft in drafts]
        texts = self.encoder.encode_texts([self.prompt])
        scores = {"alignment": (self.encoder.encode_images(images) @ texts.T)[:, 0].tolist()}
        if self.photos is not None:
            fidelity = (self.encoder.encode_subjects(images) @ self.photos.T).mean(1).tolist()
            scores["likeness"] = fidelity  # word: key in image metadata
        order = rank(*scores.values())
        record = {"of": len(drafts), "judge": self.encoder.name}  # word: key in image metadata
        return [drafts[i] for i in order[:n]], {
            drafts[i].seed: {"rank": k, **record, **{name: round(v[i], 4) for name, v in scores.items()}}
            for k, i in enumerate(order, 1)
        }
