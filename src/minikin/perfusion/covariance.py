"""C, the uncentred second moment of a base's text encodings, and its inverse M.

Perfusion measures similarity in the metric M = C^-1, C = E[e e^T] over a caption corpus
(arXiv:2305.01644, section 4; ROME, Meng et al. 2022). Only valid tokens count (BOS to EOS): padding
would let one direction rule C. Sums are kept in float64. A narrow corpus leaves directions that
hardly occur, and their inverse would be noise: a ridge of `RIDGE` times the mean eigenvalue is
added. C is cached under the user's cache folder by text-encoder hash and corpus hash.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minikin.errors import BadRecipe, StorageError
from minikin.files import atomic_write, cache_folder
from minikin.models.prompt import Prompt
from minikin.perfusion import corpus

if TYPE_CHECKING:
    from collections.abc import Callable

    from minikin.models.base import Base

CAPTIONS_PER_DIMENSION = 12  # of our own corpus: 3,072 for tiny, 9,216 for SD 1.5, 24,576 for SDXL
RIDGE = 1e-3  # of the mean eigenvalue; see docs/measurements.md


@dataclass(frozen=True)
class Covariance:
    """C (D, D) float64 over `n_tokens` valid tokens of `n_captions` captions."""

    c: Tensor
    n_tokens: int
    n_captions: int
    ridge: float = RIDGE

    @cached_property
    def inverse(self) -> Tensor:
        """M = (C + ridge * tr(C) / D * I)^-1, float32. Invariant in direction to scaling of C."""
        d = self.c.shape[0]
        ridge = self.ridge * self.c.trace() / d
        inverse: Tensor = torch.linalg.inv(self.c + ridge * torch.eye(d, dtype=torch.float64))
        return inverse.float()

    @cached_property
    def condition(self) -> float:
        """Largest over smallest eigenvalue of C, before the ridge."""
        values = torch.linalg.eigvalsh(self.c)
        return float(values[-1] / values[0].clamp(min=1e-30))

    @cached_property
    def hash(self) -> str:
        """SHA-256 of C in float32 and the ridge: what a concept was taught with."""
        data = self.c.float().contiguous().numpy().tobytes()
        return hashlib.sha256(data + f"{self.ridge:g}".encode()).hexdigest()


def read_captions(path: str | Path) -> list[str]:
    """One caption a line; raises BadRecipe when there are too few to estimate anything."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BadRecipe(f"The captions {path} cannot be read: {e}. Expected UTF-8, one a line.") from e
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) < 100:
        raise BadRecipe(
            f"{path} holds {len(lines)} captions; at least 100 are needed to estimate C, and thousands "
            "are better."
        )
    return lines


@torch.no_grad()
def estimate(
    base: Base, captions: Sequence[str], *, ridge: float = RIDGE, batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Covariance:  # fmt: skip
    """C over the valid tokens of these captions; order does not matter beyond float64 rounding."""
    d = base.layout.text_width
    c = torch.zeros(d, d, dtype=torch.float64)
    n_tokens = 0
    for i in range(0, len(captions), batch):
        some = captions[i : i + batch]
        out = base.encode([Prompt(text, text) for text in some])
        e = out.e[out.valid].cpu().double()
        c += e.T @ e
        n_tokens += len(e)
        if progress:
            progress(min(i + batch, len(captions)), len(captions))
    return Covariance(c / max(n_tokens, 1), n_tokens, len(captions), ridge)


def covariance(
    base: Base, captions: Sequence[str] | None = None, *, ridge: float = RIDGE,
    progress: Callable[[int, int], None] | None = None,
) -> Covariance:  # fmt: skip
    """C of a base, from the cache if it was estimated before with the same captions."""
    if captions is not None:
        lines = list(captions)
    else:
        lines = corpus.captions(CAPTIONS_PER_DIMENSION * base.layout.text_width)
    words = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    path = cache_folder() / "covariance" / f"{base.text_hash[:16]}-{words[:16]}.safetensors"
    found = _read(path, ridge)
    if found is None:
        found = estimate(base, lines, ridge=ridge, progress=progress)
        _write(path, found)
    return found


def _read(path: Path, ridge: float) -> Covariance | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(path.read_bytes())
        n_tokens, n_captions = tensors["counts"].tolist()
        return Covariance(tensors["c"], n_tokens, n_captions, ridge)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None  # absent or damaged: estimated anew


def _write(path: Path, found: Covariance) -> None:
    from safetensors.torch import save

    counts = torch.tensor([found.n_tokens, found.n_captions])
    try:
        atomic_write(path, save({"c": found.c, "counts": counts}))
    except StorageError:
        if os.environ.get("MINIKIN_DEBUG"):
            raise  # without a cache it is estimated again next time
