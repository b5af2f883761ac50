"""DreamBooth protocol: the dataset's own classes and prompts, stored images, metrics as defined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import dreambench
from PIL import Image

from minikin import Studio
from minikin.errors import BadRecipe
from minikin.models.base import Base

PROMPTS = """Classes

subject_name,class
backpack,backpack
dog,dog
grey_sloth_plushie,stuffed animal

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in a firefighter outfit'.format(unique_token, class_token)
]
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    for k, name in enumerate(("dog", "grey_sloth_plushie")):
        (folder / name).mkdir(parents=True)
        pixels = np.random.default_rng(k).integers(0, 255, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / "00.jpg")
    (folder / "prompts_and_classes.txt").write_text(PROMPTS)
    return folder


def test_subjects_have_the_classes_and_prompts_of_the_dataset(dataset: Path) -> None:
    dog, sloth = dreambench.subjects(dataset)
    assert dog == dreambench.Subject("dog", "dog", ("a {} in a firefighter outfit",))
    assert sloth.category == "stuffed animal" and sloth.prompts == ("a {} in the jungle", "a red {}")
    assert dreambench.subjects(dataset, ["dog"]) == [dog]
    with pytest.raises(BadRecipe, match="holds photos of none of backpack"):
        dreambench.subjects(dataset, ["backpack"])
    with pytest.raises(BadRecipe, match="not a copy of google/dreambooth's dataset"):
        dreambench.subjects(dataset / "dog")


def test_concepts_and_images_are_stored(bases: dict[str, Base], dataset: Path, tmp_path: Path) -> None:
    (sloth,) = dreambench.subjects(dataset, ["grey_sloth_plushie"])
    studio, recipe = Studio(bases["sd15"]), {"steps": 1, "guidance": 1}
    teaching = {"mode": "value", "steps": 1, "batch": 1, "preview": False, "mask": "none"}
    args: Any = (studio, sloth, dataset, tmp_path / "out", 2, teaching, recipe)
    images, prompts = dreambench.generate(*args)
    assert prompts == ["a stuffed animal in the jungle"] * 2 + ["a red stuffed animal"] * 2
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.*")}
    assert len(files) == 5
    again, _ = dreambench.generate(*args)
    assert all(np.array_equal(a, b) for a, b in zip(images, again, strict=True))
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.*")}


class Flat:
    """Encodes how bright an image is, and the captions "bright" and "dark"."""

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        level = torch.tensor([np.asarray(p).mean() / 255 for p in images]).float()
        return torch.nn.functional.normalize(torch.stack([level, 1 - level], 1), dim=1)

    def encode_texts(self, captions: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0] if "bright" in c else [0.0, 1.0] for c in captions])


def test_numbers_and_table(tmp_path: Path) -> None:
    white, black = (Image.new("RGB", (64, 64), c) for c in ("white", "black"))
    white.save(tmp_path / "photo.png")
    encoders: Any = {"dino-s16": Flat(), "clip-b32": Flat()}
    best = dreambench.scores(encoders, [white] * 2, ["bright"] * 2, tmp_path)
    worst = dreambench.scores(encoders, [black] * 2, ["bright"] * 2, tmp_path)
    assert [m.value for m in best.values()] == pytest.approx([1, 1, 1])
    assert [m.value for m in worst.values()] == pytest.approx([0, 0, 0])
    lines = dreambench.table([best, worst]).splitlines()
    assert lines[2] == "| Minikin, 2 subjects | 0.500 | 0.500 | 0.500 |"
    assert "| DreamBooth (SD) | 0.668 | 0.803 | 0.305 |" in lines


def test_images_of_other_settings_are_refused(tmp_path: Path) -> None:
    dreambench.same_settings(tmp_path / "out", {"base": "a", "steps": 50})
    dreambench.same_settings(tmp_path / "out", {"base": "a", "steps": 50})
    with pytest.raises(BadRecipe, match="another run .steps differ.. Choose another --out"):
        dreambench.same_settings(tmp_path / "out", {"base": "a", "steps": 4})
