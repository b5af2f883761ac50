"""Tiny's own image and text encoder behind the common protocol; it knows the sticker world and nothing else.

Subjects have a vector space of their own, trained to find the same drawing again among hard negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from minikin.evaluation.encoders import EncoderCard, Images, Masks, digest
from minikin.models.loading.lock import opening
from minikin.tiny.encoders.dual_encoder import DualEncoder


class EmbeddedEncoder:
    """`minikin.tiny.encoders.dual_encoder.DualEncoder` with a card."""

    name = "tiny"
    has_text_encoder = True

    def __init__(self, model: DualEncoder) -> None:
        self.model = model

    @cached_property
    def card(self) -> EncoderCard:
        return EncoderCard(self.name, "minikin.tiny.encoders", "Apache-2.0", digest(self.model.net))

    def encode_images(self, images: Images) -> Tensor:
        return self.model.encode_images(images)

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        return self.model.encode_texts(captions)

    def encode_subjects(self, images: Images, masks: Masks | None = None) -> Tensor:
        return self.model.encode_subjects(images, masks)


@opening()
def open_embedded(path: Path | None = None, device: torch.device | str = "cpu") -> EmbeddedEncoder:
    """The embedded encoder, or one from a file. Raises AssetError when it is missing or damaged."""
    model = DualEncoder.open(path)
    model.net.to(device)
    return EmbeddedEncoder(model)
