"""Augmented batches and losses for the encoders: scenes with labels and captions, and hard negatives.

Generated images are softer and noisier than drawn ones, so every image is shifted, blurred, tinted and
made noisy at random (`corrupt`). The encoders then work on the output of any decoder without having
been trained on one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from tools.tiny_training.hard_negatives import BLOCK, HardNegatives
from torch import Tensor, nn

from minikin.tiny.captions import caption
from minikin.tiny.encoders.dual_encoder import Tokens
from minikin.tiny.encoders.fields import SLOTS, UNKNOWN, Field, places, truth
from minikin.tiny.vocabulary import WorldSpec
from minikin.tiny.world import Rng, Scene

SHIFT = 5  # px, largest shift
SCENES, MASKED = 0.6, 0.4  # shares: scenes of a batch; hard negatives without their background
# objects take longest to learn and matter most; other fields weigh 1
FIELD_WEIGHTS = {"first_object": 3.0, "second_object": 1.5, "third_object": 0.5}
POSITION_FIELDS = ("object", "colour", "pattern")  # predicted from the feature map at each thing's position
GREY = 128  # in place of a masked background


@dataclass(frozen=True)
class Batch:
    """A batch of n examples: scenes first, hard negatives behind them.

    images    (n, 3, 128, 128) uint8
    labels    by field (n,) or (n, answers), and "places" (n, slots)
    ids       (scenes, context) tokens of the captions
    identity  (n - scenes,) of the hard negatives
    scenes    number of scenes
    """

    images: Tensor
    labels: Mapping[str, Tensor]
    ids: Tensor
    identity: Tensor
    scenes: int


class Rows(Protocol):
    """Images by index: `shards.Shards`, or an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray) -> np.ndarray: ...


class EncoderBatches:
    """Draws random batches from images of scenes and from hard negatives.

    images  row i shows scene i: (128, 128, 3) uint8
    tokens  tokenizer of the captions; None for batches without captions
    """

    def __init__(
        self,
        spec: WorldSpec,
        images: Rows,
        scenes: Sequence[Scene],
        hard_negatives: HardNegatives,
        tokens: Tokens | None = None,
    ) -> None:
        self.images, self.scenes, self.hard_negatives, self.tokens = images, scenes, hard_negatives, tokens
        rows = [{"places": places(s, spec), **truth(s, spec)} for s in scenes]
        self.labels = {name: np.stack([r[name] for r in rows]) for name in rows[0]}

    def batch(self, rng: Rng, size: int) -> Batch:
        """About `size` examples: mostly scenes, and whole blocks of hard negatives."""
        n = round(size * SCENES)
        scene_rows = rng.integers(len(self.scenes), size=n)
        blocks = rng.integers(len(self.hard_negatives.identity) // BLOCK, size=max(1, (size - n) // BLOCK))
        rows = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        is_masked = self.hard_negatives.needs_mask[rows] | (rng.random(len(rows)) < MASKED)
        images = np.concatenate([self.images[scene_rows], self._hard_negative_images(rows, is_masked)])
        captions = [caption(self.scenes[i], rng).text for i in scene_rows] if self.tokens else []
        return Batch(
            torch.from_numpy(shifted(images, rng)).permute(0, 3, 1, 2),
            {k: torch.from_numpy(self._answers(k, scene_rows, rows, is_masked)) for k in self.labels},
            self.tokens(captions) if self.tokens else torch.zeros(0, 0, dtype=torch.long),
            torch.from_numpy(self.hard_negatives.identity[rows]),
            n,
        )

    def _hard_negative_images(self, rows: np.ndarray, is_masked: np.ndarray) -> np.ndarray:
        images = np.asarray(self.hard_negatives.images[rows])
        inside = self.hard_negatives.mask(rows)[..., None] | ~is_masked[:, None, None, None]
        return np.where(inside, images, np.uint8(GREY))

    def _answers(
        self, field: str, scene_rows: np.ndarray, negative_rows: np.ndarray, is_masked: np.ndarray
    ) -> np.ndarray:
        """Labels of scenes and hard negatives; an image without its background has no labels."""
        labels = self.hard_negatives.labels[field][negative_rows].copy()
        labels[is_masked] = UNKNOWN
        return np.concatenate([self.labels[field][scene_rows], labels])


def shifted(images: np.ndarray, rng: Rng) -> np.ndarray:
    """Each image (n, h, w, 3) shifted by up to SHIFT pixels at random; edges are mirrored."""
    n, h, w, _ = images.shape
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="reflect")
    places = rng.integers(2 * SHIFT + 1, size=(n, 2))
    return np.stack([p[y : y + h, x : x + w] for p, (y, x) in zip(padded, places, strict=True)])


