"""Check whether a concept fits an opened base, and how well."""

from __future__ import annotations

from minikin.errors import BaseMismatch
from minikin.models.base import Base
from minikin.models.identity import same_text_encoder, text_difference
from minikin.perfusion.concept import Concept

OTHER_LAYERS, OTHER_TEXT = "other layers", "other text encoder"


def compatibility(base: Base, concept: Concept) -> str:
    """Relation between a concept and a base.

    Returns "same" (the base it was trained on), "sibling" (other U-Net weights, same text encoder and layers),
    "other text encoder" (a fine-tune of it, as most community checkpoints have), or "other layers".
    """
    widths = {layer.path: layer.width for layer in base.layout.layers}
    concept_widths = {path: d.numel() for path, d in concept.delta.items()}
    if concept.origin.architecture != base.architecture or widths != concept_widths:
        return OTHER_LAYERS
    if concept.mode == "gated":
        embedding_widths = [m.get_input_embeddings().embedding_dim for m in base.text_encoders]
        if [w.shape[1] for w in concept.word_deltas] != embedding_widths:
            return OTHER_LAYERS
        if len(concept.i_star) != base.layout.text_width:
            return OTHER_LAYERS
    if not same_text_encoder(concept.origin, base.origin):
        return OTHER_TEXT
    return "same" if concept.origin.fingerprint == base.fingerprint else "sibling"


def check(base: Base, concept: Concept, *, force: bool = False) -> None:
    """Raise BaseMismatch when a concept does not fit this base.

    A value-only concept sits in the U-Net, at its category's last token: another text encoder is no reason. A
    gated one is found by its direction among text encodings; `force` takes it all the same (`prepare_concept`).
    """
    verdict = compatibility(base, concept)
    if verdict == OTHER_LAYERS:
        raise BaseMismatch(
            f"{_taught_on(base, concept)}: the cross-attention layers do not match. Open a base of the family "
            "it was made for, or teach it again on this one."
        )
    if verdict != OTHER_TEXT or concept.mode == "value":
        return
    if not force:
        raise BaseMismatch(
            f"{_taught_on(base, concept)}: its text encoder is another one ({_distance(base, concept)}). Open "
            "the base it was made for, or teach it again on this one. On the command line --force, in Python "
            "force=True, takes it all the same, with its direction computed anew."
        )
    tokens = [len(words) for words in base.word_vectors(concept.category)]
    if tokens != [len(words) for words in concept.word_deltas]:
        raise BaseMismatch(
            f"{_taught_on(base, concept)}: its tokenizer splits the category '{concept.category}' into "
            f"{tokens[0]} tokens, and the concept has {len(concept.word_deltas[0])} word vectors. Teach it "
            "again on this base."
        )


def difference_note(base: Base, concept: Concept) -> str:
    """A sentence for who uses the concept on a base with another text encoder; "" where it is the same one."""
    if same_text_encoder(concept.origin, base.origin):
        return ""
    edit = (
        f"Its value-only edit acts at the word '{concept.category}' all the same"
        if concept.mode == "value"
        else "Its direction was computed anew for this base"
    )
    return (
        f"Concept '{concept.name}' was taught with another text encoder than that of {base.name}: "
        f"{_distance(base, concept)}. {edit}; the further apart they are, the less it may look like the photos."
    )


def _taught_on(base: Base, concept: Concept) -> str:
    origin = concept.origin
    return (
        f"Concept '{concept.name}' was taught on {origin.architecture} ({origin.fingerprint[:8]}); the open "
        f"base is {base.name}, {base.architecture} ({base.fingerprint[:8]})"
    )


def _distance(base: Base, concept: Concept) -> str:
    difference = text_difference(concept.origin, base.origin)
    if difference is None:
        return "how far they are apart is not known, as their words differ or the file does not say"
    return f"their weights are {100 * difference:.2g} % apart"
