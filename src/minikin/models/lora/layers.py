"""Layers with adapters on them, in place: the same module and parameters, another class and tensors beside.

Layers change their class in place, so parameters, their names and the `state_dict` stay. A forward hook would
not do: torch.compile ignores hooks that are registered after compilation. It detects a new class, and treats
the tensors as inputs, so that the next LoRA needs no new compilation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minikin.models.lora.changes import Change, LowRank


@dataclass
class LayerSum:
    """The weighted sum of the changes of one layer.

    pairs    low-rank pairs, their weights multiplied in
    changes  of other kinds, with their weights
    bias     difference of the bias, or None
    """

    pairs: list[LowRank] = field(default_factory=list)
    changes: list[tuple[Change, float]] = field(default_factory=list)
    bias: Tensor | None = None

    def add(self, change: LowRank | Change, weight: float) -> None:
        if isinstance(change, LowRank):
            self.pairs.append(LowRank(change.down, change.up if weight == 1 else change.up * weight))
        else:
            self.changes.append((change, weight))

    def add_bias(self, difference: Tensor, weight: float) -> None:
        self.bias = difference * weight if self.bias is None else self.bias + difference * weight

    @property
    def pair(self) -> LowRank | None:
        """One pair whose product is the sum of the pairs' products; exact, of rank r_1 + r_2 + ...

        down = [down_1; down_2; ...], up = [w_1 up_1, w_2 up_2, ...]
        """
        if len(self.pairs) < 2:
            return self.pairs[0] if self.pairs else None
        return LowRank(torch.cat([p.down for p in self.pairs], 0), torch.cat([p.up for p in self.pairs], 1))

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The changed weight, in its dtype and memory layout."""
        pair, total = self.pair, weight.float()
        if pair is not None:
            down, up = pair.down.flatten(1).float(), pair.up.flatten(1).float()
            total = torch.addmm(weight.flatten(1).float(), up, down).view_as(weight)
        for change, w in self.changes:
            total = total + w * change.delta(weight)
        return total.to(weight.dtype).to(memory_format=_format(weight))


class _LinearBeside(nn.Linear):
    lora_down: Tensor
    lora_up: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.lora_down), self.lora_up)


class _LinearMerged(nn.Linear):
    lora_weight: Tensor
    lora_bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.lora_weight, self.lora_bias)


class _ConvolutionBeside(nn.Conv2d):
    lora_down: Tensor
    lora_up: Tensor

    def forward(self, input: Tensor) -> Tensor:
        narrow = F.conv2d(input, self.lora_down, None, self.stride, self.padding, self.dilation, self.groups)
        return super().forward(input) + F.conv2d(narrow, self.lora_up)


class _ConvolutionMerged(nn.Conv2d):
    lora_weight: Tensor
    lora_bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(input, self.lora_weight, self.lora_bias)  # with its padding mode
        return out


class _GroupNormMerged(nn.GroupNorm):
    lora_weight: Tensor
    lora_bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return F.group_norm(input, self.num_groups, self.lora_weight, self.lora_bias, self.eps)


class _LayerNormMerged(nn.LayerNorm):
    lora_weight: Tensor
    lora_bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.lora_weight, self.lora_bias, self.eps)


_BESIDE = {nn.Linear: _LinearBeside, nn.Conv2d: _ConvolutionBeside}
_MERGED = {
    nn.Linear: _LinearMerged, nn.Conv2d: _ConvolutionMerged, nn.GroupNorm: _GroupNormMerged,
    nn.LayerNorm: _LayerNormMerged,
}  # fmt: skip


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer, its classes without and with adapters, and the tensors of the latter."""

    layer: Any
    plain: Any
    adapted: Any
    tensors: dict[str, Tensor | None]

    @classmethod
    def of(cls, layer: Any, total: LayerSum, merge: bool) -> AdaptedLayer:
        """The layer with this sum: merged, or, for pairs alone, computed beside it."""
        plain: Any = type(layer)
        pair = total.pair
        if not merge and pair is not None and not total.changes and total.bias is None:
            tensors: dict[str, Tensor | None] = {"lora_down": pair.down, "lora_up": pair.up}
            return cls(layer, plain, _adapted(plain, _kind(plain, _BESIDE)), tensors)
        bias = layer.bias if total.bias is None else (layer.bias.float() + total.bias).to(layer.bias.dtype)
        weight = layer.weight if pair is None and not total.changes else total.merged(layer.weight)
        tensors = {"lora_weight": weight, "lora_bias": None if bias is None else bias.detach()}
        return cls(layer, plain, _adapted(plain, _kind(plain, _MERGED)), tensors)

    def apply(self) -> None:
        self.layer.__class__ = self.adapted
        self.layer.__dict__.update(self.tensors)

    def remove(self) -> None:
        self.layer.__class__ = self.plain
        for name in self.tensors:
            self.layer.__dict__.pop(name, None)


def merge_all(sums: Sequence[tuple[Any, LayerSum]], merged_bytes: int) -> list[AdaptedLayer]:
    """The layers with their sums, merged if a second copy of their weights takes at most `merged_bytes`."""
    merge = sum(int(layer.weight.nbytes) for layer, _ in sums) <= merged_bytes
    return [AdaptedLayer.of(layer, total, merge) for layer, total in sums]


def _format(weight: Tensor) -> torch.memory_format:
    last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not weight.is_contiguous() else torch.contiguous_format


def _kind(plain: Any, kinds: Mapping[Any, Any]) -> Any:
    return next(kind for layer, kind in kinds.items() if issubclass(plain, layer))


@cache
def _adapted(plain: Any, kind: Any) -> Any:
    """The class of a layer of class `plain` with LoRAs; cached, because torch.compile compares classes."""
    return kind if plain in kind.__bases__ else type(f"{plain.__name__}{kind.__name__}", (kind, plain), {})
