"""What a baseline trains: a U-Net that shares with the base all it does not train, and a word's vector.

`twin` copies the structure of the U-Net, not its weights: those that are trained become copies in
float32, the others are the base's own tensors. So the base needs no restoring, and a method takes
only the memory that it must.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from minikin.models import attention
from minikin.models.base import Base
from minikin.models.prompt import Prompt
from minikin.perfusion.objective import Batch

CHECKPOINTING_FROM = 512  # px


def nothing(name: str) -> bool:
    """Of the U-Net's own weights, none is trained."""
    return False


def twin(unet: Any, trains: Callable[[str], bool] = nothing) -> Any:
    """A copy of a U-Net in which the parameters of these names are its own, and ask for gradients.

    Keep it inside `base.frozen()`, which sees to the shared ones.
    """
    own = {
        id(p): nn.Parameter(p.detach().float().clone()) if trains(name) else p
        for name, p in unet.named_parameters()
    }
    return deepcopy(unet, own)


class Student(nn.Module):
    """A twin and the vectors of one word; `errors` is what all methods minimise.

    words       per text encoder (1, d_k); none where the word keeps its vector
    hold_first  no gradient through the keys and values of the first token (Custom Diffusion)
    """

    def __init__(
        self, base: Base, unet: Any, words: Sequence[Tensor] = (), *, hold_first: bool = False
    ) -> None:
        super().__init__()
        self.unet, self.hold_first = unet, hold_first
        self.words = nn.ParameterList([nn.Parameter(w.detach().float().clone()) for w in words])
        self._base = base

    def condition(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor | None]:
        """Packed keys and values (B, N, W) and pooled embedding; a use in a prompt is the word's place."""
        words = {u.name: list(self.words) for p in prompts for u in p.uses} if len(self.words) else None
        with torch.set_grad_enabled(words is not None and torch.is_grad_enabled()):
            out = self._base.encode(prompts, words)
        kv = attention.pack(self.unet, out.e, shape=self._base.layout)
        if self.hold_first:
            kv = torch.cat([kv[:, :1].detach(), kv[:, 1:]], 1)
        return kv, out.pooled

    def errors(self, batch: Batch) -> Tensor:
        """(B,) mask times squared error, mean over each example's pixels."""
        base = self._base
        half = base.dtype is not torch.float32
        with torch.autocast(base.device.type, torch.bfloat16, enabled=half):
            kv, pooled = self.condition(batch.prompts)
            side = (batch.x_t.shape[2] * base.vae_scale_factor, batch.x_t.shape[3] * base.vae_scale_factor)
            more = base.added_conditions(len(batch.x_t), pooled, side)
            predicted = self.unet(batch.x_t.to(base.dtype), batch.t, kv, **more).sample
        error: Tensor = (predicted.float() - batch.target).square() * batch.mask
        return error.flatten(1).mean(1)


def loss(student: Student, photos: Batch, classes: Batch | None, prior: float) -> dict[str, Tensor]:
    """Mean error on the photos, plus `prior` times that on images of the category, in one call.

    DreamBooth's prior preservation (arXiv:2208.12242, eq. 2) with images the base has painted.
    """
    if classes is None:
        return {"loss": student.errors(photos).mean()}
    errors = student.errors(_joined(photos, classes))
    own, others = errors[: len(photos.t)].mean(), errors[len(photos.t) :].mean()
    return {"loss": own + prior * others, "photos": own, "prior": others}


def _joined(a: Batch, b: Batch) -> Batch:
    x_t, t, target, mask = (torch.cat([getattr(x, k) for x in (a, b)]) for k in ("x_t", "t", "target", "mask"))
    return Batch(x_t, t, target, mask, [*a.prompts, *b.prompts])
