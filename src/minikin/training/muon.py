"""Muon, an optimizer: orthogonalised momentum for the weight matrices, AdamW for everything else.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon): the momentum of a weight matrix is replaced by
the nearest orthogonal one, so that directions which gradients seldom take move as far as common
ones. A convolution counts as a matrix (out, in * height * width). Scaled by 0.2 sqrt(longer side) as
in Liu et al. 2025 (arXiv:2502.16982), so that the learning rate and the weight decay of AdamW serve both.

On tiny's U-Net, continued from the same checkpoint on the same batches, the loss fell from 0.144
to 0.136 within a hundred steps (docs/tiny.md), for a tenth more time a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from minikin.models import precision

NARROWEST = 64  # channels; narrower layers (first and last ones) are AdamW's
MOMENTUM = 0.95
ROUNDS = 5  # of the Newton-Schulz iteration
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: all singular values to 0.7 .. 1.2


class Muon(torch.optim.AdamW):
    """AdamW with Muon's step for `matrices`; parameter groups, learning rates and weight decay are AdamW's."""

    def __init__(self, groups: Any, matrices: Iterable[Tensor], **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self._matrices = {id(p) for p in matrices}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step: Muon's for the matrices, whose gradients are hidden from AdamW's, which follows."""
        hidden: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for p in group["params"]:
                if id(p) in self._matrices and p.grad is not None:
                    self._update(p, p.grad, group["lr"], group["weight_decay"])
                    hidden.append((p, p.grad))
                    p.grad = None
        loss = super().step(closure)
        for p, gradient in hidden:
            p.grad = gradient
        return loss

    def _update(self, p: Tensor, gradient: Tensor, lr: float, decay: float) -> None:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
            state["step"] = torch.zeros(())  # AdamW's loading looks for one in every state
        momentum: Tensor = state["momentum"]
        momentum.lerp_(gradient, 1 - MOMENTUM)
        nesterov = gradient.lerp(momentum, MOMENTUM)
        flat = nesterov.reshape(len(p), -1)
        update = orthogonal(flat).view(p.shape)
        p.mul_(1 - lr * decay).add_(update, alpha=-lr * 0.2 * max(flat.shape) ** 0.5)


def orthogonal(g: Tensor) -> Tensor:
    """U S V^T (m, n) to about U V^T, by a quintic Newton-Schulz iteration, in bfloat16 where that is quick."""
    a, b, c = QUINTIC
    wide = g.shape[0] <= g.shape[1]
    x = (g if wide else g.T).to(torch.bfloat16 if precision.has_fast_bfloat16(g.device) else torch.float32)
    x = (x / (x.norm() + 1e-7)).contiguous()
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.T).to(g.dtype)


def matrices(model: nn.Module) -> list[Tensor]:
    """The weights Muon is for: of linear layers and convolutions, with enough channels on both sides."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    weights = (m.weight for m in model.modules() if isinstance(m, kinds))
    return [w for w in weights if w.requires_grad and min(w.shape[:2]) >= NARROWEST]
