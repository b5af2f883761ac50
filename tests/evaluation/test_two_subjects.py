"""Two-subject test: true images score 1, swapped subjects 0, noise chance; the plain image gains 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.evaluation.encoders import EncoderCard
from minikin.evaluation.two_subjects import half_similarities, two_subject_scores

RED, BLUE = (230, 40, 30), (30, 50, 220)
PHOTOS = (torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 0, 1.0]]))
PROMPTS = [f"prompt {k // 2}" for k in range(40)]


class Colours:
    """Encodes the mean colour inside the mask."""

    name, has_text_encoder = "colours", False
    card = EncoderCard("colours", "tests", "Apache-2.0", "00ff" * 4)

    def encode_subjects(self, images: Sequence[Image.Image], masks: Any = None) -> Tensor:
        colours = [np.asarray(i, np.float32)[m].mean(0) for i, m in zip(images, masks, strict=True)]
        return torch.nn.functional.normalize(torch.tensor(np.stack(colours)), dim=1)

    encode_images = encode_subjects

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        raise NotImplementedError


def image(left: Any, right: Any) -> Image.Image:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8], pixels[:, 8:] = left, right
    return Image.fromarray(pixels)


GREY = [image((90, 90, 90), (90, 90, 90))] * 40


def test_true_images_score_one_and_swapped_none() -> None:
    right = two_subject_scores(Colours(), [image(RED, BLUE)] * 40, GREY, PHOTOS, PROMPTS)
    assert right.success.value == 1 and right.gain.value > 0.3 > 0 > right.bleed.value
    wrong = two_subject_scores(Colours(), [image(BLUE, RED)] * 40, GREY, PHOTOS, PROMPTS)
    assert wrong.success.value == 0 and wrong.bleed.value > 0.3


def test_noise_scores_chance_and_a_blend_bleeds() -> None:
    """For noise, each half is right in half of all images, both in a quarter."""
    rng = np.random.default_rng(0)
    noise = [image(*rng.integers(0, 255, (2, 3))) for _ in range(4000)]
    scores = two_subject_scores(Colours(), noise, GREY * 100, PHOTOS, PROMPTS * 100)
    assert scores.success.low < 0.25 < scores.success.high and scores.success.n == 4000
    mixed = tuple(np.add(RED, BLUE) // 2)
    blend = two_subject_scores(Colours(), [image(mixed, mixed)] * 40, GREY, PHOTOS, PROMPTS)
    assert blend.success.value == 0 and blend.bleed.value > 0.05


def test_plain_images_neither_gain_nor_bleed() -> None:
    same = two_subject_scores(Colours(), GREY, GREY, PHOTOS, PROMPTS)
    assert same.gain.value == same.bleed.value == same.success.value == 0
    assert half_similarities(Colours(), [image(RED, BLUE)], PHOTOS).shape == (1, 2, 2)


def test_different_numbers_of_images_are_refused() -> None:
    with pytest.raises(BadRecipe, match="40 images, 39 plain ones, 40 prompts: give as many of each"):
        two_subject_scores(Colours(), GREY, GREY[1:], PHOTOS, PROMPTS)
