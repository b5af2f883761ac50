"""Two things in one image: the truth scores 1, swapped things 0, noise chance; the plain image gains 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.evaluation.encoders import Card
from minikin.evaluation.two_subjects import halves, together

RED, BLUE = (230, 40, 30), (30, 50, 220)
PHOTOS = (torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 0, 1.0]]))
PROMPTS = [f"prompt {k // 2}" for k in range(40)]


class Colours:
    """Sees the mean colour of what the mask leaves."""

    name, reads = "colours", False
    card = Card("colours", "tests", "Apache-2.0", "00ff" * 4)

    def likeness(self, pictures: Sequence[Image.Image], masks: Any = None) -> Tensor:
        seen = [np.asarray(p, np.float32)[m].mean(0) for p, m in zip(pictures, masks, strict=True)]
        return torch.nn.functional.normalize(torch.tensor(np.stack(seen)), dim=1)

    images = likeness

    def texts(self, captions: Sequence[str]) -> Tensor:
        raise NotImplementedError


def picture(left: Any, right: Any) -> Image.Image:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8], pixels[:, 8:] = left, right
    return Image.fromarray(pixels)


GREY = [picture((90, 90, 90), (90, 90, 90))] * 40


def test_the_truth_scores_one_and_the_swap_none() -> None:
    right = together(Colours(), [picture(RED, BLUE)] * 40, GREY, PHOTOS, PROMPTS)
    assert right.success.value == 1 and right.gain.value > 0.3 > 0 > right.bleed.value
    wrong = together(Colours(), [picture(BLUE, RED)] * 40, GREY, PHOTOS, PROMPTS)
    assert wrong.success.value == 0 and wrong.bleed.value > 0.3


def test_noise_scores_chance_and_a_blend_bleeds() -> None:
    """Either half rises more to its own in half of all images of noise: both in a quarter."""
    rng = np.random.default_rng(0)
    noise = [picture(*rng.integers(0, 255, (2, 3))) for _ in range(4000)]
    found = together(Colours(), noise, GREY * 100, PHOTOS, PROMPTS * 100)
    assert found.success.low < 0.25 < found.success.high and found.success.n == 4000
    mixed = tuple(np.add(RED, BLUE) // 2)
    blend = together(Colours(), [picture(mixed, mixed)] * 40, GREY, PHOTOS, PROMPTS)
    assert blend.success.value == 0 and blend.bleed.value > 0.05


def test_the_plain_picture_neither_gains_nor_bleeds() -> None:
    same = together(Colours(), GREY, GREY, PHOTOS, PROMPTS)
    assert same.gain.value == same.bleed.value == same.success.value == 0
    assert halves(Colours(), [picture(RED, BLUE)], PHOTOS).shape == (1, 2, 2)


def test_counts_that_differ() -> None:
    with pytest.raises(BadRecipe, match="40 images, 39 plain ones, 40 prompts: give as many of each"):
        together(Colours(), GREY, GREY[1:], PHOTOS, PROMPTS)
