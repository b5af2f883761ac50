"""Shapes of a base's parameters, for the size of a baseline's file: any base, SD 1.5, SDXL.

Numbers are counted on U-Nets without weights (PyTorch's meta device), built from the published
configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from minikin.models.base import Base
from minikin.models.loading.architectures import ARCHITECTURES

REAL = {"sd15": "SD 1.5", "sdxl": "SDXL"}  # for which comparisons give sizes


class Shapes(NamedTuple):
    """Shapes of the U-Net and widths of the words.

    unet   parameter -> its shape
    texts  width of each text encoder's word vectors
    """

    unet: Mapping[str, tuple[int, ...]]
    texts: tuple[int, ...]


def of(base: Base) -> Shapes:
    """The shapes of an open base."""
    widths = (m.get_input_embeddings().embedding_dim for m in base.text_encoders)
    return Shapes({n: tuple(p.shape) for n, p in base.denoiser.named_parameters()}, tuple(widths))


@lru_cache
def of_family(name: str) -> Shapes:
    """The shapes of a family's real models, by its name in `architectures`."""
    import torch
    from diffusers import UNet2DConditionModel

    a = ARCHITECTURES[name]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(a.unet)
    shapes = {n: tuple(p.shape) for n, p in unet.named_parameters()}
    return Shapes(shapes, tuple(t["hidden_size"] for t in a.texts))
