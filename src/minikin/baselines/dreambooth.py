"""DreamBooth: the whole U-Net, for a rare word before the category (Ruiz et al. 2023, arXiv:2208.12242).

Trained: every weight of the U-Net; the text encoder stays (the paper trains it on demand).
Prompts: "a photo of a sks cat". Prior preservation adds the loss on images of "a photo of a cat" that
the base itself has generated, so that not every cat becomes this one.
File: a U-Net as large as the base's, 3.4 GB for SD 1.5, for `UNet2DConditionModel.from_pretrained`.
"""

from __future__ import annotations

from pathlib import Path

from minikin.baselines import embedding
from minikin.baselines.method import Method, TrainedTensors
from minikin.baselines.result import BaselineResult
from minikin.baselines.sizes import Shapes
from minikin.baselines.student import Student, partial_copy
from minikin.errors import BadConceptFile
from minikin.files import atomic_folder, atomic_write
from minikin.models.base import Base
from minikin.recipes import Baseline

FOLDER, FILE = "unet", "diffusion_pytorch_model.safetensors"


class DreamBooth(Method):
    def student(self, base: Base, recipe: Baseline, word: str) -> Student:
        return Student(base, partial_copy(base.denoiser, lambda name: True))

    def tensors(self, student: Student) -> TrainedTensors:
        return TrainedTensors(weights={n: p.detach().cpu().clone() for n, p in student.unet.named_parameters()})

    def write(self, base: Base, result: BaselineResult, folder: Path) -> list[Path]:
        from safetensors.torch import save

        with atomic_folder(folder / FOLDER) as fresh:
            base.denoiser.save_config(str(fresh))
            atomic_write(fresh / FILE, save(dict(result.weights), {"format": "pt"}))
        return [folder / FOLDER / FILE, folder / FOLDER / "config.json"]

    def read(self, base: Base, folder: Path, name: str) -> TrainedTensors:
        path = folder / FOLDER / FILE
        weights = dict(embedding.tensors(path))
        shapes = {n: p.shape for n, p in base.denoiser.named_parameters()}
        if {n: t.shape for n, t in weights.items()} != shapes:
            raise BadConceptFile(f"{path} is not a U-Net of {base.name}. Open the base it was made for.")
        return TrainedTensors(weights=weights)

    def count(self, shapes: Shapes, rank: int) -> int:
        from math import prod

        return sum(prod(s) for s in shapes.unet.values())
