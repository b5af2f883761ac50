"""Teaching a concept: the two edit modes as objectives for the loop.

What is learned is small: the value differences of all sites (one vector each) and, in mode
"gated", the word vectors that stand in the prompt. Everything else is frozen, and everything that
does not change is computed once: latents, masks, the category's encoding, C^-1.

    gated   Perfusion: Tewel et al. 2023, arXiv:2305.01644. i* is a running average of the concept's
            encoding, 0.99 i* + 0.01 e, with a straight-through gradient; weight decay 0.
    row     Keys locked, one value difference on the category's own row, no gate, no C, no word
            vector (Infusion, arXiv:2404.14007, in the form of docs/measurements.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minikin.models.attention import Addition
from minikin.models.base import Base
from minikin.models.prompt import Prompt
from minikin.perfusion import edit
from minikin.perfusion.concept import Concept
from minikin.perfusion.conditioning import unpacked_delta
from minikin.perfusion.edit import Direction, Gate
from minikin.recipes import Teach

AVERAGE = 0.99  # of i*; Perfusion section 4.4


@dataclass(frozen=True)
class Batch:
    """One step's images: noisy latents, their targets, masks, prompts."""

    x_t: Tensor  # (B, C, h, w)
    t: Tensor  # (B,)
    target: Tensor  # (B, C, h, w) noise or v
    mask: Tensor  # (B, 1, h, w) in [0, 1]
    prompts: Sequence[Prompt]


class Student:
    """The learnable part of one concept on one base, and the loss that teaches it."""

    def __init__(self, base: Base, recipe: Teach, category: Tensor, c_inv: Tensor | None) -> None:
        self.base, self.recipe = base, recipe
        self.category = category.to(base.device)
        self.gated = recipe.mode == "gated"
        self.c_inv: Tensor | None = None
        self.gate = Gate(recipe.beta, recipe.tau)
        self.delta = torch.zeros(base.layout.n_values, device=base.device, requires_grad=True)
        self.keys = torch.zeros_like(self.delta, requires_grad=True) if recipe.keys == "trained" else None
        self.words: list[Tensor] = []
        self.i_star = torch.zeros(base.layout.text_width, device=base.device)
        if self.gated:
            assert c_inv is not None
            self.c_inv = c_inv.to(base.device)
            self.words = [w.requires_grad_() for w in base.word_vectors(recipe.category)]
            self.i_star = self.category.clone()  # the word starts as the category's

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser: the only trainable tensors there are."""
        outputs = [self.delta] if self.keys is None else [self.delta, self.keys]
        groups: list[dict[str, Any]] = [{"params": outputs, "lr": self.recipe.value_rate}]
        if self.words:
            groups.append({"params": self.words, "lr": self.recipe.word_rate})
        return groups

    def condition(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Packed keys and values (B, N, W), pooled, and the concept's mean encoding (D,) or None."""
        if not self.gated:
            return self._row(prompts)
        out = self.base.encode(prompts, {p.uses[0].name: self.words for p in prompts})
        last = [at[0][-1] for at in out.positions]
        e = out.e.float()
        e_concept = torch.stack([e[b, p] for b, p in enumerate(last)]).mean(0)
        i_star = self.i_star + e_concept - e_concept.detach()  # straight through
        assert self.c_inv is not None
        d = Direction(i_star, self.c_inv @ i_star, self.category)
        mask = out.opening([[0]] * len(prompts)) if self.recipe.positions == "own" else None
        done = edit.edit_encodings(e, [d], [self.gate], [mask])
        kv = self.base.pack(done.encodings, additions=[Addition(done.gates[0], self.delta, self.keys)])
        return kv, out.pooled, e_concept.detach()

    def _row(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor | None, None]:
        with torch.no_grad():
            out = self.base.encode(prompts)
        opening = out.opening([[0]] * len(prompts), last=True)
        return self.base.pack(out.e, additions=[Addition(opening, self.delta, self.keys)]), out.pooled, None

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Masked error, mean over all pixels, and the concept's encoding for i*.

        With `keep`, the prediction around the subject should be that of the plain category: what a value
        puts there colours the other thing as soon as two concepts share an image.
        """
        kv, pooled, e_concept = self.condition(batch.prompts)
        predicted = self._predicted(batch, kv, pooled)
        error = (predicted - batch.target).square() * batch.mask
        if self.recipe.keep and bool((batch.mask < 1).any()):
            with torch.no_grad():
                plain = self.base.encode(batch.prompts)
                usual = self._predicted(batch, self.base.pack(plain.e), plain.pooled)
            error = error + self.recipe.keep * (predicted - usual).square() * (1 - batch.mask)
        return error.mean(), e_concept

    def _predicted(self, batch: Batch, kv: Tensor, pooled: Tensor | None) -> Tensor:
        """What the U-Net says of the noisy images, (B, C, h, w) float32."""
        side = (batch.x_t.shape[2] * self.base.factor, batch.x_t.shape[3] * self.base.factor)
        more = self.base.conditions(len(batch.x_t), pooled, side)
        out: Tensor = self.base.unet(batch.x_t.to(self.base.dtype), batch.t, kv, **more).sample
        return out.float()

    @torch.no_grad()
    def averaged(self, e_concept: Tensor | None) -> None:
        """Move i* towards the concept's encoding of this step."""
        if e_concept is not None:
            self.i_star = AVERAGE * self.i_star + (1 - AVERAGE) * e_concept

    # ---- state -------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        words = {f"word.{k}": w for k, w in enumerate(self.words)}
        keys = {} if self.keys is None else {"keys": self.keys}
        return {
            k: v.detach().cpu().clone()
            for k, v in {"delta": self.delta, "i_star": self.i_star, **keys, **words}.items()
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        self.delta.copy_(state["delta"])
        if self.keys is not None:
            self.keys.copy_(state["keys"])
        self.i_star = state["i_star"].to(self.base.device)
        for k, w in enumerate(self.words):
            w.copy_(state[f"word.{k}"])

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(v).all()) for v in self.state().values())

    def concept(self, c_hash: str, facts: dict[str, Any]) -> Concept:
        """What has been learned so far, as a concept."""
        start = self.base.word_vectors(self.recipe.category)
        moved = tuple((w.detach() - s).cpu() for w, s in zip(self.words, start, strict=False))
        return Concept(
            name=self.recipe.name,
            category=self.recipe.category,
            mode=self.recipe.mode,
            origin=self.base.origin,
            word_deltas=moved,
            i_star=self.i_star.detach().cpu().clone(),
            dual=torch.zeros(1) if self.c_inv is None else edit.dual(self.i_star, self.c_inv).cpu(),
            delta=unpacked_delta(self.base, self.delta),
            keys={} if self.keys is None else unpacked_delta(self.base, self.keys),
            c_hash=c_hash if self.gated else "",
            recipe=facts,
        )
