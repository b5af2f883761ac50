"""The safety checker that was published with Stable Diffusion 1, as diffusers has it.

CLIP ViT-L/14 and 17 + 3 hidden concepts, all of them sexual (Rando et al. 2022, arXiv:2210.04610; violence and
gore pass). Its answer is yes or no: its thresholds are part of its weights. diffusers' pipelines blacken images
it objects to; here only the verdict is used.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from minikin.errors import NoNetwork
from minikin.generation.verdict import Verdict
from minikin.models.base import Base
from minikin.models.image_processor import CLIP_PREPROCESSING, processor
from minikin.models.loading import published
from minikin.models.loading.registry import models_folder

NAME = "safety-checker"


class SafetyChecker:
    """See `content_filter.ContentFilter`."""

    name = NAME

    def __init__(self, model: Any) -> None:
        self._model = model
        self._prepare = processor(CLIP_PREPROCESSING)

    @classmethod
    def of(cls, base: Base | None) -> Self:
        """Open the base's own checker, where its folder has one as safetensors; else the pulled one.

        Raises NoNetwork when there is none, BadModelFile when it is not whole.
        """
        places = [models_folder() / NAME, models_folder() / NAME / "safety_checker"]
        if base and base.folder:
            places.insert(0, base.folder / "safety_checker")
        for place in places:
            if (place / "config.json").is_file() and any(place.glob("*.safetensors")):
                return cls(_opened(place).to(base.device if base else "cpu"))
        raise NoNetwork(
            "The content filter was asked for, but its weights (0.6 GB) are not on this machine, neither in "
            f"the base's folder nor in {places[-1]}. Fetch them with `minikin models pull {NAME}`, or "
            "leave out --filter."
        )

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[Verdict]:
        pixels = self._prepare([i.convert("RGB") for i in images], return_tensors="pt")["pixel_values"]
        weights = next(self._model.parameters())
        blank = [np.zeros(1) for _ in images]  # the pixels it would blacken
        _, flags = self._model(clip_input=pixels.to(weights.device, weights.dtype), images=blank)
        return [Verdict(bool(flag), ("sexual",) if flag else ()) for flag in flags]


def _opened(folder: Path) -> Any:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    # it warns of black images; here it blackens none
    logging.getLogger("diffusers.pipelines.stable_diffusion.safety_checker").setLevel(logging.ERROR)
    what = f"The weights of the content filter in {folder}"
    return published.network(StableDiffusionSafetyChecker, str(folder), what)
