"""The closed-form edit of text encodings: gated rank-1 updates with locked keys.

Perfusion (Tewel et al. 2023, arXiv:2305.01644) replaces the output `W e` of every cross-attention
projection by `W e_perp + sum_j g_j o_j`. The component of the encoding e along the concepts' directions
i*_j (in the metric M = C^-1) is removed, and their targets o_j, scaled by the gates g_j, are added. With
keys locked to the category and values stored as a difference from the category's value,

    o_key   = W_key   e_category
    o_value = W_value e_category + delta

both projections read the same edited encoding e', because W is linear:

    e'    = e_perp + sum_j g_j e_category_j
    key   = W_key   e'
    value = W_value e' + sum_j g_j delta_j

`edit_encodings` computes e' and the gates, and `models.attention.pack` adds the value differences. All
functions here are pure tensor functions in float32, without state and without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.limits import MAX_STRENGTH
from minikin.perfusion.gate import OPEN, Gate


@dataclass(frozen=True)
class Direction:
    """A concept's direction, its dual in the metric M = C^-1, and its category, for one base.

    i_star     (D,)  target input of the edit: the concept's mean encoding
    m_i_star   (D,)  M i_star, or any positive multiple of it; no result depends on its scale
    category   (D,)  e_category: the encoding that keys are locked to
    """

    i_star: Tensor
    m_i_star: Tensor
    category: Tensor

    @property
    def energy(self) -> Tensor:
        """Squared norm of i* in the metric M."""
        return self.i_star @ self.m_i_star


class Edited(NamedTuple):
    """The edited encodings e' (B, N, D) and each concept's gate values (B, N)."""

    encodings: Tensor
    gates: tuple[Tensor, ...]


def dual(i_star: Tensor, c_inv: Tensor) -> Tensor:
    """M i*, scaled to a largest entry of 1; a concept file stores it in place of C.

    i_star (D,), c_inv (D, D); returns (D,)
    """
    m_i_star = c_inv @ i_star
    return m_i_star / m_i_star.abs().max()


def similarity(e: Tensor, d: Direction) -> Tensor:
    """Normalized similarity s = <i*, e>_M / <i*, i*>_M, which is 1 at e = i* (Perfusion, section 4.2).

    e (..., D); returns (...)
    """
    return (e @ d.m_i_star) / d.energy


def gate(s: Tensor, g: Gate) -> Tensor:
    """Gate values sigmoid((s - beta) / tau) of similarities s of any shape (Perfusion, Eq. 3).

    The gate OPEN is linear: g(s) = s, the closed-form edit without a gate (ROME).
    """
    return s if g is OPEN else torch.sigmoid((s - g.beta) / g.tau)


def perpendicular(e: Tensor, directions: list[Direction]) -> Tensor:
    """e minus its M-orthogonal projection onto the span of all i*_j (Perfusion, appendix B).

    Gram form: e - I G^-1 I^T M e with G = I^T M I. It equals the paper's Cholesky and QR form, also for
    concepts that are not orthogonal.

    e (..., D); returns the same shape
    """
    i_stars = torch.stack([d.i_star for d in directions])  # (J, D)
    duals = torch.stack([d.m_i_star for d in directions])  # (J, D)
    gram = duals @ i_stars.T  # (J, J); singular if a concept occurs twice, hence the pseudo-inverse
    alpha = (e @ duals.T) @ torch.linalg.pinv(gram).T  # (..., J)
    out: Tensor = e - alpha @ i_stars
    return out


def edit_encodings(
    e: Tensor, directions: list[Direction], gates: list[Gate], masks: Sequence[Tensor | None] = ()
) -> Edited:
    """Edited encodings e' = e_perp + sum_j g_j e_category_j, and the gate values g_j.

    e      (B, N, D)  encodings of prompts that contain the concepts' word vectors
    gates  one per concept
    masks  one per concept, (B, N) or None: 1 at tokens that the concept may edit, 0 elsewhere.
           A token that no concept may edit keeps its encoding, bit for bit.
    """
    e = e.float()
    masks = masks or [None] * len(directions)
    values = [gate(similarity(e, d), g) for d, g in zip(directions, gates, strict=True)]
    masked = tuple(g if m is None else g * m for g, m in zip(values, masks, strict=True))
    targets = sum(
        (g.unsqueeze(-1) * d.category for g, d in zip(masked, directions, strict=True)),
        start=torch.zeros_like(e),
    )
    out = perpendicular(e, directions) + targets
    if all(m is not None for m in masks):
        editable = torch.stack([m for m in masks if m is not None]).amax(0).unsqueeze(-1).to(e.dtype)
        out = editable * out + (1 - editable) * e
    return Edited(out, masked)


def strength_gate(g: Gate, strength: float) -> Gate:
    """The gate of the value difference at a strength that a prompt gives.

    A strength w <= 1 raises beta such that the gate value at s = 1 becomes w * g(1); tau stays. Above 1,
    beta falls by 0.3 per unit, which opens the gate for related tokens too. The gate value grows with w
    at every similarity, and w = 1 returns the gate unchanged.

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
    at_concept = torch.sigmoid(torch.tensor((1 - g.beta) / g.tau, dtype=torch.float64))
    logit = torch.logit((strength * at_concept).clamp(min=1e-9))
    return Gate(float(1 - g.tau * logit), g.tau)
