"""Tiny's own judge behind the common interface: for images of the sticker world and nothing else.

Its likeness is a space of its own, trained to find the same drawing again among lookalikes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from minikin.evaluation.encoders import Card, Masks, Pictures, digest
from minikin.tiny.encoders.dual_encoder import Judge


class Embedded:
    """`minikin.tiny.encoders.dual_encoder.Judge`, with a card."""

    name = "tiny"
    reads = True

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    @cached_property
    def card(self) -> Card:
        return Card(self.name, "minikin.tiny.encoders", "Apache-2.0", digest(self.judge.net))

    def images(self, pictures: Pictures) -> Tensor:
        return self.judge.image(pictures)

    def texts(self, captions: Sequence[str]) -> Tensor:
        return self.judge.text(captions)

    def likeness(self, pictures: Pictures, masks: Masks | None = None) -> Tensor:
        return self.judge.likeness(pictures, masks)


def open_embedded(path: Path | None = None, device: torch.device | str = "cpu") -> Embedded:
    """The embedded judge, or one from a file. Raises AssetError when it is missing or damaged."""
    judge = Judge.open(path)
    judge.net.to(device)
    return Embedded(judge)
