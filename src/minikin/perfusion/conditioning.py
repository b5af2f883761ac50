"""Prompts with concepts to packed keys and values: where base, prompt and edit meet.

`Loaded` is a concept made ready for one open base (the direction's dual, the packed order of its
value differences): milliseconds, once. `condition` turns prompts into what a pipeline is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minikin.models.attention import Addition
from minikin.models.base import Base
from minikin.models.prompt import Prompt
from minikin.models.regions import Placed
from minikin.models.text import Encoded
from minikin.perfusion import edit
from minikin.perfusion.concept import Concept
from minikin.perfusion.edit import Direction, Gate
from minikin.perfusion.key_lock import category_encoding
from minikin.recipes import KeyLock


@dataclass(frozen=True)
class Loaded:
    """A concept on one base.

    direction  None in mode "row"
    delta      (sum of widths,) value differences in packed order
    words      per text encoder (n, d_k): the word vectors themselves; () in mode "row"
    keys       (sum of widths,) the same for keys, where they are not locked
    """

    concept: Concept
    direction: Direction | None
    delta: Tensor
    words: tuple[Tensor, ...] = ()
    positions: str = "all"
    keys: Tensor | None = None


Change = Callable[[Gate], Gate]


def _unchanged(own: Gate) -> Gate:
    return own


class Condition(NamedTuple):
    """Packed keys and values (B, N, W), SDXL's pooled embedding (B, P) or None, and what belongs where."""

    kv: Tensor
    pooled: Tensor | None
    placed: tuple[Placed, ...] = ()


def packed_delta(base: Base, delta: Mapping[str, Tensor]) -> Tensor:
    """Differences by site as one vector in packed order, on the base's device, float32."""
    parts = [delta[site.path].float() for site in base.layout.sites]
    return torch.cat(parts).to(base.device)


def unpacked_delta(base: Base, flat: Tensor) -> dict[str, Tensor]:
    """The inverse of `packed_delta`."""
    parts = torch.split(flat, [site.width for site in base.layout.sites])
    return {s.path: p.detach().cpu().clone() for s, p in zip(base.layout.sites, parts, strict=True)}


def load(base: Base, concept: Concept) -> Loaded:
    """Make a concept ready for a base it fits."""
    delta = packed_delta(base, concept.delta)
    keys = packed_delta(base, concept.keys) if concept.keys else None
    if concept.mode == "row":
        return Loaded(concept, None, delta, keys=keys)
    category = category_encoding(base, concept.category)
    words = base.word_vectors(concept.category)
    words = tuple(w + d.to(w) for w, d in zip(words, concept.word_deltas, strict=True))
    parts = (t.to(base.device, torch.float32) for t in (concept.i_star, concept.dual, category))
    positions = str(concept.recipe.get("positions", "all"))
    return Loaded(concept, Direction(*parts), delta, words, positions, keys)


@torch.no_grad()
def condition(
    base: Base, prompts: Sequence[Prompt | None], loaded: Mapping[str, Loaded], *,
    lock: KeyLock = "local", gate: Change | None = None, copies: int = 1,
) -> list[Condition]:  # fmt: skip
    """What the U-Net is given for each of these prompts, repeated for `copies` images.

    A prompt without concepts is not edited at all. None stands for SDXL's empty prompt, whose
    encodings are zero. Prompts are encoded one by one and packed all together, in this order, as
    the stock pipelines do (negative first): matrix products are then of the same shapes, and
    results agree with theirs to the bit.
    gate  changes every concept's own operating point (for its lock and its value difference)
    """
    rows = [_row(base, p, loaded, lock, gate) for p in prompts]
    e = torch.cat([r.values_from for r in rows]).repeat_interleave(copies, 0)
    keys = torch.cat([r.keys_from for r in rows]).repeat_interleave(copies, 0)
    same = all(r.keys_from is r.values_from for r in rows)
    kv = base.pack(e, keys_from=None if same else keys, additions=_additions(rows, loaded, copies))
    pooled = [None if r.pooled is None else r.pooled.expand(copies, -1) for r in rows]
    parts = zip(kv.chunk(len(rows)), pooled, rows, strict=True)
    return [Condition(part, p, row.placed) for part, p, row in parts]


