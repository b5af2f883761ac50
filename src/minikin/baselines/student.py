"""The networks a baseline trains: a U-Net that shares all frozen tensors with the base, and a word's vector.

`partial_copy` copies the structure of the U-Net, not its weights: those that are trained become copies in
float32, the others are the base's tensors. So the base need not be restored, and a method takes only the
memory of what it trains.
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


def no_parameter(name: str) -> bool:
    """Chooses none of the U-Net's parameters for training."""
    return False


def partial_copy(unet: Any, trains: Callable[[str], bool] = no_parameter) -> Any:
    """A copy of a U-Net in which the parameters of these names are copies, and ask for gradients.

    Use it inside `base.frozen()`, which freezes the shared ones.
    """
    parameters = {
        id(p): nn.Parameter(p.detach().float().clone()) if trains(name) else p
        for name, p in unet.named_parameters()
    }
    return deepcopy(unet, parameters)


class Student(nn.Module):
    """A U-Net and the vectors of one word, trained together on the error of `errors`.

    words               per text encoder (1, d_k); none where the word keeps its vector
    detach_first_token  no gradient through the keys and values of the first token (Custom Diffusion)
    """

    def __init__(
        self, base: Base, unet: Any, words: Sequence[Tensor] = (), *, detach_first_token: bool = False
    ) -> None:
        super().__init__()
        self.unet, self.detach_first_token = unet, detach_first_token
        self.words = nn.ParameterList([nn.Parameter(w.detach().float().clone()) for w in words])
        self._base = base

    def condition(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor | None]:
        """Packed keys and values (B, N, W) and pooled embedding; the uses in the prompts are the rare word."""
        words = {u.name: list(self.words) for p in prompts for u in p.uses} if len(self.words) else None
        with torch.set_grad_enabled(words is not None and torch.is_grad_enabled()):
            out = self._base.encode(prompts, words)
        kv = attention.pack(self.unet, out.e, shape=self._base.layout)
        if self.detach_first_token:
            kv = torch.cat([kv[:, :1].detach(), kv[:, 1:]], 1)
        return kv, out.pooled

    def errors(self, batch: Batch) -> Tensor:
        """Mask times squared error, mean over each example's pixels, (B,)."""
        base = self._base
        half = base.dtype is not torch.float32
        with torch.autocast(base.device.type, torch.bfloat16, enabled=half):
            kv, pooled = self.condition(batch.prompts)
            height, width = (n * base.vae_scale_factor for n in batch.x_t.shape[2:])
            more = base.added_conditions(len(batch.x_t), pooled, (height, width))
            prediction = self.unet(batch.x_t.to(base.dtype), batch.t, kv, **more).sample
        error: Tensor = (prediction.float() - batch.target).square() * batch.mask
        return error.flatten(1).mean(1)


def loss(student: Student, photos: Batch, classes: Batch | None, prior: float) -> dict[str, Tensor]:
    """Mean error on the photos, plus `prior` times that on images of the category, in one call.

    DreamBooth's prior preservation (arXiv:2208.12242, eq. 2) with images the base has generated.
    """
    if classes is None:
        return {"loss": student.errors(photos).mean()}
    errors = student.errors(_concatenate(photos, classes))
    on_photos, on_class = errors[: len(photos.t)].mean(), errors[len(photos.t) :].mean()
    return {"loss": on_photos + prior * on_class, "photos": on_photos, "prior": on_class}


def _concatenate(a: Batch, b: Batch) -> Batch:
    x_t, t, target, mask = (torch.cat([getattr(x, k) for x in (a, b)]) for k in ("x_t", "t", "target", "mask"))
    return Batch(x_t, t, target, mask, [*a.prompts, *b.prompts])
