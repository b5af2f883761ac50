"""Exponential moving average of trained weights: diffusers' EMAModel, or nothing for a decay of 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def make(parameters: Sequence[nn.Parameter], decay: float) -> Any:
    """An EMAModel of these parameters; without decay one that keeps no second copy of the weights."""
    if not decay:
        return _NoEMA()
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay=decay, foreach=True)


class _NoEMA:
    optimization_step = 0

    def __init__(self) -> None:
        self.shadow_params: list[Tensor] = []

    def step(self, parameters: Any) -> None: ...

    store = copy_to = restore = step