@torch.no_grad()
def encoded(
    base: Base, prompts: Sequence[Prompt], loaded: Mapping[str, Loaded]
) -> tuple[Tensor, Tensor | None, tuple[Addition, ...]]:
    """Encodings (B, N, D), pooled (B, P) or None, and what concepts add, for a network that packs by itself."""
    rows = [_row(base, p, loaded, "local", None) for p in prompts]
    pooled = [r.pooled for r in rows if r.pooled is not None]
    e = torch.cat([r.values_from for r in rows])
    return e, torch.cat(pooled) if pooled else None, tuple(_additions(rows, loaded))


def _additions(rows: Sequence[_Row], loaded: Mapping[str, Loaded], copies: int = 1) -> list[Addition]:
    """Every concept of these rows, closed where a row does not name it."""
    additions = []
    for name in dict.fromkeys(n for r in rows for n in r.openings):
        nothing = torch.zeros(rows[0].values_from.shape[:2], device=rows[0].values_from.device)
        opening = torch.cat([r.openings.get(name, nothing) for r in rows]).repeat_interleave(copies, 0)
        additions.append(Addition(opening, loaded[name].delta, loaded[name].keys))
    return additions


class _Row(NamedTuple):
    """One prompt: encodings (1, N, D) for values and keys, and how far each concept opens (1, N)."""

    values_from: Tensor
    keys_from: Tensor
    openings: dict[str, Tensor]
    pooled: Tensor | None
    placed: tuple[Placed, ...] = ()


def _row(
    base: Base, prompt: Prompt | None, loaded: Mapping[str, Loaded], lock: KeyLock, gate: Change | None
) -> _Row:  # fmt: skip
    if prompt is None:
        e, pooled = base.zero_encoding()
        return _Row(e, e, {}, pooled)
    gated = [n for n in prompt.names if loaded[n].direction is not None]
    out = base.encode([prompt], {n: loaded[n].words for n in gated})
    e = out.e
    openings: dict[str, Tensor] = {}
    if gated:
        e, openings = _gated(out, prompt, loaded, gated, gate)
    for k, use in enumerate(prompt.uses):
        if loaded[use.name].direction is None:  # mode "row": the category's last token alone
            own = use.strength * out.opening([[k]], last=True)
            openings[use.name] = openings.get(use.name, 0) + own
    keys = base.encode([prompt]).e if gated and lock == "global" else e
    placed = tuple(
        Placed(use.box, _belonging(out, k, loaded[use.name], gate))
        for k, use in enumerate(prompt.uses)
        if use.box
    )
    return _Row(e, keys, openings, out.pooled, placed)


def _belonging(out: Encoded, use: int, one: Loaded, gate: Change | None) -> Tensor:
    """How much each token (N,) belongs to a use of a concept: its own all, others as far as its gate opens."""
    own = out.opening([[use]])[0]
    if one.direction is None:
        return own
    lock = (gate or _unchanged)(one.concept.gate)
    return torch.maximum(own, edit.gate(edit.similarity(out.e.float(), one.direction), lock)[0])


def _gated(
    out: Encoded, prompt: Prompt, loaded: Mapping[str, Loaded], names: list[str], gate: Change | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """e' (1, N, D) and how far each concept's value difference opens (1, N)."""
    strengths: dict[str, float] = {}
    for use in prompt.uses:  # a concept named twice opens as far as its strongest use asks for
        strengths[use.name] = max(use.strength, strengths.get(use.name, 0.0))
    directions = [d for n in names if (d := loaded[n].direction) is not None]
    locks = [(gate or _unchanged)(loaded[n].concept.gate) for n in names]
    where = {n: [k for k, use in enumerate(prompt.uses) if use.name == n] for n in names}
    masks = [out.opening([where[n]]) if loaded[n].positions == "own" else None for n in names]
    done = edit.edit_encodings(out.e, directions, locks, masks)
    openings = {}
    for n, d, own, mask in zip(names, directions, locks, masks, strict=True):
        opening = edit.gate(edit.similarity(out.e.float(), d), edit.strength_gate(own, strengths[n]))
        openings[n] = opening if mask is None else opening * mask
    return done.encodings, openings
