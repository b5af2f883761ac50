"""One method of personalisation, as the shared loop and the judge see it.

A method says what is trained and how, what stands for the concept in a prompt, which files others read,
and how large they are. Everything else (photos, noise, loop, checkpoints, putting on) is shared.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from minikin.baselines import student as students
from minikin.baselines.result import Learned
from minikin.baselines.sizes import Shapes
from minikin.baselines.student import Student
from minikin.models.base import Base
from minikin.models.lora.lora_file import LowRank
from minikin.perfusion.objective import Batch
from minikin.recipes import Baseline

TO_KV = re.compile(r".*\.attn2\.to_[kv]\.weight")  # keys and values of cross-attention


@dataclass(frozen=True)
class Kept:
    """What of a student is kept; fields as in `Learned`."""

    words: tuple[Tensor, ...] = ()
    weights: dict[str, Tensor] = field(default_factory=dict)
    pairs: dict[str, LowRank] = field(default_factory=dict)


class Method(ABC):
    """templates  prompts for photos that bring no caption, {} for the concept
    rare       words of one token that mean nothing; the first that the base has is taken: the published
               one, then one for tiny (fragments of "abacus" and "alembic" that no caption shows alone)
    """

    templates: tuple[str, ...] = ("a photo of {}",)
    rare: tuple[str, ...] = ("sks", "bacus")

    def phrase(self, word: str, category: str) -> str:
        """What stands for the concept in a prompt; begins with the word."""
        return f"{word} {category}"

    @abstractmethod
    def student(self, base: Base, recipe: Baseline, word: str) -> Student:
        """What is trained, as it starts. Raises BadRecipe when the base cannot have it."""

    def loss(self, student: Student, photos: Batch, classes: Batch | None, prior: float) -> dict[str, Tensor]:
        """What is minimised, under "loss", and what else is logged."""
        return students.loss(student, photos, classes, prior)

    @abstractmethod
    def kept(self, student: Student) -> Kept:
        """What has been learned so far, as copies on the CPU in float32."""

    @abstractmethod
    def write(self, base: Base, learned: Learned, folder: Path) -> list[Path]:
        """Write it as other tools read it; returns the files. Raises StorageError."""

    @abstractmethod
    def read(self, base: Base, folder: Path, name: str) -> Kept:
        """The inverse of `write`. Raises BadConceptFile."""

    @abstractmethod
    def count(self, shapes: Shapes, rank: int) -> int:
        """How many numbers its files hold on a base of these shapes."""
