"""How much the caption corpus behind C matters on tiny: its kind, its size, the ridge.

For every choice, the similarity s = <i*, e>_M / <i*, i*>_M of every position of some prompts to the
category's own encoding (what a concept starts from, and what its gate sees), against our corpus at
its default size. Two corpora: our own captions, and the sticker world's. About four minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minikin.models.base import Base
from minikin.models.loading.registry import open_base
from minikin.perfusion import corpus
from minikin.perfusion.covariance import CAPTIONS_PER_DIMENSION, Covariance, estimate
from minikin.perfusion.key_lock import category_encoding, prompt_for

SIZES = (1_000, 10_000, 100_000)
RIDGES = (0.0, 1e-4, 1e-3, 1e-2)
CATEGORIES = ("cat", "teapot")
PROMPTS = (
    "a photo of {}",
    "{} on the beach",
    "a red car next to {} in the forest",
    "a dog and {} in a room",
    "a flat illustration of {} wearing a top hat at night",
)


def world_captions(n: int) -> list[str]:
    """Captions of n scenes of the wide sticker world."""
    from minikin.tiny.captions import caption
    from minikin.tiny.world import World

    world = World("wide")
    return [caption(world.scene(21, i), np.random.default_rng(i)).text for i in range(n)]


@torch.no_grad()
def similarities(base: Base, c: Covariance, ridge: float) -> tuple[Tensor, Tensor]:
    """s at every valid position but the first, and which of them is the category's word."""
    m = Covariance(c.c, c.n_tokens, c.n_captions, ridge).inverse.double()
    found, own = [], []
    for category in CATEGORIES:
        i_star = category_encoding(base, category).double()
        dual = m @ i_star
        for template in PROMPTS:
            out = base.encode([prompt_for(template, "x", category)])
            s = out.e[0].double() @ dual / (i_star @ dual)
            is_own = torch.zeros(len(s), dtype=torch.bool)
            is_own[list(out.positions[0][0][-1:])] = True
            keep = out.valid[0].clone()
            keep[0] = False
            found.append(s[keep])
            own.append(is_own[keep])
    return torch.cat(found), torch.cat(own)


def run() -> list[dict[str, Any]]:
    base = open_base("tiny", device="cpu")
    usual = CAPTIONS_PER_DIMENSION * base.layout.text_width
    reference, own = similarities(base, estimate(base, corpus.captions(usual)), 1e-3)
    rows = []
    choices: list[tuple[str, Sequence[str]]] = [(f"own, {n:,}", corpus.captions(n)) for n in SIZES]
    choices += [(f"world, {n:,}", world_captions(n)) for n in SIZES[:2]]
    for label, lines in choices:
        c = estimate(base, lines)
        for ridge in RIDGES:
            s, _ = similarities(base, c, ridge)
            moved = float((s - reference).abs().max())
            rows.append({
                "what": f"C of {label} captions, ridge {ridge:g}: condition {c.condition:.1e}, "
                f"s at the word {float(s[own].min()):.2f} to {float(s[own].max()):.2f}, "
                f"elsewhere at most {float(s[~own].max()):.2f}",
                "value": f"moved {moved:.3f}", "bar": f"against {usual:,} own captions, ridge 0.001",
                "holds": True, "moved": moved,
            })  # fmt: skip
    return rows
