"""Whether a concept fits an open base: the same one, a sibling of it, or another altogether."""

from __future__ import annotations

from minikin.models.base import Base
from minikin.models.identity import same_text
from minikin.perfusion.concept import Concept


def compatibility(base: Base, concept: Concept) -> str:
    """ "same", "sibling" (other weights, same text encoder and layers) or why the concept does not fit."""
    widths = {s.path: s.width for s in base.layout.sites}
    concept_widths = {path: d.numel() for path, d in concept.delta.items()}
    if concept.origin.architecture != base.architecture or widths != concept_widths:
        return "stranger"
    if concept.mode == "gated":
        embedding_widths = [m.get_input_embeddings().embedding_dim for m in base.text_encoders]
        if [w.shape[1] for w in concept.word_deltas] != embedding_widths:
            return "stranger"
        if len(concept.i_star) != base.layout.text_width:
            return "stranger"
    if not same_text(concept.origin, base.origin):
        return "other text encoder"
    return "same" if concept.origin.fingerprint == base.fingerprint else "sibling"
