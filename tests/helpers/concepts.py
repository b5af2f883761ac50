"""Concepts of random content, for tests that need no taught one."""

from __future__ import annotations

import torch

from minikin.models.base import Base
from minikin.perfusion.concept import Concept


def random_concept(base: Base, name: str, seed: int, mode: str = "gated") -> Concept:
    """A cat whose values are strong enough to be visible."""
    g = torch.Generator().manual_seed(seed)
    words = base.word_vectors("cat") if mode == "gated" else ()
    i_star = torch.randn(base.layout.text_width, generator=g)
    delta = {layer.path: 2 * torch.randn(layer.width, generator=g) for layer in base.layout.layers}
    word_deltas = tuple(0.1 * torch.randn(w.shape, generator=g) for w in words)
    return Concept(name, "cat", mode, base.origin, word_deltas, i_star, i_star.clone(), delta)  # type: ignore[arg-type]
