"""Several processes that train one model together; with one process everything here does nothing.

Each process computes its own rows of every batch and the gradients are averaged, so that all hold
the same weights at every step. Started by `torchrun` or `accelerate launch`, which set WORLD_SIZE
and the rest of PyTorch's environment:

    with process_group(device) as ranks: ...

Only the first rank writes files.
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
    """This process's rank among `count`."""

    rank: int = 0
    count: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over all ranks; one message for all of a dtype."""
        if self.count == 1:
            return
        for dtype in {t.dtype for t in tensors}:
            group = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in group])
            dist.all_reduce(flat)
            flat /= self.count
            for t, part in zip(group, torch.split(flat, [t.numel() for t in group]), strict=True):
                t.copy_(part.view(t.shape))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag if self.count == 1 else self._all_reduce(float(flag), dist.ReduceOp.MAX) > 0

    def of_first(self, value: float) -> float:
        """The first rank's number, on all ranks."""
        if self.count == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, 0)
        return float(tensor)

    def barrier(self) -> None:
        """Wait until all ranks have come here."""
        if self.count > 1:
            self._all_reduce(0.0, dist.ReduceOp.MAX)

    def _all_reduce(self, value: float, operation: dist.ReduceOp.RedOpType) -> float:
        tensor = torch.tensor([value], device=self.device)
        dist.all_reduce(tensor, operation)
        return float(tensor)


def current(device: torch.device = CPU) -> Ranks:
    """The ranks of the group this process has joined, or of one process alone."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size(), device)
    return Ranks()


def launcher_ranks() -> tuple[int, int]:
    """This process's rank, and its rank on this machine, by the launcher's environment; (0, 0) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def process_group(device: torch.device) -> Iterator[Ranks]:
    """Inside, this process belongs to the group its launcher has announced, if there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield current(device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield current(device)
    finally:
        dist.destroy_process_group()
