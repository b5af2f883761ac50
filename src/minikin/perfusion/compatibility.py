"""Check whether a concept fits an opened base."""

from __future__ import annotations

from minikin.models.base import Base
from minikin.models.identity import same_text_encoder
from minikin.perfusion.concept import Concept


def compatibility(base: Base, concept: Concept) -> str:
    """Relation between a concept and a base.

    Returns "same" (the base it was trained on), "sibling" (other U-Net weights, same text encoder and
    layers), or why it does not fit: "other layers" or "other text encoder".
    """
    widths = {layer.path: layer.width for layer in base.layout.layers}
    concept_widths = {path: d.numel() for path, d in concept.delta.items()}
    if concept.origin.architecture != base.architecture or widths != concept_widths:
        return "other layers"
    if concept.mode == "gated":
        embedding_widths = [m.get_input_embeddings().embedding_dim for m in base.text_encoders]
        if [w.shape[1] for w in concept.word_deltas] != embedding_widths:
            return "other layers"
        if len(concept.i_star) != base.layout.text_width:
            return "other layers"
    if not same_text_encoder(concept.origin, base.origin):
        return "other text encoder"
    return "same" if concept.origin.fingerprint == base.fingerprint else "sibling"
