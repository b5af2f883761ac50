"""Prompts with concepts to the denoiser's conditioning: packed keys and values.

`prepare_concept` moves a concept to a base once (the dual direction, value differences in packed order).
`condition` encodes prompts, edits the encodings (`perfusion.edit`) and packs keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minikin.models.attention import Addition
from minikin.models.identity import same_text_encoder
from minikin.models.prompt import Prompt
from minikin.models.regions import Region
from minikin.models.text import Encoded
from minikin.perfusion import edit
from minikin.perfusion.concept import Concept
from minikin.perfusion.covariance import covariance
from minikin.perfusion.edit import Direction
from minikin.perfusion.gate import Gate
from minikin.perfusion.key_lock import category_encoding

if TYPE_CHECKING:
    from minikin.models.base import Base
    from minikin.recipes import KeyLock


@dataclass(frozen=True)
class PreparedConcept:
    """A concept's tensors on the device of one base.

    direction  None in mode "value"
    delta      (sum of widths,) value differences in packed order
    words      per text encoder (n, d_k): word vectors; () in mode "value"
    positions  "all", or "own" where the gate opens at the concept's own tokens only
    keys       (sum of widths,) key differences, where keys are not locked
    """

    concept: Concept
    direction: Direction | None
    delta: Tensor
    words: tuple[Tensor, ...] = ()
    positions: str = "all"
    keys: Tensor | None = None


GateOverride = Callable[[Gate], Gate]  # the gate stored in a concept -> the gate to use


class Conditioning(NamedTuple):
    """The denoiser's conditioning for one prompt.

    kv       (B, N, W)  packed keys and values
    pooled   (B, P)     SDXL's pooled text embedding, else None
    regions             of concepts, with the tokens that belong to each
    mask     (B, N)     1 at the tokens that cross-attention reads; None where it reads all
    """

    kv: Tensor
    pooled: Tensor | None
    regions: tuple[Region, ...] = ()
    mask: Tensor | None = None


def packed_delta(base: Base, delta: Mapping[str, Tensor]) -> Tensor:
    """Differences by layer path as one vector (sum of widths,) in packed order, float32."""
    parts = [delta[layer.path].float() for layer in base.layout.layers]
    return torch.cat(parts).to(base.device)


def unpacked_delta(base: Base, flat: Tensor) -> dict[str, Tensor]:
    """The inverse of `packed_delta`: copies on the CPU, by layer path."""
    layers = base.layout.layers
    parts = torch.split(flat, [layer.width for layer in layers])
    return {layer.path: part.detach().cpu().clone() for layer, part in zip(layers, parts, strict=True)}


@torch.no_grad()
def prepare_concept(base: Base, concept: Concept) -> PreparedConcept:
    """Move a concept to a base that it fits (see `compatibility`).

    On a base with another text encoder the direction is computed anew: i* is the mean encoding of the concept's
    word there, and its dual comes from that base's C, which may have to be estimated first.
    """
    delta = packed_delta(base, concept.delta)
    keys = packed_delta(base, concept.keys) if concept.keys else None
    if concept.mode == "value":
        return PreparedConcept(concept, None, delta, keys=keys)
    category = category_encoding(base, concept.category)
    words = base.word_vectors(concept.category)
    words = tuple(w + d.to(w) for w, d in zip(words, concept.word_deltas, strict=True))
    i_star, dual = concept.i_star, concept.dual
    if not same_text_encoder(concept.origin, base.origin):
        i_star = category_encoding(base, concept.category, words).cpu()
        dual = edit.dual(i_star, covariance(base).inverse)
    parts = (t.to(base.device, torch.float32) for t in (i_star, dual, category))
    positions = str(concept.recipe.get("positions", "all"))
    return PreparedConcept(concept, Direction(*parts), delta, words, positions, keys)


@torch.no_grad()
def condition(
    base: Base,
    prompts: Sequence[Prompt | None],
    concepts: Mapping[str, PreparedConcept],
    *,
    lock: KeyLock = "local",
    gate: GateOverride | None = None,
    copies: int = 1,
    chunks: int | None = None,
    clip_skip: int = 1,
) -> list[Conditioning]:
    """The denoiser's conditioning for each prompt, repeated for `copies` images.

    Encodings of a prompt without concepts are not edited. None stands for SDXL's empty prompt, whose
    encodings are zero. As in the stock pipelines, prompts are encoded one by one, and projected and packed
    together in this order (negative first): matrix products then have the same shapes, and results are
    bit-identical.

    lock    "global" takes keys from the plain twin prompt, "local" from the edited encodings
    gate    replaces the gate of every concept, for the edit and for the value difference
    chunks  windows of tokens, the same for all prompts; those of the longest prompt by default
    """
    chunks = chunks or max((base.count_chunks(p) for p in prompts if p is not None), default=1)
    encodings = [_encodings(base, p, concepts, lock, chunks, clip_skip) for p in prompts]
    projected = base.project(torch.cat([e for p in encodings for e in p.raw]).repeat_interleave(copies, 0))
    rows = iter(torch.split(projected, copies))
    per_prompt = [
        _condition_prompt(p, concepts, gate, next(rows), next(rows) if len(p.raw) > 1 else None)
        for p in encodings
    ]
    e = torch.cat([p.values_from for p in per_prompt])
    keys = torch.cat([p.keys_from for p in per_prompt])
    same = all(p.keys_from is p.values_from for p in per_prompt)
    kv = base.pack(e, keys_from=None if same else keys, additions=_additions(per_prompt, concepts, copies))
    return [
        Conditioning(part, _expanded(p.pooled, copies), p.regions, _expanded(p.mask, copies))
        for part, p in zip(kv.chunk(len(per_prompt)), per_prompt, strict=True)
    ]


def _expanded(rows: Tensor | None, copies: int) -> Tensor | None:
    return None if rows is None else rows.expand(copies, -1)


@torch.no_grad()
def encoded(
    base: Base, prompts: Sequence[Prompt], concepts: Mapping[str, PreparedConcept]
) -> tuple[Tensor, Tensor | None, tuple[Addition, ...]]:
    """Edited encodings (B, N, D), pooled (B, P) or None, and additions, for networks that pack themselves."""
    encodings = [_encodings(base, p, concepts, "local", 1, 1) for p in prompts]
    per_prompt = [_condition_prompt(p, concepts, None, base.project(p.raw[0])) for p in encodings]
    pooled = [p.pooled for p in per_prompt if p.pooled is not None]
    e = torch.cat([p.values_from for p in per_prompt])
    return e, torch.cat(pooled) if pooled else None, tuple(_additions(per_prompt, concepts))


def edited(encoding: Encoded, prompt: Prompt, concepts: Mapping[str, PreparedConcept]) -> PromptConditioning:
    """The edit of one prompt's encodings, for a host with text encoders of its own (ComfyUI)."""
    encodings = _PromptEncodings(prompt, (encoding.e,), encoding, encoding.pooled)
    return _condition_prompt(encodings, concepts, None, encoding.e)


