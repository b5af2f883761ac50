"""What keys are locked to: the category's encoding, the mean over a fixed list of neutral prompts.

It follows from the base and the category alone and is not stored in concepts. The templates vary in
length and in the place of the word, so that a concept does not learn a position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minikin.models.base import Base
from minikin.models.prompt import Prompt, parse

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


def prompt_for(template: str, name: str, category: str) -> Prompt:
    """A parsed prompt with the concept in the template's place; articles as in any prompt."""
    return parse(template.replace("{}", f"<{name}>", 1), {name: category})


@torch.no_grad()
def category_encoding(base: Base, category: str, words: Sequence[Tensor] | None = None) -> Tensor:
    """e_category (D,): mean encoding at the category's last token over LOCK_TEMPLATES; float32.

    With `words`, per text encoder (n, d_k), the same of a concept that has these word vectors.
    """
    prompts = [prompt_for(t, "x", category) for t in LOCK_TEMPLATES]
    out = base.encode(prompts, {"x": words} if words else None)
    rows = [out.e[b, at[0][-1]].float() for b, at in enumerate(out.positions)]
    return torch.stack(rows).mean(0)
