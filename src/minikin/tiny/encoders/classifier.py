"""The classifier: how probable is each answer to each question about an image.

    verdicts = Classifier.open().look(images)
    verdicts.best("background")          ["beach", "snow", ...]
    verdicts.probability("objects")      (n, categories)

It shares no weights with the judge, so whatever is optimised against one can be checked by the
other. The questions are those of fields.py.
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
from minikin.tiny.encoders.network import ClassifierNet, EyeShape
from minikin.tiny.encoders.preprocess import Masks, Pictures, as_batch, in_chunks

KIND = "classifier"


@dataclass(frozen=True)
class Verdicts:
    """Probabilities of n images by field, (n, answers) float32.

    The answers of one field add up to 1, unless several can be true (`Field.is_multiple`).
    """

    fields: Mapping[str, Field]
    probabilities: Mapping[str, np.ndarray]

    def probability(self, field: str, answer: str | None = None) -> np.ndarray:
        """(n, answers), or (n,) of one answer. Raises UnknownName."""
        known = self._field(field)
        if answer is None:
            return self.probabilities[field]
        if answer not in known.answers:
            raise UnknownName(f"answer to '{field}'", answer, known.answers)
        return self.probabilities[field][:, known.answers.index(answer)]

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
    """Answers to all fields, and a likeness of things that it learned apart from the judge's."""

    def __init__(self, net: ClassifierNet, fields: tuple[Field, ...]) -> None:
        self.net, self.fields = net, fields

    @classmethod
    def open(cls, path: Path | None = None) -> Classifier:
        """The embedded classifier, or one from a file. Raises AssetError when it is missing or damaged."""
        path = path or weights.embedded(KIND)
        tensors, facts = weights.read(path, KIND)
        fields = tuple(Field(f["name"], tuple(f["answers"]), f["is_multiple"]) for f in facts["fields"])
        n_answers = sum(len(f.answers) for f in fields)
        net = ClassifierNet(EyeShape(**facts["eye"]), n_answers, facts["dimensions"])
        weights.fill(path, net, tensors)
        return cls(net.eval().requires_grad_(False), fields)

    @property
    def device(self) -> torch.device:
        return self.net.like.weight.device

    @torch.no_grad()
    def look(self, pictures: Pictures) -> Verdicts:
        """All answers for these images."""
        scores = in_chunks(as_batch(pictures), self.device, lambda x: self.net.answers(self.net.eye(x)))
        parts = torch.split(scores.float(), [len(f.answers) for f in self.fields], -1)
        shares = {
            f.name: (p.sigmoid() if f.is_multiple else p.softmax(-1)).numpy()
            for f, p in zip(self.fields, parts, strict=True)
        }
        return Verdicts({f.name: f for f in self.fields}, shares)

    @torch.no_grad()
    def likeness(self, pictures: Pictures, masks: Masks | None = None) -> Tensor:
        """Unit vectors (n, d) of the thing in the images, as `Judge.likeness`."""
        return in_chunks(as_batch(pictures, masks), self.device, lambda x: self.net.likeness(self.net.eye(x)))


def facts_of(eye: EyeShape, fields: tuple[Field, ...], dimensions: int, world: str) -> dict[str, Any]:
    """What a classifier's file says of itself."""
    facts = {"world": world, "eye": asdict(eye), "dimensions": dimensions}
    return weights.as_json({**facts, "fields": [asdict(f) for f in fields]})
