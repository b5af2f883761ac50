"""Preprocessing of published image encoders: resize, crop, mean and standard deviation.

The values are constants and not read from a file beside the weights, so that scores are equal everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

SIDE = 224  # pixels after the center crop
BICUBIC = int(Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of an image encoder."""

    resize: int  # pixels of the shorter side
    mean: tuple[float, float, float]  # of pixels in [0, 1]
    deviation: tuple[float, float, float]


CLIP_PREPROCESSING = Preprocessing(
    224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)
IMAGENET_PREPROCESSING = Preprocessing(256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def processor(preprocessing: Preprocessing) -> Any:
    """A transformers image processor with this preprocessing, for PIL images."""
    from transformers import CLIPImageProcessorPil  # CLIPImageProcessor needs torchvision

    return CLIPImageProcessorPil(
        size={"shortest_edge": preprocessing.resize},
        resample=BICUBIC,
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(preprocessing.mean),
        image_std=list(preprocessing.deviation),
    )
