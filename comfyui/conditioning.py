"""A prompt with concepts to ComfyUI's CONDITIONING: edited encodings, and what is added to values."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from minikin.errors import BaseMismatch
from minikin.models.regions import Region
from minikin.perfusion.concept import Concept
from minikin.perfusion.conditioning import PreparedConcept, edited
from minikin.perfusion.edit import Direction
from minikin.perfusion.key_lock import category_encoding

from . import prompt as prompts
from .concepts import ConceptInUse, at
from .text import ClipText

KEY = "minikin"  # of the additions in an entry of a CONDITIONING and in transformer_options
SAME_ENCODER = 0.99  # cosine of a concept's encoding here and where it was taught


@dataclass(frozen=True)
class Additions:
    """What the concepts of one prompt add to keys and values.

    e        (1, N, D), the edited encodings that they go with, on the CPU
    gates    by concept: how far its gate is open at each token (N,), float32
    deltas   by concept: by layer path, the value difference (width,)
    keys     by concept: key differences in the same form; {} where keys are locked
    regions  of the concepts, with their tokens
    """

    e: Tensor
    gates: dict[str, Tensor]
    deltas: dict[str, dict[str, Tensor]]
    keys: dict[str, dict[str, Tensor]]
    regions: tuple[Region, ...]


def encode(clip: Any, text: str, uses: tuple[ConceptInUse, ...]) -> list[list[Any]]:
    """A CONDITIONING: what CLIPTextEncode returns for the plain prompt, edited by the concepts.

    Concepts that start late or end early give one entry for each part of the timesteps. Raises UnknownName,
    BadRecipe, and BaseMismatch for a text encoder that is not the concept's.
    """
    encoder, concepts = ClipText(clip), {use.concept.name: use for use in uses}
    prompt = prompts.read(text, concepts)
    if uses and not prompt.uses:
        logging.warning(
            "Minikin: the prompt has none of %s; it is painted without.", ", ".join(f"<{n}>" for n in concepts)
        )
    acting = [use for use in uses if use.concept.name in prompt.names and use.strength]
    prepared = {use.concept.name: _prepared(encoder, use.concept) for use in acting}
    bounds = sorted({0.0, 1.0, *(share for use in acting for share in (use.start, use.end))})
    out: list[list[Any]] = []
    for start, end in pairwise(bounds):
        names = {use.concept.name for use in at(tuple(acting), start)}
        for e, options in _entries(encoder, prompt, {n: prepared[n] for n in names}):
            if len(bounds) > 2:
                options |= {"start_percent": start, "end_percent": end}
            out.append([e, options])
    return out


def _entries(
    encoder: ClipText, prompt: prompts.Prompt, prepared: dict[str, PreparedConcept]
) -> list[tuple[Tensor, dict[str, Any]]]:
    words = {name: p.words for name, p in prepared.items() if p.direction is not None}
    out = []
    for encoding, options in encoder.entries(prompt, words):
        if not prepared:
            out.append((encoding.e, dict(options)))
            continue
        kept = [k for k, use in enumerate(prompt.uses) if use.name in prepared]  # word: those that act
        now = prompts.Prompt(prompt.source, prompt.text, tuple(prompt.uses[k] for k in kept))
        positions = (tuple(encoding.positions[0][k] for k in kept),)
        result = edited(encoding._replace(positions=positions), now, prepared)
        concepts = {name: p.concept for name, p in prepared.items()}
        e = result.values_from.to(encoding.e)
        additions = Additions(
            e.cpu(),
            {name: gate[0].float().cpu() for name, gate in result.gates.items()},
            {name: c.delta for name, c in concepts.items()},
            {name: c.keys for name, c in concepts.items()},
            result.regions,
        )
        out.append((e, {**options, KEY: additions}))
    return out


@torch.no_grad()
def _prepared(encoder: ClipText, concept: Concept) -> PreparedConcept:
    """The concept for this text encoder. Raises BaseMismatch where it was taught with another one."""
    none = torch.empty(0)
    if concept.mode == "value":
        return PreparedConcept(concept, None, none)
    of_category = encoder.word_vectors(concept.category)
    widths = [w.shape[1] for w in of_category], [w.shape[1] for w in concept.word_deltas]
    if widths[0] != widths[1]:
        raise BaseMismatch(
            f"Concept '{concept.name}' was taught on {concept.origin.architecture}; its words have the widths "
            f"{widths[1]}, those of this model {widths[0]}. Load a checkpoint of its family."
        )
    words = tuple(w + d for w, d in zip(of_category, concept.word_deltas, strict=True))
    here = category_encoding(encoder, concept.category, words).cpu()
    cosine = float(torch.cosine_similarity(here, concept.i_star, dim=0))
    if cosine < SAME_ENCODER:
        raise BaseMismatch(
            f"Concept '{concept.name}' was taught with another text encoder: its word's encodings here and "
            f"there have a cosine of {cosine:.2f}. Load the checkpoint that it was taught on, remove a node "
            "that sets CLIP's last layer or changes its weights, or teach it again in mode value."
        )
    direction = Direction(concept.i_star, concept.dual, category_encoding(encoder, concept.category).cpu())
    return PreparedConcept(concept, direction, none, words, str(concept.recipe.get("positions", "all")))
