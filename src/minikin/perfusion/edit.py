"""The edit: what a concept does to text encodings, in closed form.

Perfusion (Tewel et al. 2023, arXiv:2305.01644) changes every cross-attention projection W of a
base from `W e` to `W e_perp + sum_j g_j o_j`: the part of the encoding that lies along the
concepts' directions i_j (in the metric M = C^-1) is taken out, and their targets o_j are put in
its place, as far as the gates g_j open. With keys locked to the category and values stored as a
difference from it,

    o_key   = W_key   e_category
    o_value = W_value e_category + delta

both projections see one and the same changed encoding, because W is linear:

    e'    = e_perp + sum_j g_j e_category_j
    key   = W_key   e'
    value = W_value e' + sum_j g_j delta_j

So the edit is two small pieces: `edit_encodings` (here) gives e' and the gates, and
`keysvalues.pack` adds the differences. Pure tensor functions in float32; no state, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.recipes.base import MAX_STRENGTH


@dataclass(frozen=True)
class Gate:
    """Where a gate is half open (beta) and how softly it opens (tau > 0)."""

    beta: float
    tau: float

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise BadRecipe(f"tau must be greater than 0, but it is {self.tau}; 0.1 to 0.2 is usual.")


OPEN = Gate(0.0, 1.0)  # compared by identity: no gate at all


@dataclass(frozen=True)
class Direction:
    """A concept's direction and its dual in the metric M = C^-1, fixed for one base.

    i_star     (D,)  the encoding that stands for the concept
    m_i_star   (D,)  M i_star, or any positive multiple of it: every use is free of its scale
    category   (D,)  the encoding of its category, e_category
    """

    i_star: Tensor
    m_i_star: Tensor
    category: Tensor

    @property
    def energy(self) -> Tensor:
        """|i*|^2 in the metric M."""
        return self.i_star @ self.m_i_star


class Edited(NamedTuple):
    """e' (B, N, D) and, for each concept, how far its gate is open (B, N)."""

    encodings: Tensor
    gates: tuple[Tensor, ...]


def dual(i_star: Tensor, c_inv: Tensor) -> Tensor:
    """M i*, scaled so that its largest entry is 1: what a concept file stores instead of C."""
    m_i_star = c_inv @ i_star
    return m_i_star / m_i_star.abs().max()


def similarity(e: Tensor, d: Direction) -> Tensor:
    """s = <i*, e>_M / <i*, i*>_M: 1 at the concept's own encoding (Perfusion, section 4.2).

    e  (..., D)
    returns (...)
    """
    return (e @ d.m_i_star) / d.energy


def gate(s: Tensor, g: Gate) -> Tensor:
    """How strongly each position is edited: sigmoid((s - beta) / tau). Perfusion, Eq. 3.

    The open gate, OPEN, is linear: g(s) = s, the closed-form edit without a gate (ROME).
    """
    return s if g is OPEN else torch.sigmoid((s - g.beta) / g.tau)


def perpendicular(e: Tensor, directions: list[Direction]) -> Tensor:
    """e minus its M-orthogonal projection on the span of all i*_j (Perfusion, appendix B).

    Gram form: e - I G^-1 I^T M e with G = I^T M I; equal to the paper's Cholesky and QR route
    and exact for concepts that are not orthogonal.
    e  (..., D)
    """
    i_stars = torch.stack([d.i_star for d in directions])  # (J, D)
    duals = torch.stack([d.m_i_star for d in directions])  # (J, D)
    gram = duals @ i_stars.T  # (J, J); singular when a concept is there twice, hence the pseudo-inverse
    alpha = (e @ duals.T) @ torch.linalg.pinv(gram).T  # (..., J)
    out: Tensor = e - alpha @ i_stars
    return out


def edit_encodings(
    e: Tensor, directions: list[Direction], locks: list[Gate], masks: Sequence[Tensor | None] = ()
) -> Edited:
    """e' = e_perp + sum_j g_j e_category_j, and the gates g_j.

    e      (B, N, D)   encodings of prompts with the concepts' word vectors in place
    locks  one gate per concept
    masks  one for each concept, (B, N) or None: positions it may edit at all (1) or never (0).
           Where no concept may, the encoding is returned as it is, bit for bit.
    """
    e = e.float()
    masks = masks or [None] * len(directions)
    gates = tuple(
        g if m is None else g * m
        for g, m in zip(
            (gate(similarity(e, d), lock) for d, lock in zip(directions, locks, strict=True)),
            masks, strict=True,
        )
    )  # fmt: skip
    put = sum(
        (g.unsqueeze(-1) * d.category for g, d in zip(gates, directions, strict=True)),
        start=torch.zeros_like(e),
    )
    out = perpendicular(e, directions) + put
    if all(m is not None for m in masks):
        keep = torch.stack([m for m in masks if m is not None]).amax(0).unsqueeze(-1).to(e.dtype)
        out = keep * out + (1 - keep) * e
    return Edited(out, gates)


def strength_gate(g: Gate, strength: float) -> Gate:
    """The gate of the value difference at a painting-time strength.

    Strength w turns the opening at the concept's own word, g(1), into w * g(1) for w <= 1 by
    moving beta up, tau unchanged; above 1 beta moves down by 0.3 for each unit, which opens
    the gate for related positions too. Monotone in w at every similarity; w = 1 changes nothing.

    Raises BadRecipe if strength is not in [0, 2].
    """
    if not 0 <= strength <= MAX_STRENGTH:
        raise BadRecipe(
            f"A concept's strength must lie between 0 and {MAX_STRENGTH:g}, but it is {strength:g}."
        )
    if strength == 1 or g is OPEN:
        return g
    if strength > 1:
        return Gate(g.beta - 0.3 * (strength - 1), g.tau)
    opening = torch.sigmoid(torch.tensor((1 - g.beta) / g.tau, dtype=torch.float64))
    wanted = torch.logit((strength * opening).clamp(min=1e-9))
    return Gate(float(1 - g.tau * wanted), g.tau)