def corrupt(images: Tensor, rng: Rng) -> Tensor:
    """Images (n, 3, h, w) uint8 to float in about [-1, 1], randomly blurred, tinted and noisy.

    Each kind of noise goes to a share of the images; for all images it would cost a third of a step.
    """
    n, c, h, w = images.shape

    def some(share: float) -> Tensor:
        return torch.from_numpy(np.flatnonzero(rng.random(n) < share))

    def amounts(low: float, high: float, count: int, channels: int = 1) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (count, channels, 1, 1)).astype(np.float32))

    tint = amounts(0.92, 1.08, n, c)
    x = images.contiguous().float().mul_(tint / 127.5).add_(amounts(-0.08, 0.08, n, c) - tint)
    for factor, share, strongest in ((2, 0.5, 1.0), (4, 0.25, 0.6)):
        chosen = some(share)
        soft = _enlarged(F.avg_pool2d(x[chosen], factor), (h, w))
        x[chosen] = x[chosen].lerp(soft, amounts(0, strongest, len(chosen)))
    chosen = some(0.3)
    grain = np.frombuffer(rng.bytes(len(chosen) * c * h * w), np.uint8).reshape(len(chosen), c, h, w)
    x[chosen] += amounts(0, 0.2 / 255, len(chosen)) * torch.from_numpy(grain.copy()).float().sub_(127.5)
    chosen = some(0.3)
    spots = rng.normal(size=(len(chosen), c, h // 8, w // 8)).astype(np.float32)
    x[chosen] += amounts(0, 0.1, len(chosen)) * _enlarged(torch.from_numpy(spots), (h, w))
    return x


def _enlarged(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def answer_loss(scores: Tensor, fields: Sequence[Field], labels: Mapping[str, Tensor]) -> Tensor:
    """Weighted mean over the fields of the cross-entropy, where there is a label."""
    parts, total = [], 0.0
    for field, part in zip(
        fields, torch.split(scores.float(), [len(f.answers) for f in fields], -1), strict=True
    ):
        label = labels[field.name]
        has_answer = label >= 0
        if field.is_multiple:
            yes = label.clamp_min(0).float()
            each = F.binary_cross_entropy_with_logits(part, yes, reduction="none") * len(field.answers)
        else:
            each = F.cross_entropy(part, label.clamp_min(0), reduction="none")
        weight = FIELD_WEIGHTS.get(field.name, 1.0)
        parts.append(weight * (each * has_answer).sum() / has_answer.sum().clamp_min(1))
        total += weight
    return torch.stack(parts).sum() / total


def position_head(channels: int, fields: Sequence[Field]) -> nn.Linear:
    """Linear head of `position_loss`: the fields of a thing from the feature map at its position."""
    return nn.Linear(channels, sum(len(f.answers) for f in _pointed(fields, SLOTS[0])))


def position_loss(
    feature_map: Tensor, head: nn.Linear, fields: Sequence[Field], labels: Mapping[str, Tensor]
) -> Tensor:
    """Cross-entropy of the fields of each thing, from the feature map (n, channels, 8, 8) at its position.

    The labels of whole images teach slowly how a thing looks, because the encoder has to find it first.
    The world knows the positions, so this loss uses them.
    """
    parts = []
    for slot, place in zip(SLOTS, labels["places"].unbind(1), strict=False):
        at_position = feature_map.flatten(2)[
            torch.arange(len(feature_map)), :, place.clamp_min(0)
        ]  # (n, channels)
        questions = _pointed(fields, slot)
        scores = head(at_position.float())
        for field, part in zip(
            questions, torch.split(scores, [len(f.answers) for f in questions], -1), strict=True
        ):
            label = labels[field.name]
            has_answer = (label >= 0) & (place >= 0)
            each = F.cross_entropy(part, label.clamp_min(0), reduction="none")
            parts.append((each * has_answer).sum() / has_answer.sum().clamp_min(1))
    return torch.stack(parts).mean()


def _pointed(fields: Sequence[Field], slot: str) -> list[Field]:
    return [f for f in fields if f.name in {f"{slot}_{question}" for question in POSITION_FIELDS}]


def identity_loss(vectors: Tensor, identity: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss of unit vectors (n, d) (Khosla et al. 2020, arXiv:2004.11362, L_out).

    Images of equal identity (n,) are positives, all others in the batch negatives.
    """
    cosine = vectors @ vectors.T / temperature  # (n, n)
    is_self = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    log_share = cosine - cosine.masked_fill(is_self, -torch.inf).logsumexp(1, keepdim=True)
    same = (identity[:, None] == identity[None]) & ~is_self
    return -(log_share * same).sum() / same.sum().clamp_min(1)


def caption_loss(image: Tensor, text: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """Symmetric contrastive loss of CLIP (Radford et al. 2021, arXiv:2103.00020), (n, d) each.

    Images with equal captions are not negatives of each other.
    """
    cosine = scale * image @ text.T
    n = len(image)
    equal_captions = (ids[:, None] == ids[None]).all(-1) & ~torch.eye(n, dtype=torch.bool, device=ids.device)
    cosine = cosine.masked_fill(equal_captions, -torch.inf)
    target = torch.arange(n, device=image.device)
    return (F.cross_entropy(cosine, target) + F.cross_entropy(cosine.T, target)) / 2
