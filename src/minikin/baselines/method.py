"""Interface of a baseline: one method of personalisation.

A method defines the trained tensors and the loss, the words that stand for the concept in a prompt, and its
files in the formats of other tools. Everything else (photos, noise, training loop, checkpoints, use on a
base) is shared.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from minikin.baselines import student as students
from minikin.baselines.result import BaselineResult
from minikin.baselines.sizes import Shapes
from minikin.baselines.student import Student
from minikin.models.base import Base
from minikin.models.lora.lora_file import LowRank
from minikin.perfusion.objective import Batch
from minikin.recipes import Baseline

TO_KV = re.compile(r".*\.attn2\.to_[kv]\.weight")  # keys and values of cross-attention


@dataclass(frozen=True)
class TrainedTensors:
    """The result of training, copied; fields as in `BaselineResult`."""

    words: tuple[Tensor, ...] = ()
    weights: dict[str, Tensor] = field(default_factory=dict)
    pairs: dict[str, LowRank] = field(default_factory=dict)


class Method(ABC):
    """One method of personalisation.

    templates  prompts for photos without a caption, {} for the concept
    rare       words of one token without a meaning; the first that the base has is taken: the published
               one, then one for tiny (fragments of "abacus" and "alembic" that no caption shows alone)
    """

    templates: tuple[str, ...] = ("a photo of {}",)
    rare: tuple[str, ...] = ("sks", "bacus")

    def phrase(self, word: str, category: str) -> str:
        """The words that stand for the concept in a prompt; they begin with the rare word."""
        return f"{word} {category}"

    @abstractmethod
    def student(self, base: Base, recipe: Baseline, word: str) -> Student:
        """The trained networks and vectors at their initial values. Raises BadRecipe for an unfit base."""

    def loss(self, student: Student, photos: Batch, classes: Batch | None, prior: float) -> dict[str, Tensor]:
        """The scalar to minimise under "loss"; other names are only logged."""
        return students.loss(student, photos, classes, prior)

    @abstractmethod
    def tensors(self, student: Student) -> TrainedTensors:
        """The trained tensors as they are now, as float32 copies on the CPU."""

    @abstractmethod
    def write(self, base: Base, result: BaselineResult, folder: Path) -> list[Path]:
        """Write the files that other tools read, and return them. Raises StorageError."""

    @abstractmethod
    def read(self, base: Base, folder: Path, name: str) -> TrainedTensors:
        """The inverse of `write`. Raises BadConceptFile."""

    @abstractmethod
    def count(self, shapes: Shapes, rank: int) -> int:
        """How many numbers its files hold, for a base of these shapes."""