class _PromptEncodings(NamedTuple):
    """One prompt: its encodings (1, N, D) before the denoiser's projection, and where its concepts lie.

    raw       with the concepts' word vectors; then, for a global key lock, those of the plain twin
    encoding  None for SDXL's empty prompt
    """

    prompt: Prompt | None
    raw: tuple[Tensor, ...]
    encoding: Encoded | None
    pooled: Tensor | None


class PromptConditioning(NamedTuple):
    """One prompt: edited encodings (copies, N, D) for values and keys, each concept's gate values (1, N)."""

    values_from: Tensor
    keys_from: Tensor
    gates: dict[str, Tensor]
    pooled: Tensor | None
    regions: tuple[Region, ...] = ()
    mask: Tensor | None = None


def _encodings(
    base: Base,
    prompt: Prompt | None,
    concepts: Mapping[str, PreparedConcept],
    lock: KeyLock,
    chunks: int,
    clip_skip: int,
) -> _PromptEncodings:
    if prompt is None:
        e, pooled = base.zero_encoding(chunks)
        return _PromptEncodings(None, (e,), None, pooled)
    words = {n: concepts[n].words for n in prompt.names if concepts[n].direction is not None}
    encode = partial(base.text.encode, [prompt], device=base.device, chunks=chunks, clip_skip=clip_skip)
    encoding = encode(words)
    raw = (encoding.e, encode(None).e) if words and lock == "global" else (encoding.e,)
    return _PromptEncodings(prompt, raw, encoding, encoding.pooled)


