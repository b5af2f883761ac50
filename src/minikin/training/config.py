"""Settings of a training run, its state, and the context of one step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from minikin.recipes import Recipe


class TrainingConfig(Recipe):
    """Settings of one training run. It ends after `steps` or `minutes`, whichever comes first."""

    steps: int | None = Field(None, ge=1, description="budget in steps; exactly repeatable")
    minutes: float | None = Field(None, gt=0, description="budget in minutes, over all interruptions")
    batch: int = Field(128, ge=1, description="examples per step; halved when memory is short")
    accumulation: int = Field(1, ge=1, description="micro-batches per step and process, to save memory")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: for wide layers; see training.muon")
    fused: bool = Field(True, description="PyTorch's fused AdamW; rounds otherwise than the plain one")
    lr: float = Field(1e-3, gt=0, description="learning rate")
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(100, ge=0, description="steps over which the learning rate rises")
    decay: float = Field(0.5, ge=0, le=1, description="last share of the budget, in which the rate falls")
    floor: float = Field(0.02, ge=0, le=1, description="the final learning rate, as a share of `lr`")
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the weights' moving average; 0 for none")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient; None for any")
    loss_scale: float = Field(1.0, gt=0, description="factor of the loss in the backward pass, for float16")
    bf16: bool = Field(True, description="compute in bfloat16 over float32 weights, where that is quick")
    compile: bool = Field(False, description="torch.compile the model")
    seed: int = Field(0, ge=0)
    log_steps: int = Field(50, ge=1, description="steps between lines of the metrics log")
    progress_seconds: float = Field(0.2, ge=0, description="seconds between progress events")
    save_minutes: float = Field(3.0, ge=0, description="minutes between checkpoints")
    save_steps: int | None = Field(None, ge=1, description="steps between checkpoints")
    sample_minutes: float = Field(10.0, gt=0, description="minutes between evaluations and samples")
    evaluate_steps: int | None = Field(None, ge=1, description="steps between evaluations, instead of minutes")
    patience: int | None = Field(None, ge=1, description="early stopping: evaluations looked back on")
    min_gain: float = Field(0.004, ge=0, description="early stopping: least relative gain over the patience")
    keep_best: bool = Field(False, description="remember the weights of the lowest evaluation")

    @model_validator(mode="after")
    def _has_a_budget(self) -> TrainingConfig:
        if self.steps is None and self.minutes is None:
            raise ValueError("give a budget: steps or minutes")
        if self.evaluate_steps is None and (self.patience or self.keep_best):
            raise ValueError("early stopping and the best weights need evaluate_steps")
        return self


# A checkpoint with another value of these belongs to another run; budgets may grow.
IDENTITY = {"batch", "optimizer", "lr", "betas", "weight_decay", "warmup", "ema", "clip", "seed"}


@dataclass
class TrainerState:
    """Everything about a run besides its tensors; JSON in the checkpoint."""

    batch: int
    step: int = 0
    seen: int = 0  # examples  # word: a key of checkpoints and logs
    seconds: float = 0.0
    lr_scale: float = 1.0  # halved by every roll-back
    rollbacks: int = 0
    skipped: int = 0  # steps whose loss or gradient was NaN or Inf
    history: list[float] = field(default_factory=list)  # the loss of every evaluation
    best: float = math.inf  # its lowest value
    best_step: int = 0

    def has_converged(self, patience: int, min_gain: float) -> bool:
        """Whether the last `patience` evaluations gained less than `min_gain` of the best before them.

        The rule is DVAR's idea with a plateau for its variance (Voronov et al. 2023, arXiv:2302.04841): on a
        fixed batch the loss shows when a concept has been learned, which the training loss does not.
        """
        if len(self.history) <= 2 * patience:
            return False
        before, latest = min(self.history[:-patience]), min(self.history[-patience:])
        return latest > before * (1 - min_gain)


@dataclass(frozen=True)
class StepContext:
    """Number (from 0), batch size and randomness of one step; equal contexts give equal batches.

    A batch may be computed in micro-batches, one after the other or by several processes: `rows` are those
    of this one. Draw for the whole batch and then take the rows, and results do not depend on the split.
    """

    step: int
    batch_size: int
    seed: tuple[int, ...]
    micro_batch: int = 0
    micro_batches: int = 1
    rollbacks: int = 0  # part of the seed: after a roll-back the batches are others

    @property
    def rows(self) -> slice:
        """The examples of this micro-batch."""
        n = self.batch_size // self.micro_batches
        return slice(self.micro_batch * n, (self.micro_batch + 1) * n)

    @property
    def rng(self) -> np.random.Generator:
        """A new NumPy generator, the same for every call in this step."""
        return np.random.default_rng(self.seed)

    def step_generator(self, *entropy: int) -> np.random.Generator:
        """A NumPy generator that is independent of `rng` and of those with other entropy."""
        return np.random.default_rng((*self.seed, *entropy))

    @property
    def generator(self) -> torch.Generator:
        """A new PyTorch generator on the CPU, the same for every call in this step."""
        return torch.Generator().manual_seed(int(self.step_generator(1).integers(2**62)))
