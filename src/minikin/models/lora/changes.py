"""Changes of a layer's weight: a low-rank pair, and the other kinds that LyCORIS and PEFT train.

    LoRA     W + s up down, with a middle factor too (Tucker): up (middle down)
    LoHa     W + s (a1 b1) * (a2 b2), element by element
    LoKr     W + s (w1 kron w2)
    full     W + difference, also of norms
    IA3      W (1 + v), by rows or by columns
    DoRA     m V / |V| with V = W + any of the first three

s is alpha / rank. Formulas: LyCORIS (Yeh et al. 2024, arXiv:2309.14859) and its lycoris/functional; DoRA: Liu
et al. 2024, arXiv:2402.09353. A weight w adds w times the difference from W, as in A1111 and ComfyUI.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """A change of one layer's weight: up @ down, with alpha included.

    down  (r, d_in) or (r, c_in, k, k)
    up    (d_out, r) or (c_out, r, 1, 1)
    """

    down: Tensor
    up: Tensor

    def delta(self, weight: Tensor) -> Tensor:
        """The difference of the weight, in its shape, float32."""
        return (self.up.flatten(1).float() @ self.down.flatten(1).float()).view_as(weight)


@dataclass(frozen=True)
class Change:
    """A change of one layer's weight that is no pair.

    tensors  by field (see `lora_keys.FIELDS`): of one kind, and a magnitude where it is DoRA
    scale    alpha / rank
    """

    tensors: Mapping[str, Tensor]
    scale: float = 1.0

    def to(self, weight: Tensor) -> Change:
        """On the weight's device; a whole difference, as large as the weight, in its dtype."""
        dtype = weight.dtype if "diff" in self.tensors else torch.float32
        moved = {k: t.to(weight.device, dtype).contiguous() for k, t in self.tensors.items()}
        return Change(moved, self.scale)

    def fits(self, weight: Tensor) -> bool:
        """True if the tensors give a difference of this weight's shape."""
        shapes = Change({k: t.to("meta") if t.ndim else t for k, t in self.tensors.items()}, self.scale)
        try:
            return shapes.delta(torch.empty_like(weight, device="meta")).shape == weight.shape
        except (RuntimeError, IndexError, ValueError):
            return False

    def delta(self, weight: Tensor) -> Tensor:
        """The difference of the weight, in its shape, float32; raises RuntimeError where shapes do not fit."""
        weight = weight.float()
        if "on_input" in self.tensors:
            return _ia3(weight, self.tensors)
        change = self._additive(weight)
        if "magnitude" in self.tensors:
            return _decomposed(weight + change, self.tensors["magnitude"].float(), per_output=True) - weight
        if "dora_scale" in self.tensors:
            scale = self.tensors["dora_scale"].float()
            return _decomposed(weight + change, scale, per_output=scale.shape[0] == weight.shape[0]) - weight
        return change

    def _additive(self, weight: Tensor) -> Tensor:
        t = {name: value.float() for name, value in self.tensors.items()}
        if "diff" in t:
            return t["diff"].view_as(weight)
        if "up" in t:
            product = t["up"].flatten(1) @ with_middle(t["down"], t.get("mid")).flatten(1)
        elif "hada_w1_a" in t:
            first, second = (_product(t[f"hada_w{k}_a"], t[f"hada_w{k}_b"], t.get(f"hada_t{k}")) for k in "12")
            product = first.reshape(weight.shape) * second.reshape(weight.shape)
        else:
            product = _kronecker(*(_factor(t, k) for k in "12"))
        return product.reshape(weight.shape) * self.scale


def with_middle(down: Tensor, middle: Tensor | None) -> Tensor:
    """One down factor (r, c_in, k, k) of a down factor (r, c_in, 1, 1) and a middle factor (r, r, k, k)."""
    if middle is None:
        return down
    return torch.einsum("ij...,jc->ic...", middle.float(), down.float().flatten(1))


def _product(a: Tensor, b: Tensor, middle: Tensor | None) -> Tensor:
    """a b, (d_out, r) by (r, d_in, ...); with a middle factor (Tucker) a is (r, d_out) and b (r, d_in)."""
    if middle is None:
        return (a.flatten(1) @ b.flatten(1)).view(a.shape[0], *b.shape[1:])
    return torch.einsum("ij...,ip,jr->pr...", middle, a, b)


def _factor(t: Mapping[str, Tensor], k: str) -> Tensor:
    """w1 or w2 of LoKr."""
    whole = t.get(f"lokr_w{k}")
    return _product(t[f"lokr_w{k}_a"], t[f"lokr_w{k}_b"], t.get(f"lokr_t{k}")) if whole is None else whole


def _kronecker(first: Tensor, second: Tensor) -> Tensor:
    first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    return torch.kron(first, second.contiguous())


def _ia3(weight: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    vector = t["weight"].float().flatten()
    axis = 1 if bool(t["on_input"]) else 0
    return weight * vector.view([-1 if k == axis else 1 for k in range(weight.ndim)])


def _decomposed(weight: Tensor, magnitude: Tensor, *, per_output: bool) -> Tensor:
    """The weight with these norms of its output rows, or of its input columns."""
    axis = 0 if per_output else 1
    others = [k for k in range(weight.ndim) if k != axis]
    norm = weight.square().sum(others, keepdim=True).sqrt() + torch.finfo(torch.float32).eps
    return weight * (magnitude.reshape(norm.shape) / norm)
