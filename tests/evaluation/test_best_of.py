"""Best-of-n: drafts are ranked by standard scores of text alignment and subject fidelity."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from minikin.evaluation.best_of import Chooser, rank
from minikin.generation.image import GeneratedImage


class Redness:
    """Encodes the mean colour of images; every caption is red."""

    name, has_text_encoder = "red", True

    def encode_images(self, images: Any) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.asarray(i).mean((0, 1)) / 255 for i in images])).float()

    encode_subjects = encode_images

    def encode_texts(self, captions: Any) -> torch.Tensor:
        return torch.tensor([[1.0, 0, 0]] * len(captions))


def drafts(*reds: int) -> list[GeneratedImage]:
    return [GeneratedImage(Image.new("RGB", (8, 8), (red, 0, 0)), 10 + k) for k, red in enumerate(reds)]


def test_best_drafts_come_first_with_their_scores() -> None:
    chooser = Chooser(Redness(), "a car", None)  # type: ignore[arg-type]
    best, record = chooser.best(drafts(100, 250, 0, 200), 2)
    assert [draft.seed for draft in best] == [11, 13]
    assert record[11] == {"rank": 1, "of": 4, "judge": "red", "alignment": round(250 / 255, 4)}  # word: record
    assert [record[10 + k]["rank"] for k in range(4)] == [3, 1, 4, 2]


def test_both_scores_have_equal_weight() -> None:
    assert rank([0.1, 0.2, 0.3]) == [2, 1, 0]
    assert rank([0.10, 0.11, 0.12], [0.9, 0.5, 0.1]) == [0, 1, 2]  # equal sums keep the order of the seeds
    assert rank([0.10, 0.11, 0.12], [0.1, 0.9, 0.1])[0] == 1
    assert rank([0.5, 0.5], [0.1, 0.2]) == [1, 0]  # a score that is the same for all has no weight
