"""Samples of a concept while it is taught, and their subject fidelity (of bases that tiny's encoder knows)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from PIL import Image

from minikin import events
from minikin.errors import BadRecipe
from minikin.images.photos import Photo
from minikin.images.sheet import contact_sheet
from minikin.models.base import Base
from minikin.perfusion.concept import Concept

if TYPE_CHECKING:
    from torch import Tensor

    from minikin.evaluation.encoders import Encoder


class Samples:
    """Paints a concept's samples, a few images in a row, and compares them with its photos.

    paint  the images of a concept as it stands
    """

    def __init__(self, base: Base, photos: Sequence[Photo], paint: Callable[[Concept], list[Image.Image]]):
        self._base, self._photos, self._paint = base, photos, paint
        self._images: list[Image.Image] = []
        self._encoder: Encoder | None = None
        self._vectors: Tensor | None = None  # of the photos

    def sheet(self, concept: Concept) -> Image.Image:
        """The images of a concept that is still being taught; it does not come into use by that."""
        self._images = self._paint(concept)
        return contact_sheet(self._images, columns=3)

    def scored(self, run: Iterator[events.Event]) -> Iterator[events.Event]:
        """The events of teaching; each sample with its subject fidelity, the mean cosine to the photos."""
        for event in run:
            if isinstance(event, events.ImageReady) and self._images:
                event, self._images = replace(event, subject_fidelity=self._fidelity()), []
            yield event

    def _fidelity(self) -> float | None:
        from minikin.evaluation.scores import open_suitable

        if self._encoder is None:
            try:
                self._encoder = open_suitable("tiny", self._base, self._base.device.type)
            except BadRecipe:  # a base of photographs
                return None
        if self._vectors is None:
            self._vectors = self._encoder.encode_subjects([Image.fromarray(p.pixels) for p in self._photos])
        return float((self._encoder.encode_subjects(self._images) @ self._vectors.T).mean())
