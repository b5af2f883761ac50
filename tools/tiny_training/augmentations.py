"""Batches for both judges: scenes with their answers and captions, and lookalikes, made hard to see.

Generated images are softer and dirtier than drawn ones, so every image is moved, softened,
tinted and made noisy at random (`spoil`); the judges then hold on what a decoder makes, without
having seen any one decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from tools.tiny_training.hard_negatives import BLOCK, Lookalikes
from torch import Tensor, nn

from minikin.tiny.captions import caption
from minikin.tiny.encoders.dual_encoder import Tokens
from minikin.tiny.encoders.fields import SLOTS, UNKNOWN, Field, places, truth
from minikin.tiny.vocabulary import WorldSpec
from minikin.tiny.world import Rng, Scene

SHIFT = 5  # px, largest move
SCENES, MASKED = 0.6, 0.4  # share of a batch that is scenes; of lookalikes shown without background
# What a thing is takes longest to learn, and is asked for most; other fields weigh 1.
FIELD_WEIGHTS = {"first_object": 3.0, "second_object": 1.5}
POINTED = ("object", "colour", "pattern")  # asked of each thing, where it stands
GREY = 128  # in place of a masked background


@dataclass(frozen=True)
class Batch:
    """Scenes first, lookalikes behind them.

    images (n, 3, 128, 128) uint8; labels by field (n,) or (n, answers), and places (n, 2);
    ids (scenes, context); identity (n - scenes,)
    """

    pictures: Tensor
    labels: Mapping[str, Tensor]
    ids: Tensor
    identity: Tensor
    scenes: int


class Rows(Protocol):
    """Images by number: `shards.Shards`, or an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray) -> np.ndarray: ...


