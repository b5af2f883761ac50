"""Several processes that train one model together; with one process everything here does nothing.

Each process computes its own rows of every batch and the gradients are averaged, so that all hold
the same weights at every step. Started by `torchrun` or `accelerate launch`, which set WORLD_SIZE
and the rest of PyTorch's environment:

    with joined(device) as ranks: ...

The first rank alone writes files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This process's number among `count`."""

    rank: int = 0
    count: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over all ranks; one message for all of a dtype."""
        if self.count == 1:
            return
        for dtype in {t.dtype for t in tensors}:
            own = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in own])
            dist.all_reduce(flat)
            flat /= self.count
            for t, part in zip(own, torch.split(flat, [t.numel() for t in own]), strict=True):
                t.copy_(part.view(t.shape))

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return flag if self.count == 1 else self._reduced(float(flag), dist.ReduceOp.MAX) > 0

    def agreed(self, value: float) -> float:
        """The first rank's number, for all."""
        if self.count == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(box, 0)
        return float(box)

    def wait(self) -> None:
        """Until all ranks have come here."""
        if self.count > 1:
            self._reduced(0.0, dist.ReduceOp.MAX)

    def _reduced(self, value: float, how: dist.ReduceOp.RedOpType) -> float:
        box = torch.tensor([value], device=self.device)
        dist.all_reduce(box, how)
        return float(box)


def current(device: torch.device = CPU) -> Ranks:
    """The ranks of the group this process has joined, or one alone."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size(), device)
    return Ranks()


def here() -> tuple[int, int]:
    """This process's rank and its number on this machine, as the launcher says; (0, 0) alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Inside, this process belongs to the group its launcher has announced, if there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield current(device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield current(device)
    finally:
        dist.destroy_process_group()
