"""Classifier of sticker-world images: the probability of each answer to each question about an image.

    predictions = Classifier.open().predict(images)
    predictions.best("background")          ["beach", "snow", ...]
    predictions.probability("objects")      (n, categories)

It shares no weights with the dual encoder, so each can check what was optimised against the other.
The questions are the fields of fields.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minikin.errors import UnknownName
from minikin.tiny.encoders import weights
from minikin.tiny.encoders.fields import Field
from minikin.tiny.encoders.network import ClassifierNet, ImageEncoderShape
from minikin.tiny.encoders.preprocess import Images, Masks, as_batch, in_chunks

KIND = "classifier"


@dataclass(frozen=True)
class Predictions:
    """Probabilities of n images by field, (n, answers) float32.

    The probabilities of one field add up to 1, unless several answers can be true (`Field.is_multiple`).
    """

    fields: Mapping[str, Field]
    probabilities: Mapping[str, np.ndarray]

    def probability(self, field: str, answer: str | None = None) -> np.ndarray:
        """(n, answers), or (n,) of one answer. Raises UnknownName."""
        spec = self._field(field)
        if answer is None:
            return self.probabilities[field]
        if answer not in spec.answers:
            raise UnknownName(f"answer to '{field}'", answer, spec.answers)
        return self.probabilities[field][:, spec.answers.index(answer)]

    def best(self, field: str) -> list[str]:
        """The most probable answer for every image."""
        answers = self._field(field).answers
        return [answers[int(k)] for k in self.probabilities[field].argmax(-1)]

    def all(self, field: str, threshold: float = 0.5) -> list[tuple[str, ...]]:
        """All answers above the threshold for every image, in the field's order."""
        answers = self._field(field).answers
        return [
            tuple(a for a, p in zip(answers, row, strict=True) if p > threshold)
            for row in self.probabilities[field]
        ]

    def _field(self, name: str) -> Field:
        if name not in self.fields:
            raise UnknownName("field", name, self.fields)
        return self.fields[name]


class Classifier:
    """Predicts the answers to all fields; also encodes subjects, independently of the dual encoder."""

    def __init__(self, net: ClassifierNet, fields: tuple[Field, ...]) -> None:
        self.net, self.fields = net, fields

    @classmethod
    def open(cls, path: Path | None = None) -> Classifier:
        """Open the embedded classifier, or one from a file. Raises AssetError for a missing or damaged file."""
        path = path or weights.embedded(KIND)
        tensors, facts = weights.read(path, KIND)
        fields = tuple(Field(f["name"], tuple(f["answers"]), f["is_multiple"]) for f in facts["fields"])
        n_answers = sum(len(f.answers) for f in fields)
        net = ClassifierNet(ImageEncoderShape(**facts["eye"]), n_answers, facts["dimensions"])
        weights.fill(path, net, tensors)
        return cls(net.eval().requires_grad_(False), fields)

    @property
    def device(self) -> torch.device:
        return self.net.subject_projection.weight.device

    @torch.no_grad()
    def predict(self, images: Images) -> Predictions:
        """Probabilities of all answers to all fields."""
        scores = in_chunks(as_batch(images), self.device, lambda x: self.net.answers(self.net.image_encoder(x)))
        parts = torch.split(scores.float(), [len(f.answers) for f in self.fields], -1)
        shares = {
            f.name: (p.sigmoid() if f.is_multiple else p.softmax(-1)).numpy()
            for f, p in zip(self.fields, parts, strict=True)
        }
        return Predictions({f.name: f for f in self.fields}, shares)

    @torch.no_grad()
    def encode_subjects(self, images: Images, masks: Masks | None = None) -> Tensor:
        """Unit vectors (n, d) of the subjects of images, as `DualEncoder.encode_subjects`."""
        return in_chunks(
            as_batch(images, masks), self.device, lambda x: self.net.subject(self.net.image_encoder(x))
        )


def facts_of(
    image: ImageEncoderShape, fields: tuple[Field, ...], dimensions: int, world: str
) -> dict[str, Any]:
    """The header of a classifier's weight file; keys as in format 1."""
    facts = {"world": world, "eye": asdict(image), "dimensions": dimensions}
    return weights.as_json({**facts, "fields": [asdict(f) for f in fields]})
