"""Identity of a base: hashes and sketches of weights that do not depend on the stored precision.

Models are published in float32, float16 and bfloat16. The hash rounds weights to float16 and then to bfloat16,
so the float32 and the float16 copy have the same hash. The bfloat16 copy was rounded once instead of twice, and
6 % of its weights differ. For that copy there is a sketch: a few weights, compared within rounding error.
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

N_SAMPLES = 48  # weights of a sketch: 128 characters in a concept file
RELATIVE = 2.0**-7  # bfloat16 has 8 significant bits, and copies may differ in the last one
ABSOLUTE = 2.0**-24  # the spacing of float16 near 0


@dataclass(frozen=True)
class Origin:
    """Identity of the base that a concept was trained on."""

    architecture: str  # tiny, sd1, sd2, sdxl
    fingerprint: str  # of the U-Net's cross-attention projections
    text_hash: str  # of the text encoders and tokenizers
    licence: str = ""
    text_sketch: str = ""  # `sketch` of the text encoders


def rounded(weight: Tensor) -> bytes:
    """Bytes of a tensor after rounding to float16 and then to bfloat16."""
    import torch

    return weight.detach().to("cpu").half().bfloat16().contiguous().view(torch.uint8).numpy().tobytes()


def sketch(weights: Sequence[Tensor], words: Iterable[str]) -> str:
    """Sketch of text encoders: a vocabulary hash, and N_SAMPLES weights in float16 from all matrices."""
    import torch

    matrices = [w for w in weights if w.ndim > 1]
    picked = [matrices[i * len(matrices) // N_SAMPLES].detach().flatten() for i in range(N_SAMPLES)]
    samples = torch.stack([w[(7919 * i) % len(w)].float().cpu() for i, w in enumerate(picked)])
    vocabulary = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
    return f"{vocabulary} {base64.b64encode(samples.half().numpy().tobytes()).decode()}"


def same_text_encoder(a: Origin, b: Origin) -> bool:
    """True if two bases have the same text encoders: equal hashes, or sketches equal up to rounding."""
    return a.text_hash == b.text_hash or sketches_match(a.text_sketch, b.text_sketch)


def text_difference(a: Origin, b: Origin) -> float | None:
    """How far the text encoders' weights are apart: the norm of their sketches' difference over that of `a`.

    0.01 is a light fine-tune, 1 or more an unrelated model. None where a sketch is missing or damaged, and
    where the tokenizers have other words.
    """
    try:
        (words_a, x), (words_b, y) = (
            (s.text_sketch.split()[0], _samples(s.text_sketch.split()[1])) for s in (a, b)
        )
    except (IndexError, ValueError, binascii.Error):
        return None
    if words_a != words_b or len(x) != len(y) or not np.isfinite(x).all() or not np.isfinite(y).all():
        return None
    return float(np.linalg.norm(x - y) / max(float(np.linalg.norm(x)), ABSOLUTE))


def sketches_match(a: str, b: str) -> bool:
    """True if two sketches are equal up to rounding to bfloat16."""
    try:
        (words_a, x), (words_b, y) = ((s.split()[0], _samples(s.split()[1])) for s in (a, b))
    except (IndexError, ValueError, binascii.Error):  # empty or damaged
        return False
    if words_a != words_b or not len(x) == len(y) == N_SAMPLES:
        return False
    return bool(np.allclose(x, y, rtol=RELATIVE, atol=ABSOLUTE))


def _samples(text: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), np.float16).astype(np.float64)
