"""What a training run is told (Plan), where it stands (State), and what one step may use (Turn)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from minikin.recipes import Recipe


class Plan(Recipe):
    """How long and how fast one model is trained. Ends with `steps` or `minutes`, whichever is first."""

    steps: int | None = Field(None, ge=1, description="budget in steps; exactly repeatable")
    minutes: float | None = Field(None, gt=0, description="budget in minutes, over all interruptions")
    batch: int = Field(128, ge=1, description="examples per step; halved when memory is short")
    accumulation: int = Field(1, ge=1, description="pieces a batch is computed in, to save memory")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: for wide layers; see training.muon")
    rate: float = Field(1e-3, gt=0, description="learning rate")
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(100, ge=0, description="steps over which the rate rises")
    decay: float = Field(0.5, ge=0, le=1, description="last share of the budget, in which the rate falls")
    floor: float = Field(0.02, ge=0, le=1, description="the rate at the end, as a share of `rate`")
    ema: float = Field(0.999, ge=0, lt=1, description="averaging of the weights")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    bf16: bool = Field(True, description="compute in bfloat16 over float32 weights, where that is quick")
    compile: bool = Field(False, description="torch.compile the model")
    seed: int = Field(0, ge=0)
    log_steps: int = Field(50, ge=1, description="steps between lines of the log")
    save_minutes: float = Field(3.0, ge=0, description="minutes between checkpoints")
    sample_minutes: float = Field(10.0, gt=0, description="minutes between evaluations and samples")

    @model_validator(mode="after")
    def _budget(self) -> Plan:
        if self.steps is None and self.minutes is None:
            raise ValueError("give a budget: steps or minutes")
        return self


# a checkpoint made with another of these belongs to another run; budgets may grow
SAME = ("batch", "optimizer", "rate", "betas", "weight_decay", "warmup", "ema", "clip", "seed")


@dataclass
class State:
    """Everything about a run besides tensors; JSON in the checkpoint."""

    batch: int
    step: int = 0
    seen: int = 0
    seconds: float = 0.0
    rate: float = 1.0  # halved by every roll-back
    rollbacks: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Turn:
    """One step's number (0 is the first), batch size and randomness; equal turns give equal batches.

    A batch may be computed in pieces, one after the other or by several processes: `rows` are those
    of this piece. Draw for the whole batch and then take the rows, and results do not depend on it.
    """

    step: int
    size: int
    seed: tuple[int, ...]
    piece: int = 0
    pieces: int = 1

    @property
    def rows(self) -> slice:
        n = self.size // self.pieces
        return slice(self.piece * n, (self.piece + 1) * n)

    @property
    def rng(self) -> np.random.Generator:
        """A new generator at its start; further entropy gives independent ones: `turn.fork(1)`."""
        return np.random.default_rng(self.seed)

    def fork(self, *entropy: int) -> np.random.Generator:
        return np.random.default_rng((*self.seed, *entropy))

    @property
    def generator(self) -> torch.Generator:
        """The same for torch, on the CPU."""
        return torch.Generator().manual_seed(int(self.fork(1).integers(2**62)))
