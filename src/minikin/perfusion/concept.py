"""What a minikin is: one personal concept as a handful of tensors and facts. Knows no model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.models.identity import Origin
from minikin.perfusion.edit import Gate
from minikin.perfusion.operating_points import Points

EditMode = Literal["gated", "row"]

NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
PAINTING_GATE = Gate(0.70, 0.15)  # Perfusion's usual painting-time values
TEACHING_GATE = Gate(0.75, 0.10)  # and its training-time values


@dataclass(frozen=True)
class Concept:
    """One taught concept.

    name, category   the word in prompts (`<name>`) and the word it is locked to
    mode             "gated" (Perfusion) or "row" (value difference on the category's own row)
    word_deltas      per text encoder (n, d_k): word vectors minus the category's own, n tokens
    i_star           (D,) the direction, float32; zeros in mode "row"
    dual             (D,) M i*, at any scale: the metric where the concept needs it, so no C travels
    delta            per site (width,): value target minus the category's own value
    c_hash           hash of the covariance i_star was used with; "" in mode "row"
    gate             the operating point for painting
    keys             per site (width,): what keys change by; {} for locked keys, which is the method
    points           measured operating points, by preset and name (faithful, balanced, creative)
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
    preview: bytes = b""  # a small JPEG, or nothing

    def __post_init__(self) -> None:
        check_name(self.name)
        check_category(self.category)

    @property
    def n_values(self) -> int:
        return sum(d.numel() for d in self.delta.values())

    def is_finite(self) -> bool:
        tensors = (*self.word_deltas, self.i_star, self.dual, *self.delta.values(), *self.keys.values())
        return all(bool(torch.isfinite(t).all()) for t in tensors)

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
    """A concept's name: a lower-case letter, then at most 39 letters, digits, `_` or `-`."""
    if not NAME.fullmatch(name):
        raise BadRecipe(
            f"'{name[:60]}' cannot be a concept's name. Use a lower-case letter followed by up to 39 "
            "lower-case letters, digits, '_' or '-', for example 'tom' or 'my_cat2'."
        )
    return name


def check_category(category: str) -> str:
    """A category: 1 to 60 characters of letters, digits, spaces, hyphens and apostrophes."""
    if not category.strip():
        raise BadRecipe("The category is empty. Name the kind of thing, for example --category cat.")
    if len(category) > 60:
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
