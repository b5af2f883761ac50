"""The concept: learned tensors and metadata of one subject, independent of an opened base."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minikin.errors import BadRecipe
from minikin.models.identity import Origin
from minikin.perfusion.gate import Gate
from minikin.perfusion.operating_points import Points

if TYPE_CHECKING:
    from torch import Tensor

EditMode = Literal["gated", "value"]
FILE_MODES: dict[EditMode, str] = {"gated": "gated", "value": "row"}  # word: files of version 0.1 say row

MAX_REPEATED = 2_000  # characters of a category with its repetitions, of which 75 are the most
NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
PAINTING_GATE = Gate(0.70, 0.15)  # Perfusion's usual values at inference


@dataclass(frozen=True)
class Concept:
    """A learned concept.

    name, category   its name in prompts (`<name>`), and the category that its keys are locked to
    mode             "gated" (Perfusion) or "value" (value difference at the category's last token, no gate)
    origin           the base it was trained on
    word_deltas      per text encoder (n, d_k): word vectors minus the category's, n tokens
    i_star           (D,) target input of the edit, float32; zeros in mode "value"
    dual             (D,) M i* at any scale; replaces C, which a concept does not store
    delta            per layer path (width,): target value minus the category's value
    keys             per layer path (width,): key difference; {} for locked keys, as in the paper
    c_hash           hash of the covariance that i_star was trained with; "" in mode "value"
    gate             gate for generation
    points           measured operating points, by preset and name (faithful, balanced, creative)
    recipe           options of the training run
    preview          a small JPEG, or b""
    """

    name: str
    category: str
    mode: EditMode
    origin: Origin
    word_deltas: tuple[Tensor, ...]
    i_star: Tensor
    dual: Tensor
    delta: dict[str, Tensor]
    keys: dict[str, Tensor] = field(default_factory=dict)
    c_hash: str = ""
    gate: Gate = PAINTING_GATE
    points: Points = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    preview: bytes = b""

    def __post_init__(self) -> None:
        check_name(self.name)
        check_category(self.category)

    @property
    def n_values(self) -> int:
        """Number of value differences over all layers."""
        return sum(d.numel() for d in self.delta.values())

    @property
    def memory_bytes(self) -> int:
        """Bytes of its tensors and its preview in memory."""
        tensors = (*self.word_deltas, self.i_star, self.dual, *self.delta.values(), *self.keys.values())
        return sum(t.numel() * t.element_size() for t in tensors) + len(self.preview)

    def is_finite(self) -> bool:
        tensors = (*self.word_deltas, self.i_star, self.dual, *self.delta.values(), *self.keys.values())
        return all(bool(t.isfinite().all()) for t in tensors)

    def renamed(self, name: str) -> Concept:
        return replace(self, name=name)

    def save(self, path: str | Path, **options: Any) -> Path:
        """Write the concept file; see `perfusion.concept_file.save`."""
        from minikin.perfusion import concept_file

        return concept_file.save(self, path, **options)

    @staticmethod
    def load(path: str | Path) -> Concept:
        """Read and check a concept file; see `perfusion.concept_file.load`."""
        from minikin.perfusion import concept_file

        return concept_file.load(path)


def check_name(name: str) -> str:
    """Return a valid name; raises BadRecipe for others (see NAME)."""
    if not NAME.fullmatch(name):
        raise BadRecipe(
            f"'{name[:60]}' cannot be a concept's name. Use a lower-case letter followed by up to 39 "
            "lower-case letters, digits, '_' or '-', for example 'tom' or 'my_cat2'."
        )
    return name


def _repeated(category: str) -> str:
    """The words that a category consists of repetitions of; all of them where nothing repeats."""
    words = category.split(" ")
    lengths = (n for n in range(1, len(words) + 1) if len(words) % n == 0)
    n = next(n for n in lengths if words == words[:n] * (len(words) // n))
    return " ".join(words[:n])


def check_category(category: str) -> str:
    """Return a valid category: 1 to 60 letters, digits, spaces, hyphens, apostrophes; else BadRecipe.

    A category may be repeated, "cat cat cat": so that an embedding of several vectors has a token for each.
    """
    if not category.strip():
        raise BadRecipe("The category is empty. Name the kind of thing, for example --category cat.")
    if len(_repeated(category)) > 60 or len(category) > MAX_REPEATED:
        raise BadRecipe(
            f"The category is {len(category)} characters long; at most 60 are allowed. Use a short "
            "everyday word such as 'cat' or 'teddy bear'."
        )
    if not re.fullmatch(r"[^\W_]+(?:[ '’-][^\W_]+)*", category):
        raise BadRecipe(
            f"The category '{category}' has characters that no word has. Use words such as 'cat' "
            "or 'teddy bear'."
        )
    return category
