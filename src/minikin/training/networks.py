"""What a training changes: the trainable parameters of its networks, as optimizer and checkpoint see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def trainable_parameters(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


class TrainableNetworks(nn.Module):
    """Networks of a run by name. The state dict holds only tensors that training can change.

    whole  parts of which every parameter and buffer is stored: EMA targets, heads
    """

    def __init__(self, parts: dict[str, nn.Module], whole: Sequence[str] = ()) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.whole = frozenset(whole)

    def _changing(self) -> Iterator[tuple[str, Tensor]]:
        for part, module in self.parts.items():
            for name, p in module.named_parameters():
                if p.requires_grad or part in self.whole:
                    yield f"{part}.{name}", p
            if part in self.whole:
                for name, b in module.named_buffers():
                    yield f"{part}.{name}", b

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        return {name: value.detach() for name, value in self._changing()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Raises RuntimeError when names or shapes differ."""
        tensors = dict(self._changing())
        if tensors.keys() != state_dict.keys():
            differ = sorted(tensors.keys() ^ state_dict.keys())
            raise RuntimeError(f"{len(differ)} tensors differ, for example {differ[0]}")
        for name, value in tensors.items():
            if value.shape != state_dict[name].shape:
                raise RuntimeError(f"{name} has another shape")
            value.copy_(state_dict[name])
