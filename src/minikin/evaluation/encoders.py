"""Judges: networks that say what an image shows, all behind one small interface.

    judge = open_judge("tiny")
    judge.images(images) @ judge.texts(captions).T   how well each caption fits each image
    judge.likeness(images, masks) @ judge.likeness(photos).T   whether the same thing is in them

A judge knows nothing of concepts, prompts or scores; those are in metrics.py and scores.py. Opening
one never downloads.
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

from minikin.errors import UnknownName

Pictures = Sequence[Image.Image] | np.ndarray  # PIL, or (n, h, w, 3) uint8
Masks = Sequence[np.ndarray | None]  # (h, w) each: above 0.5 where the thing is; None for all of it


@dataclass(frozen=True)
class Card:
    """Where a judge comes from: what a report says of it."""

    name: str
    source: str  # a repository, or the package itself
    licence: str
    digest: str  # of its weights, as `digest` makes it


class Judge(Protocol):
    """What every judge can do. Vectors are unit ones, (n, d) float32 on the CPU."""

    name: str
    reads: bool  # whether it has `texts`

    @property
    def card(self) -> Card:
        """Where it comes from. Hashes the weights when asked for the first time."""

    def images(self, pictures: Pictures) -> Tensor:
        """What whole images show."""

    def texts(self, captions: Sequence[str]) -> Tensor:
        """What captions say, in the space of `images`. Raises BadRecipe when it does not read."""

    def likeness(self, pictures: Pictures, masks: Masks | None = None) -> Tensor:
        """Which thing is in the images; with masks, nothing outside them is seen."""


def names() -> list[str]:
    """The judges there are, the embedded one first."""
    from minikin.evaluation.image_encoders import TOWERS

    return ["tiny", *TOWERS]


def open_judge(name: str = "tiny", device: str | None = None) -> Judge:
    """Open a judge by name.

    device  cuda, mps, xpu or cpu; the best there is by default
    Raises UnknownName; NoNetwork when its weights are not on this machine; BadModelFile or AssetError
    when they are damaged or another model's.
    """
    from minikin.evaluation import image_encoders, tiny_encoders
    from minikin.models import device as runtime

    where, _ = runtime.resolve(device, "float32")
    if name == "tiny":
        return tiny_encoders.open_embedded(device=where)
    if name not in image_encoders.TOWERS:
        raise UnknownName("judge", name, names())
    return image_encoders.open_tower(name, where)


def digest(network: nn.Module) -> str:
    """SHA-256 over names, shapes and float32 values of all tensors, whatever file they came from.

    The first 16 hexadecimal digits.
    """
    sha = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
