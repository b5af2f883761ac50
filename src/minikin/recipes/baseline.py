"""Options of the command baseline, and the hyper-parameters each method was published with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from minikin.recipes.base import MAX_SIDE, MaskKind, Recipe

BaselineMethod = Literal[
    "textual-inversion", "dreambooth", "dreambooth-prior", "dreambooth-lora", "custom-diffusion"
]

# The hyper-parameters that each method was published with for bases of SD's size on one GPU: those of
# diffusers' scripts, which all use AdamW with betas 0.9 and 0.999, weight decay 0.01 and a constant
# learning rate. A learning rate that a script multiplies by the batch size is the product here (5e-4 x 4;
# 1e-5 x 4). Papers: Gal et al. 2022, arXiv:2208.01618; Ruiz et al. 2023, arXiv:2208.12242; Kumari et al.
# 2023, arXiv:2212.04488 (without Custom Diffusion's augmentation by scale: all methods see the same
# photos).
PUBLISHED_BASELINES: dict[str, dict[str, Any]] = {
    "textual-inversion": {"lr": 2e-3, "steps": 3000, "batch": 4},
    "dreambooth": {"lr": 5e-6, "steps": 400, "batch": 1},
    "dreambooth-prior": {"lr": 5e-6, "steps": 800, "batch": 1, "prior": 1.0, "class_images": 200},
    "dreambooth-lora": {"lr": 1e-4, "steps": 500, "batch": 1},
    "custom-diffusion": {
        "lr": 4e-5, "steps": 250, "batch": 4, "prior": 1.0, "class_images": 200, "flip": True,
    },
}  # fmt: skip
# On tiny: as many photos per step as `minikin teach` uses; lr and steps were searched by
# benchmarks/baselines.py (benchmarks/results-baselines-search.json).
TINY_BASELINES: dict[str, dict[str, Any]] = {
    "textual-inversion": {"lr": 2e-3, "steps": 200, "batch": 8, "flip": True},
    "dreambooth": {"lr": 3e-4, "steps": 200, "batch": 8, "flip": True},
    "dreambooth-prior": {"lr": 3e-4, "steps": 200, "batch": 8, "flip": True, "class_images": 32},
    "dreambooth-lora": {"lr": 3e-3, "steps": 400, "batch": 8, "flip": True},
    "custom-diffusion": {"lr": 1e-3, "steps": 200, "batch": 8, "class_images": 32},
}  # fmt: skip


class Baseline(Recipe):
    """Teach one concept by another method than Minikin's, for comparison."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "rate": "lr",
        "class_pictures": "class_images",  # word: the name of 0.1
    }

    method: BaselineMethod = Field(description="textual-inversion, dreambooth, dreambooth-lora, ...")
    name: str = Field(description="the concept's word in prompts, for example tom")
    category: str = Field(description="what kind of thing it is, for example cat")
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    word: str | None = Field(None, description="rare token that stands for the concept; by method and base")
    steps: int | None = Field(None, ge=1, le=100_000, description="number of steps; by method")
    batch: int | None = Field(None, ge=1, le=256, description="photos per step; by method")
    accumulation: int = Field(1, ge=1, description="gradient accumulation: parts of a batch, to save memory")
    lr: float | None = Field(None, gt=0, le=10, description="learning rate; by method")
    rank: int = Field(4, ge=1, le=1024, description="dreambooth-lora: rank of the LoRA")
    prior: float | None = Field(
        None, ge=0, le=100, description="prior preservation: weight of the loss on class images; by method"
    )
    class_images: int | None = Field(
        None, ge=1, le=10_000, description="number of class images that the base generates; 200, on tiny 32"
    )
    weight_decay: float = Field(0.01, ge=0, description="weight decay of AdamW")
    clip: float = Field(1.0, gt=0, description="gradient clipping: largest norm")
    mask: MaskKind = Field(
        "none", description="mask of the subject: none, as published; attention or clipseg as in teach"
    )
    captions: bool = Field(True, description="use the photos' own captions where they have them")
    flip: bool | None = Field(None, description="train on mirrored photos, too; by method")
    size: int | None = Field(None, ge=64, le=MAX_SIDE, description="side of the training images in pixels")
    seed: int = Field(0, ge=0, lt=2**32, description="random seed; equal seeds give equal files")
    save_minutes: float = Field(3.0, ge=0, description="minutes between checkpoints")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="dtype of the frozen base: float32, float16 or bfloat16")

    def resolved(self, tiny: bool) -> Baseline:
        """The recipe with every "by method" option set: as published, or as measured on tiny."""
        defaults: dict[str, Any] = {"prior": 0.0, "flip": False, "class_images": 32 if tiny else 200}
        defaults |= PUBLISHED_BASELINES[self.method] | (TINY_BASELINES[self.method] if tiny else {})
        options = {k: v for k, v in self.model_dump().items() if v is not None}
        recipe: Baseline = Baseline.make(**defaults | options)
        return recipe
