"""What teaching by another method was asked for, and what each was published with."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from minikin.recipes.base import MAX_SIDE, MaskKind, Recipe

BaselineMethod = Literal[
    "textual-inversion", "dreambooth", "dreambooth-prior", "dreambooth-lora", "custom-diffusion"
]

# What each method was published with for bases of SD's size, on one GPU: the training scripts of
# diffusers, which all use AdamW with betas 0.9 and 0.999, weight decay 0.01 and a constant rate. Rates
# that their scripts multiply by the batch are given as they come out (5e-4 x 4; 1e-5 x 4). Papers:
# Gal et al. 2022, arXiv:2208.01618; Ruiz et al. 2023, arXiv:2208.12242; Kumari et al. 2023,
# arXiv:2212.04488 (Custom Diffusion's augmentation by scale is left out: all methods see the same photos).
PUBLISHED_BASELINES: dict[str, dict[str, Any]] = {
    "textual-inversion": {"rate": 2e-3, "steps": 3000, "batch": 4},
    "dreambooth": {"rate": 5e-6, "steps": 400, "batch": 1},
    "dreambooth-prior": {"rate": 5e-6, "steps": 800, "batch": 1, "prior": 1.0, "class_pictures": 200},
    "dreambooth-lora": {"rate": 1e-4, "steps": 500, "batch": 1},
    "custom-diffusion": {
        "rate": 4e-5, "steps": 250, "batch": 4, "prior": 1.0, "class_pictures": 200, "flip": True,
    },
}  # fmt: skip
# tiny: as many photos a step as Minikin's own teaching sees; rate and steps by benchmarks/baselines.py
# (docs/judging.md, benchmarks/results-baselines-search.json)
TINY_BASELINES: dict[str, dict[str, Any]] = {
    "textual-inversion": {"rate": 2e-3, "steps": 200, "batch": 8, "flip": True},
    "dreambooth": {"rate": 3e-4, "steps": 200, "batch": 8, "flip": True},
    "dreambooth-prior": {"rate": 3e-4, "steps": 200, "batch": 8, "flip": True, "class_pictures": 32},
    "dreambooth-lora": {"rate": 3e-3, "steps": 400, "batch": 8, "flip": True},
    "custom-diffusion": {"rate": 1e-3, "steps": 200, "batch": 8, "class_pictures": 32},
}  # fmt: skip


class Baseline(Recipe):
    """Teach one concept by another method than Minikin's, for comparison."""

    method: BaselineMethod = Field(description="textual-inversion, dreambooth, dreambooth-lora, ...")
    name: str = Field(description="the concept's word in prompts, for example tom")
    category: str = Field(description="what kind of thing it is, for example cat")
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    word: str | None = Field(
        None, description="the rare word, one token, that stands for the thing; by method and base"
    )
    steps: int | None = Field(None, ge=1, le=100_000, description="number of steps; by method")
    batch: int | None = Field(None, ge=1, le=256, description="photos per step; by method")
    accumulation: int = Field(1, ge=1, description="pieces a batch is computed in, to save memory")
    rate: float | None = Field(None, gt=0, le=10, description="learning rate; by method")
    rank: int = Field(4, ge=1, le=1024, description="dreambooth-lora: rank of the LoRA")
    prior: float | None = Field(
        None, ge=0, le=100, description="weight of the loss on images of the category; by method"
    )
    class_pictures: int | None = Field(
        None, ge=1, le=10_000, description="how many of those the base paints; 200, on tiny 32"
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    mask: MaskKind = Field(
        "none", description="where the subject is: none as published, or attention or clipseg as in teach"
    )
    captions: bool = Field(True, description="use the photos' own captions where they have them")
    flip: bool | None = Field(None, description="also learn mirrored photos; by method")
    size: int | None = Field(None, ge=64, le=MAX_SIDE, description="side of the training images in pixels")
    seed: int = Field(0, ge=0, lt=2**32, description="equal seeds give equal files")
    save_minutes: float = Field(3.0, ge=0, description="minutes between checkpoints")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="of the frozen base: float32, float16 or bfloat16")

    def settled(self, tiny: bool) -> Baseline:
        """The same with every "by method" decided: what was published, or what suits tiny."""
        known: dict[str, Any] = {"prior": 0.0, "flip": False, "class_pictures": 32 if tiny else 200}
        known |= PUBLISHED_BASELINES[self.method] | (TINY_BASELINES[self.method] if tiny else {})
        asked = {k: v for k, v in self.model_dump().items() if v is not None}
        settled: Baseline = Baseline.make(**known | asked)
        return settled
