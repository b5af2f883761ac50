"""What keys are locked to: the category's encoding, and the metric it was learned with.

Both follow from the base and the category alone and are not stored in concepts: e_category is the
mean over a fixed list of neutral prompts, C is estimated once per text encoder. The templates vary
in length and in the place of the word, so that a concept does not learn a position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minikin.bases.base import Base
from minikin.bases.covariance import covariance, find_cached
from minikin.bases.prompt import ConceptUse, Prompt
from minikin.concepts.concept import Concept
from minikin.errors import BaseMismatch

TEMPLATES = (
    "a photo of {}",
    "{}",
    "a picture of {}",
    "a good photo of {}",
    "an image of {}",
    "a photograph of {}",
    "a view of {}",
    "a close up photo of {}",
    "the photo of {}",
    "a photo of {} in the picture",
    "a nice picture of {} in a photo",
    "an illustration of {}",
)

# The prompts whose mean encoding at the category's last token is e_category. A fixed list: the
# locked key follows from the base and the category alone and need not be stored.
LOCK_TEMPLATES = TEMPLATES[:8]


def with_article(category: str) -> str:
    return ("an " if category[0].lower() in "aeiou" else "a ") + category


def prompt_for(template: str, name: str, category: str) -> Prompt:
    """A parsed prompt with the concept in the template's place."""
    text = template.format("{}")
    before, after = text.split("{}", 1)
    if not before.strip() or not before.rstrip().endswith((" a", " an", " the")):
        article = with_article(category)[: -len(category)]
        before += article
    start = len(before)
    use = ConceptUse(name, 1.0, start, start + len(category))
    return Prompt(template.replace("{}", f"<{name}>"), before + category + after, (use,))


@torch.no_grad()
def category_encoding(base: Base, category: str) -> Tensor:
    """e_category (D,): mean encoding at the category's last token over LOCK_TEMPLATES; float32."""
    prompts = [prompt_for(t, "x", category) for t in LOCK_TEMPLATES]
    out = base.encode(prompts)
    rows = [out.e[b, at[0][-1]].float() for b, at in enumerate(out.positions)]
    return torch.stack(rows).mean(0)


def inverse_for(base: Base, concept: Concept) -> Tensor:
    """C^-1 for a concept: of the covariance it was taught with, found by its hash.

    Raises BaseMismatch when no covariance of that hash can be had here (own captions were used).
    """
    usual = covariance(base)
    if usual.hash == concept.c_hash:
        return usual.inverse
    other = find_cached(base, concept.c_hash)
    if other is None:
        raise BaseMismatch(
            f"Concept '{concept.name}' was taught with another covariance ({concept.c_hash[:8]}; the usual one "
            f"here is {usual.hash[:8]}), probably from its own --captions file, which is not in this "
            "machine's cache. Teach it again here, or copy the cache folder's covariance file."
        )
    return other.inverse
