"""Device and dtype of a base."""

from __future__ import annotations

from typing import Any

import torch

from minikin.errors import BadRecipe, OutOfMemory
from minikin.models import precision
from minikin.models.families import denoiser_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def devices() -> list[str]:
    """The devices of this machine, best first."""
    available = []
    if torch.cuda.is_available():
        available.append("cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        available.append("xpu")
    return [*available, "cpu"]


def resolve(device: str | None = None, dtype: str | None = None) -> tuple[torch.device, torch.dtype]:
    """Device and dtype from their names; by default the best device and a dtype that suits it.

    CUDA: bfloat16 if the card supports it, else float16. MPS and XPU: float16. CPU: float32, because most
    processors emulate half precision. Raises BadRecipe.
    """
    have = devices()
    name = device or have[0]
    if name.split(":")[0] not in have:
        raise BadRecipe(f"There is no device '{name}' on this machine. It has: {', '.join(have)}.")
    if dtype is not None and dtype not in DTYPES:
        raise BadRecipe(f"Unknown dtype '{dtype}'. Known: {', '.join(DTYPES)}.")
    if dtype:
        return torch.device(name), DTYPES[dtype]
    kind = name.split(":")[0]
    if kind == "cpu":
        return torch.device(name), torch.float32
    if kind == "cuda" and precision.has_fast_bfloat16(torch.device(name)):
        return torch.device(name), torch.bfloat16
    return torch.device(name), torch.float16


def to_device(pipe: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Move a pipeline to a device and dtype; raises OutOfMemory."""
    try:
        pipe.to(device)
        if denoiser_of(pipe).dtype is not dtype:
            pipe.to(dtype)
    except torch.OutOfMemoryError as e:
        raise OutOfMemory(
            f"The base does not fit on {device}. Use --dtype float16, a smaller base, or --device cpu."
        ) from e
