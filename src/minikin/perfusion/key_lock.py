"""Key-locking: the category's mean encoding, which determines a concept's keys (Perfusion, section 4.1).

The encoding depends on the base and the category only, so concepts do not store it. The prompt templates
vary in length and in the position of the word, so that a concept does not learn a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minikin.models.prompt import Prompt, parse

if TYPE_CHECKING:
    from minikin.models.base import Base

TEMPLATES = (
    "a photo of {}",
    "{}",
    "a picture of {}",  # word: prompt data
    "a good photo of {}",
    "an image of {}",
    "a photograph of {}",
    "a view of {}",
    "a close up photo of {}",
    "the photo of {}",
    "a photo of {} in the picture",  # word: prompt data
    "a nice picture of {} in a photo",  # word: prompt data
    "an illustration of {}",
)

# e_category is the mean over these; changing the list would change the keys of every concept
LOCK_TEMPLATES = TEMPLATES[:8]


def prompt_for(template: str, name: str, category: str) -> Prompt:
    """The template as a parsed prompt, with the concept at `{}`; articles are inserted as in any prompt."""
    return parse(template.replace("{}", f"<{name}>", 1), {name: category})


@torch.no_grad()
def category_encoding(base: Base, category: str, words: Sequence[Tensor] | None = None) -> Tensor:
    """e_category (D,): mean encoding at the category's last token over LOCK_TEMPLATES, float32.

    words  word vectors per text encoder (n, d_k), which replace the category's
    """
    prompts = [prompt_for(t, "x", category) for t in LOCK_TEMPLATES]
    chunks = max(base.count_chunks(p) for p in prompts)
    out = base.encode(prompts, {"x": words} if words else None, chunks=chunks)
    rows = [out.e[b, at[0][-1]].float() for b, at in enumerate(out.positions)]
    return torch.stack(rows).mean(0)
