"""Image and text encoders that evaluation measures with, behind one protocol.

    encoder = open_encoder("tiny")     # evaluation/encoder_registry.py
    encoder.encode_images(images) @ encoder.encode_texts(captions).T   how well each caption fits each image
    encoder.encode_subjects(images, masks) @ encoder.encode_subjects(photos).T   is it the same thing

An encoder knows nothing of concepts, prompts or scores; those are in metrics.py and scores.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from minikin.errors import BadRecipe

Images = Sequence[Image.Image] | np.ndarray  # PIL, or (n, h, w, 3) uint8
Masks = Sequence[np.ndarray | None]  # (h, w) each: above 0.5 where the subject is; None for the whole image


@dataclass(frozen=True)
class EncoderCard:
    """Name, source, licence and weights of an encoder, as reports list them."""

    name: str
    source: str  # a repository, or the package itself
    licence: str
    digest: str  # of its weights, as `digest` computes it


class Encoder(Protocol):
    """Image encoder, with or without a text encoder. Vectors have length 1: (n, d) float32 on the CPU."""

    name: str
    has_text_encoder: bool

    @property
    def card(self) -> EncoderCard:
        """Hashes the weights on first use."""

    def encode_images(self, images: Images) -> Tensor:
        """Vectors of whole images."""

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """Vectors of captions, in the space of `encode_images`. Raises BadRecipe without a text encoder."""

    def encode_subjects(self, images: Images, masks: Masks | None = None) -> Tensor:
        """Vectors of the thing in each image; with masks, of what is inside them alone."""


def require_text_encoder(encoder: Encoder) -> None:
    """Raises BadRecipe for an encoder of images alone, which cannot measure prompt fidelity."""
    if not encoder.has_text_encoder:
        raise BadRecipe(
            f"The encoder {encoder.name} has no text encoder, so it cannot measure how well prompts are "
            "followed. Use --encoder clip-b32 or clip-l14, or tiny for the embedded base."
        )


def digest(network: nn.Module) -> str:
    """First 16 hexadecimal digits of SHA-256 over names, shapes and float32 values of all tensors.

    It does not depend on the file that the weights came from.
    """
    sha = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