class Glimpses:
    """Draws batches from images of scenes and from lookalikes.

    images   row i shows scene i: (128, 128, 3) uint8
    tokens     turns captions into ids; None where nobody reads
    """

    def __init__(
        self, spec: WorldSpec, pictures: Rows, scenes: Sequence[Scene], lookalikes: Lookalikes,
        tokens: Tokens | None = None,
    ) -> None:  # fmt: skip
        self.pictures, self.scenes, self.lookalikes, self.tokens = pictures, scenes, lookalikes, tokens
        rows = [{"places": places(s), **truth(s, spec)} for s in scenes]
        self.labels = {name: np.stack([r[name] for r in rows]) for name in rows[0]}

    def batch(self, rng: Rng, size: int) -> Batch:
        """About `size` examples: mostly scenes, and whole blocks of lookalikes."""
        n = round(size * SCENES)
        at = rng.integers(len(self.scenes), size=n)
        blocks = rng.integers(len(self.lookalikes.identity) // BLOCK, size=max(1, (size - n) // BLOCK))
        like = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        blank = self.lookalikes.needs_mask[like] | (rng.random(len(like)) < MASKED)
        shown = np.concatenate([self.pictures[at], self._lookalikes(like, blank)])
        texts = [caption(self.scenes[i], rng).text for i in at] if self.tokens else []
        return Batch(
            torch.from_numpy(moved(shown, rng)).permute(0, 3, 1, 2),
            {k: torch.from_numpy(self._answers(k, at, like, blank)) for k in self.labels},
            self.tokens(texts) if self.tokens else torch.zeros(0, 0, dtype=torch.long),
            torch.from_numpy(self.lookalikes.identity[like]),
            n,
        )

    def _lookalikes(self, at: np.ndarray, blank: np.ndarray) -> np.ndarray:
        shown = np.asarray(self.lookalikes.pictures[at])
        inside = self.lookalikes.mask(at)[..., None] | ~blank[:, None, None, None]
        return np.where(inside, shown, np.uint8(GREY))

    def _answers(self, field: str, at: np.ndarray, like: np.ndarray, blank: np.ndarray) -> np.ndarray:
        """Truths of scenes and lookalikes; an image without its background asks nothing."""
        theirs = self.lookalikes.labels[field][like].copy()
        theirs[blank] = UNKNOWN
        return np.concatenate([self.labels[field][at], theirs])


def moved(pictures: np.ndarray, rng: Rng) -> np.ndarray:
    """Each image (n, h, w, 3) moved by up to SHIFT pixels; edges are mirrored."""
    n, h, w, _ = pictures.shape
    padded = np.pad(pictures, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="reflect")
    places = rng.integers(2 * SHIFT + 1, size=(n, 2))
    return np.stack([p[y : y + h, x : x + w] for p, (y, x) in zip(padded, places, strict=True)])


def spoil(pictures: Tensor, rng: Rng) -> Tensor:
    """uint8 (n, 3, h, w) to float in about [-1, 1], softened, tinted and noisy, each differently.

    Each kind of damage goes to a share of the images: done to all, it would cost a third of a step.
    """
    n, c, h, w = pictures.shape

    def some(share: float) -> Tensor:
        return torch.from_numpy(np.flatnonzero(rng.random(n) < share))

    def amounts(low: float, high: float, count: int, channels: int = 1) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (count, channels, 1, 1)).astype(np.float32))

    tint = amounts(0.92, 1.08, n, c)
    x = pictures.contiguous().float().mul_(tint / 127.5).add_(amounts(-0.08, 0.08, n, c) - tint)
    for factor, share, most in ((2, 0.5, 1.0), (4, 0.25, 0.6)):
        at = some(share)
        soft = _enlarged(F.avg_pool2d(x[at], factor), (h, w))
        x[at] = x[at].lerp(soft, amounts(0, most, len(at)))
    at = some(0.3)
    grain = np.frombuffer(rng.bytes(len(at) * c * h * w), np.uint8).reshape(len(at), c, h, w)
    x[at] += amounts(0, 0.2 / 255, len(at)) * torch.from_numpy(grain.copy()).float().sub_(127.5)
    at = some(0.3)
    stains = rng.normal(size=(len(at), c, h // 8, w // 8)).astype(np.float32)
    x[at] += amounts(0, 0.1, len(at)) * _enlarged(torch.from_numpy(stains), (h, w))
    return x


def _enlarged(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def answer_loss(scores: Tensor, fields: Sequence[Field], labels: Mapping[str, Tensor]) -> Tensor:
    """Weighted mean over the fields of the cross-entropy where the answer is known."""
    parts, total = [], 0.0
    for field, part in zip(
        fields, torch.split(scores.float(), [len(f.answers) for f in fields], -1), strict=True
    ):
        label = labels[field.name]
        known = label >= 0
        if field.is_multiple:
            yes = label.clamp_min(0).float()
            each = F.binary_cross_entropy_with_logits(part, yes, reduction="none") * len(field.answers)
        else:
            each = F.cross_entropy(part, label.clamp_min(0), reduction="none")
        weight = FIELD_WEIGHTS.get(field.name, 1.0)
        parts.append(weight * (each * known).sum() / known.sum().clamp_min(1))
        total += weight
    return torch.stack(parts).sum() / total


def point_head(channels: int, fields: Sequence[Field]) -> nn.Linear:
    """Tells of a thing from the features of the place where it stands; for `point_loss`."""
    return nn.Linear(channels, sum(len(f.answers) for f in _pointed(fields, SLOTS[0])))


def point_loss(cells: Tensor, head: nn.Linear, fields: Sequence[Field], labels: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of what each thing is, told from the cell it stands in; cells (n, channels, 8, 8).

    The answers of a whole image teach slowly what a thing looks like, because first the eye must
    find out where it is. The world knows that, so it is told.
    """
    parts = []
    for s, slot in enumerate(SLOTS):
        place = labels["places"][:, s]
        here = cells.flatten(2)[torch.arange(len(cells)), :, place.clamp_min(0)]  # (n, channels)
        asked = _pointed(fields, slot)
        scores = head(here.float())
        for field, part in zip(asked, torch.split(scores, [len(f.answers) for f in asked], -1), strict=True):
            label = labels[field.name]
            known = (label >= 0) & (place >= 0)
            each = F.cross_entropy(part, label.clamp_min(0), reduction="none")
            parts.append((each * known).sum() / known.sum().clamp_min(1))
    return torch.stack(parts).mean()


def _pointed(fields: Sequence[Field], slot: str) -> list[Field]:
    return [f for f in fields if f.name in {f"{slot}_{question}" for question in POINTED}]


def identity_loss(likeness: Tensor, identity: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, arXiv:2004.11362, L_out): views of one identity
    (n,) are each other's positives, everything else in the batch is not.
    """
    cosine = likeness @ likeness.T / temperature  # (n, n)
    self_ = torch.eye(len(likeness), dtype=torch.bool, device=likeness.device)
    log_share = cosine - cosine.masked_fill(self_, -torch.inf).logsumexp(1, keepdim=True)
    same = (identity[:, None] == identity[None]) & ~self_
    return -(log_share * same).sum() / same.sum().clamp_min(1)


def caption_loss(image: Tensor, text: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """Symmetric contrastive loss of CLIP (Radford et al. 2021, arXiv:2103.00020), (n, d) each.

    Equal captions are not held against each other.
    """
    cosine = scale * image @ text.T
    n = len(image)
    twins = (ids[:, None] == ids[None]).all(-1) & ~torch.eye(n, dtype=torch.bool, device=ids.device)
    cosine = cosine.masked_fill(twins, -torch.inf)
    target = torch.arange(n, device=image.device)
    return (F.cross_entropy(cosine, target) + F.cross_entropy(cosine.T, target)) / 2