def _condition_prompt(
    encodings: _PromptEncodings,
    concepts: Mapping[str, PreparedConcept],
    gate: GateOverride | None,
    e: Tensor,
    plain: Tensor | None = None,
) -> PromptConditioning:
    """Edit one prompt's projected encodings e (copies, N, D).

    plain  those of the plain twin, which a global key lock takes keys from
    """
    prompt, encoding = encodings.prompt, encodings.encoding
    if prompt is None or encoding is None:
        return PromptConditioning(e, e, {}, encodings.pooled)
    encoding = encoding._replace(e=e[:1])
    gated = [n for n in prompt.names if concepts[n].direction is not None]
    gates: dict[str, Tensor] = {}
    if gated:
        edited, gates = _gated_edit(encoding, prompt, concepts, gated, gate)
        e = edited.expand(len(e), -1, -1)
    for k, use in enumerate(prompt.uses):
        if concepts[use.name].direction is None:  # mode "value": the last token of the category, without a gate
            at_token = use.strength * encoding.token_mask([[k]], last=True)
            gates[use.name] = gates.get(use.name, 0) + at_token
    regions = _regions(encoding, prompt, concepts, gate)
    keys = e if plain is None else plain
    return PromptConditioning(e, keys, gates, encodings.pooled, regions, encoding.mask)


def _regions(
    encoding: Encoded,
    prompt: Prompt,
    concepts: Mapping[str, PreparedConcept],
    override: GateOverride | None,
) -> tuple[Region, ...]:
    """The regions that the prompt states; else, of several concepts of mode value, one to be found for each.

    The word of a concept is in no other's region, however far the other's gate opens for it.
    """
    words = {n: encoding.token_mask([_uses(prompt, n)])[0] for n in prompt.names}
    tokens = []
    for k, use in enumerate(prompt.uses):
        others = [mask for n, mask in words.items() if n != use.name]
        belongs = _region_tokens(encoding, k, concepts[use.name], override)
        tokens.append(belongs * (1 - torch.stack(others).amax(0)) if others else belongs)
    stated = [Region(use.box, t) for use, t in zip(prompt.uses, tokens, strict=True) if use.box]
    if stated or len(prompt.names) < 2 or any(concepts[n].direction is not None for n in prompt.names):
        return tuple(stated)
    by_name = {
        n: [t for use, t in zip(prompt.uses, tokens, strict=True) if use.name == n] for n in prompt.names
    }
    return tuple(Region(None, torch.stack(each).amax(0)) for each in by_name.values())


def _uses(prompt: Prompt, name: str) -> list[int]:
    return [k for k, use in enumerate(prompt.uses) if use.name == name]


def _gated_edit(
    encoding: Encoded,
    prompt: Prompt,
    concepts: Mapping[str, PreparedConcept],
    names: list[str],
    gate: GateOverride | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """e' (1, N, D) and each concept's gate values (1, N) for its value difference."""
    strengths: dict[str, float] = {}
    for use in prompt.uses:  # the strongest use of a concept that is named twice
        strengths[use.name] = max(use.strength, strengths.get(use.name, 0.0))
    directions = [d for n in names if (d := concepts[n].direction) is not None]
    gates = [_gate_of(concepts[n], gate) for n in names]
    masks = [encoding.token_mask([_uses(prompt, n)]) if concepts[n].positions == "own" else None for n in names]
    edited = edit.edit_encodings(encoding.e, directions, gates, masks)
    values = {}
    for n, d, g, mask in zip(names, directions, gates, masks, strict=True):
        value = edit.gate(edit.similarity(encoding.e.float(), d), edit.strength_gate(g, strengths[n]))
        values[n] = value if mask is None else value * mask
    return edited.encodings, values


def _gate_of(prepared: PreparedConcept, override: GateOverride | None) -> Gate:
    return override(prepared.concept.gate) if override else prepared.concept.gate


def _region_tokens(
    encoding: Encoded, use: int, prepared: PreparedConcept, override: GateOverride | None
) -> Tensor:
    """How much each token (N,) belongs to a concept use: its own tokens 1, others their gate value."""
    mask = encoding.token_mask([[use]])[0]
    if prepared.direction is None or prepared.positions == "own":
        return mask
    similarity = edit.similarity(encoding.e.float(), prepared.direction)
    return torch.maximum(mask, edit.gate(similarity, _gate_of(prepared, override))[0])


def _additions(
    per_prompt: Sequence[PromptConditioning], concepts: Mapping[str, PreparedConcept], copies: int = 1
) -> list[Addition]:
    """The addition of every concept, with a gate of 0 for prompts that do not name it."""
    additions = []
    for name in dict.fromkeys(n for p in per_prompt for n in p.gates):
        closed = torch.zeros_like(per_prompt[0].values_from[:1, :, 0], dtype=torch.float32)
        gate = torch.cat([p.gates.get(name, closed) for p in per_prompt]).repeat_interleave(copies, 0)
        additions.append(Addition(gate, concepts[name].delta, concepts[name].keys))
    return additions
