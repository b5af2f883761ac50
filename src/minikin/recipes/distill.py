"""Options of the command distill, and the hyper-parameters each method was published with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from minikin.recipes.base import MAX_SIDE, MAX_STEPS, N_TRAIN, Recipe

Method = Literal["lcm", "lcm-lora", "turbo", "tdm"]

# The hyper-parameters that each method was published with: arXiv:2310.04378 (lcm), 2311.05556 (lcm-lora),
# 2311.17042 (turbo), 2503.06674 (tdm). guidance is w + 1 of LCM's w. Turbo was published with full weights
# and tdm with LoRAs (its code has a learning rate of 4e-6); the learning rates of their LoRAs are ours.
PUBLISHED: dict[str, dict[str, Any]] = {
    "lcm": {"student": "full", "lr": 1e-6, "guidance": "3-15", "batch": 12, "steps": 4000,
            "target_ema": 0.95},
    "lcm-lora": {"student": "lora", "lr": 1e-4, "guidance": "8.5", "batch": 12, "steps": 3000},
    "turbo": {"student": "full", "lr": 1e-5, "aux_lr": 1e-4, "guidance": "1", "batch": 128, "steps": 4000},
    "tdm": {"student": "lora", "lr": 4e-5, "aux_lr": 2e-5, "guidance": "4.5", "batch": 32, "steps": 2000},
}  # fmt: skip
# tiny is narrow and learns fast: higher learning rates with decay, a guidance of 4, EMA
TINY: dict[str, dict[str, Any]] = {
    "lcm": {
        "student": "lora", "lr": 2e-4, "guidance": "1-7", "batch": 32, "decay": 0.5, "ema": 0.99,
        "steps": 3000,
    },
    "lcm-lora": {"lr": 2e-4, "guidance": "4", "batch": 32, "decay": 0.5, "ema": 0.99},
    "turbo": {
        "student": "lora", "lr": 2e-4, "aux_lr": 5e-4, "guidance": "4", "batch": 32, "decay": 0.5,
        "ema": 0.99, "steps": 3000,
    },
    "tdm": {"lr": 2e-4, "aux_lr": 2e-4, "fake": "full", "guidance": "4", "decay": 0.5, "ema": 0.99},
}  # fmt: skip
STUDENT_TIMES = {"demo": (999, 899, 799, 699)}  # of the demonstration by ADD's authors


class Distill(Recipe):
    """Distil a base into a model that generates images in one to four steps."""

    RENAMED: ClassVar[Mapping[str, str]] = {"rate": "lr", "side_rate": "aux_lr", "ida": "fake_ema"}

    method: Method = Field(description="lcm, lcm-lora, turbo (adversarial) or tdm (distribution matching)")
    data: str = Field(
        description="folder of captioned images, .tar files, a text file of captions, or scenes:small"
    )
    concepts: str | None = Field(
        None,
        description="folder of concepts; captions name them as <name>, and the student learns to apply them",
    )
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    student: Literal["lora", "full"] | None = Field(None, description="train a LoRA or all weights; by method")
    rank: int = Field(64, ge=1, le=1024, description="rank of the LoRA")
    alpha: float | None = Field(None, gt=0, description="alpha of the LoRA; the rank by default")
    start: str | None = Field(
        None, description="initial LoRA of the student: a preset's adapter (lcm-lora) or a file; none"
    )
    steps: int | None = Field(None, ge=1, description="number of training steps; by method")
    minutes: float | None = Field(None, gt=0, description="training time in minutes in place of steps")
    batch: int | None = Field(
        None, ge=1, le=65536, description="examples per step, over all processes; by method"
    )
    accumulation: int = Field(1, ge=1, description="gradient accumulation: parts of a batch, to save memory")
    lr: float | None = Field(None, gt=0, le=1, description="learning rate of the student; by method")
    aux_lr: float | None = Field(
        None,
        gt=0,
        le=1,
        description="auxiliary learning rate, of the fake score or the discriminator; by method",
    )
    warmup: int = Field(0, ge=0, description="steps of learning-rate warmup")
    decay: float | None = Field(
        None, ge=0, le=1, description="last share of the training in which learning rates decay; 0, on tiny 0.5"
    )
    clip: float = Field(1.0, gt=0, description="gradient clipping of the student: largest norm")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    ema: float | None = Field(
        None, ge=0, lt=1, description="EMA decay of the result's weights; none, on tiny 0.99"
    )
    guidance: str | None = Field(
        None, description="guidance scale of the teacher, 8.5, or a range, 3-15; by method"
    )
    loss: Literal["huber", "l2"] = Field("huber", description="distance: pseudo-Huber or squared")
    huber: float = Field(0.001, gt=0, description="c of the pseudo-Huber distance")
    skip: int = Field(20, ge=1, le=500, description="lcm: timesteps that one solver step of the teacher skips")
    target_ema: float | None = Field(None, ge=0, lt=1, description="lcm: EMA decay of the target network; 0.95")
    student_steps: int | None = Field(
        None, ge=1, le=16, description="turbo, tdm: sampling steps of the student; 4, or as many as times lists"
    )
    times: str = Field(
        "trailing", description="turbo, tdm: the student's timesteps: trailing (999, 749, ...), demo or a list"
    )
    fake: Literal["lora", "full"] | None = Field(
        None, description="tdm: train a LoRA or all weights of the fake score"
    )
    snr: float = Field(5.0, gt=0, description="tdm: bound of the fake score's weight min(SNR, bound)")
    fake_ema: float = Field(
        1.0,
        gt=0,
        le=1,
        description="tdm: decay per step with which the fake score follows the student; 1 is off",
    )
    gan: float = Field(
        0.0, ge=0, description="tdm: weight of the student's adversarial loss; 0 is off, 0.01 usual"
    )
    heads: float = Field(0.03, ge=0, description="tdm: weight of the discriminator's loss")
    features: str = Field(
        "teacher", description="turbo: features of the discriminator: teacher (latents) or dinov2 (pixels)"
    )
    distillation: float = Field(2.5, ge=0, description="turbo: weight of the distillation loss (lambda)")
    weighting: Literal["exponential", "sds", "nfsd"] = Field(
        "exponential", description="turbo: weight of the distillation loss over noise levels"
    )
    negative: str = Field("blurry, low quality, ugly", description="turbo with nfsd: negative prompt")
    r1: float = Field(1e-5, ge=0, description="turbo: weight of the R1 gradient penalty")
    size: int | None = Field(None, ge=16, le=MAX_SIDE, description="side of the images in pixels")
    count: int | None = Field(None, ge=1, description="largest number of examples; 8192 for scenes")
    teacher_steps: int = Field(
        25, ge=1, le=MAX_STEPS, description="sampling steps of images that the teacher generates for captions"
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="random seed; equal seeds give equal results on one machine"
    )
    autocast: bool | None = Field(None, description="compute in bfloat16 over float32 weights; on CUDA")
    half: bool = Field(True, description="store the result in float16")
    save_minutes: float = Field(3.0, ge=0, description="minutes between checkpoints")
    sample_minutes: float = Field(10.0, gt=0, description="minutes between sample images")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="dtype of the frozen teacher: float32, float16 or bfloat16")

    @model_validator(mode="after")
    def _check_options(self) -> Distill:
        _ = self.scales, self.student_times(N_TRAIN)
        if N_TRAIN % self.skip or N_TRAIN // self.skip < 4:
            raise ValueError(f"skip must divide {N_TRAIN} into at least 4 equal steps, as 20 and 50 do")
        if self.method == "tdm" and self.times != "trailing":
            raise ValueError("times of a tdm student must be trailing: DDIM paints with them")
        if self.method == "lcm-lora" and self.student == "full":
            raise ValueError("method lcm-lora trains student lora; use method lcm for full")
        return self

    @property
    def scales(self) -> tuple[float, float]:
        """Lowest and highest classifier-free guidance scale of the teacher (1 is no guidance)."""
        parts = (self.guidance or "1").split("-")
        try:
            low, high = float(parts[0]), float(parts[-1])
        except ValueError:
            low, high = 0.0, 0.0
        if not 1 <= low <= high <= 50 or len(parts) > 2:
            raise ValueError(f"guidance must be a scale of 1 to 50 or a range like 3-15, not '{self.guidance}'")
        return low, high

    def student_times(self, n_train: int) -> tuple[int, ...]:
        """The timesteps at which a turbo or tdm student is evaluated, in descending order."""
        if self.times == "trailing":
            k = self.student_steps or 4
            return tuple(round(n_train - i * n_train / k) - 1 for i in range(k))
        try:
            listed = STUDENT_TIMES.get(self.times) or tuple(int(t) for t in self.times.split(","))
        except ValueError:
            raise ValueError(
                f"times must be trailing, demo or numbers like 999,749,499,249, not '{self.times}'"
            ) from None
        k = self.student_steps or len(listed)
        if k > len(listed) or (k < len(listed) and self.times not in STUDENT_TIMES):
            raise ValueError(f"times lists {len(listed)} timesteps, but student_steps is {k}; leave one out")
        times = listed[:k]
        if list(times) != sorted(set(times), reverse=True) or times[-1] < 1 or times[0] >= n_train:
            raise ValueError(f"times must fall from at most {n_train - 1} to at least 1, but they are {times}")
        return times

    def resolved(self, tiny: bool) -> Distill:
        """The recipe with every "by method" option set: as published, or as measured on tiny."""
        defaults = {"decay": 0.0, "ema": 0.0, "target_ema": 0.0, "fake": "lora", "aux_lr": 1e-4}
        defaults |= PUBLISHED[self.method] | (TINY[self.method] if tiny else {})
        if self.steps or self.minutes:
            defaults.pop("steps", None)
        options = {k: v for k, v in self.model_dump().items() if v is not None}
        recipe: Distill = Distill.make(**defaults | options)
        return recipe
