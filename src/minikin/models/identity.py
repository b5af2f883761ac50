"""Telling whether two bases have the same weights, also when they are kept in different precisions.

A model is published in float32, float16 and bfloat16. The hash takes the weights through float16 to
bfloat16, so that the float32 and the float16 copy have one hash. No hash can include the bfloat16 copy:
it was rounded once where they are rounded twice, and 6 % of its weights end up on the other side. For it
there is a sketch, a few weights themselves, which are compared within what rounding can do.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

N_SAMPLES = 48  # of a sketch: 128 characters in a concept file
RELATIVE = 2.0**-7  # bfloat16 has 8 significant bits: copies made on different ways are neighbours in it
ABSOLUTE = 2.0**-24  # the spacing of float16 near 0


@dataclass(frozen=True)
class Origin:
    """The base a concept was taught on: enough to recognise it, its siblings and strangers."""

    architecture: str  # tiny, sd1, sd2, sdxl
    fingerprint: str  # of the U-Net's cross-attention projections
    text_hash: str  # of the text encoders and tokenizers
    licence: str = ""
    text_sketch: str = ""  # some weights of the text encoders, for copies in another precision


def rounded(weight: Tensor) -> bytes:
    """A tensor rounded to float16 and then to bfloat16, as bytes."""
    import torch

    return weight.detach().to("cpu").half().bfloat16().contiguous().view(torch.uint8).numpy().tobytes()


def sketch(weights: Sequence[Tensor], words: Iterable[str]) -> str:
    """N_SAMPLES weights in float16, from matrices spread over all of them, and the hash of the words."""
    import torch

    matrices = [w for w in weights if w.ndim > 1]
    picked = [matrices[i * len(matrices) // N_SAMPLES].detach().flatten() for i in range(N_SAMPLES)]
    samples = torch.stack([w[(7919 * i) % len(w)].float().cpu() for i, w in enumerate(picked)])
    vocabulary = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
    return f"{vocabulary} {base64.b64encode(samples.half().numpy().tobytes()).decode()}"


def same_text(a: Origin, b: Origin) -> bool:
    """Whether two bases read text alike: equal hashes, or sketches that differ by rounding only."""
    return a.text_hash == b.text_hash or alike(a.text_sketch, b.text_sketch)


def alike(a: str, b: str) -> bool:
    """Whether two sketches are of one model, as far as rounding to bfloat16 lets one say."""
    try:
        (words_a, x), (words_b, y) = ((s.split()[0], _samples(s.split()[1])) for s in (a, b))
    except (IndexError, ValueError, binascii.Error):  # none, or damaged
        return False
    if words_a != words_b or not len(x) == len(y) == N_SAMPLES:
        return False
    return bool(np.allclose(x, y, rtol=RELATIVE, atol=ABSOLUTE))


def _samples(text: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), np.float16).astype(np.float64)
