"""Textual Inversion: a new word, and nothing else (Gal et al. 2022, arXiv:2208.01618).

Trained: one vector in the text encoder's table, which starts as the category's (its last token).
Prompts: the new word stands where the thing would be named, in neutral templates.
File: an embedding, 3 KB for SD 1.5, for `pipe.load_textual_inversion`.
"""

from __future__ import annotations

from pathlib import Path

from minikin.baselines import embedding
from minikin.baselines.method import Method, TrainedTensors
from minikin.baselines.result import BaselineResult
from minikin.baselines.sizes import Shapes
from minikin.baselines.student import Student, partial_copy
from minikin.models.base import Base
from minikin.perfusion.key_lock import TEMPLATES
from minikin.recipes import Baseline

FILE = "learned_embeds.safetensors"


class TextualInversion(Method):
    templates = TEMPLATES

    def phrase(self, word: str, category: str) -> str:
        return word

    def student(self, base: Base, recipe: Baseline, word: str) -> Student:
        return Student(base, partial_copy(base.denoiser), embedding.start(base, recipe.category))

    def tensors(self, student: Student) -> TrainedTensors:
        return TrainedTensors(words=tuple(w.detach().cpu().clone() for w in student.words))

    def write(self, base: Base, result: BaselineResult, folder: Path) -> list[Path]:
        return [embedding.write(base, result.words, f"<{result.name}>", folder / FILE)]

    def read(self, base: Base, folder: Path, name: str) -> TrainedTensors:
        return TrainedTensors(words=embedding.read(base, folder / FILE))

    def count(self, shapes: Shapes, rank: int) -> int:
        return sum(shapes.texts)
