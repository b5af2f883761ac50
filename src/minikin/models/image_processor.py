"""What published image encoders see: the size, crop, mean and deviation of pixels they were trained on.

Fixed by name, not read from a file beside the weights, so that a number means the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

SIDE = 224  # px
BICUBIC = int(Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Pixels:
    """How a tower wants its images."""

    resize: int  # px of the shorter side
    mean: tuple[float, float, float]  # of pixels in [0, 1]
    deviation: tuple[float, float, float]


CLIP_PIXELS = Pixels(224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_PIXELS = Pixels(256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def processor(pixels: Pixels) -> Any:
    """Makes images of PIL into what a tower of these pixels sees."""
    from transformers import CLIPImageProcessorPil  # the plain one asks for torchvision

    return CLIPImageProcessorPil(
        size={"shortest_edge": pixels.resize}, resample=BICUBIC, crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(pixels.mean), image_std=list(pixels.deviation),
    )  # fmt: skip
