"""Training objective of a concept, in both edits: what is trained, and the loss.

The trained tensors are few: the value differences of all cross-attention layers (one vector each) and, in
mode "gated", the word vectors that stand in the prompt. Everything else is frozen, and everything that does
not change is computed once: latents, masks, the category's encoding, C^-1.

    gated   Perfusion: Tewel et al. 2023, arXiv:2305.01644. i* is a running average of the concept's
            encoding, 0.99 i* + 0.01 e, with a straight-through gradient; weight decay 0.
    value   Keys locked, one value difference on the category's own row, no gate, no C, no word
            vector (Infusion, arXiv:2404.14007, in the form of docs/measurements.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minikin.models.attention import Addition
from minikin.models.base import Base
from minikin.models.prompt import Prompt
from minikin.models.text import Encoded
from minikin.perfusion import edit
from minikin.perfusion.concept import Concept
from minikin.perfusion.conditioning import unpacked_delta
from minikin.perfusion.edit import Direction
from minikin.perfusion.gate import Gate
from minikin.recipes import Teach
from minikin.training.trainer import ParamGroup

I_STAR_DECAY = 0.99  # of the running average; Perfusion section 4.4


@dataclass(frozen=True)
class Batch:
    """The images of one step: noisy latents, their targets, masks, prompts."""

    x_t: Tensor  # (B, C, h, w)
    t: Tensor  # (B,)
    target: Tensor  # (B, C, h, w) what the denoiser should predict
    mask: Tensor  # (B, 1, h, w) in [0, 1]
    prompts: Sequence[Prompt]


class TrainableConcept(nn.Module):
    """The trained tensors of one concept on one base, and the loss that trains them.

    delta   (n_values,) value differences of all cross-attention layers, packed; zero at first
    keys    the same for keys, None where they are locked
    words   per text encoder (tokens, D), mode gated; the category's at first
    i_star  (D,) the concept's target input, mode gated; the category's encoding at first
    """

    i_star: Tensor

    def __init__(self, base: Base, recipe: Teach, category: Tensor, c_inv: Tensor | None) -> None:
        super().__init__()
        self.base, self.recipe = base, recipe
        self.category = category.to(base.device)
        self.gated = recipe.mode == "gated"
        self.gate = Gate(recipe.beta, recipe.tau)
        self.c_inv: Tensor | None = None
        zeros = torch.zeros(base.layout.n_values, device=base.device)
        self.delta = nn.Parameter(zeros)
        self.keys = nn.Parameter(zeros.clone()) if recipe.keys == "trained" else None
        words: Sequence[Tensor] = ()
        i_star = torch.zeros(base.layout.text_width, device=base.device)
        if self.gated:
            assert c_inv is not None
            self.c_inv = c_inv.to(base.device)
            words, i_star = base.word_vectors(recipe.category), self.category.clone()
        self.words = nn.ParameterList([nn.Parameter(w) for w in words])
        self.register_buffer("i_star", i_star)

    def param_groups(self) -> list[ParamGroup]:
        """The optimizer's groups; the only trainable tensors there are."""
        values = [self.delta] if self.keys is None else [self.delta, self.keys]
        groups = [ParamGroup(values, self.recipe.value_lr, clip=None)]
        if self.gated:
            groups.append(ParamGroup(list(self.words), self.recipe.word_lr, clip=None))
        return groups

    def condition(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Encoded, Tensor | None]:
        """Packed keys and values (B, N, W), encodings, and the concept's mean encoding (D,) or None."""
        if not self.gated:
            return self._value_only(prompts)
        out = self.base.encode(prompts, {p.uses[0].name: list(self.words) for p in prompts})
        last = [at[0][-1] for at in out.positions]
        e = out.e.float()
        e_concept = torch.stack([e[b, p] for b, p in enumerate(last)]).mean(0)
        i_star = self.i_star + e_concept - e_concept.detach()  # straight through
        assert self.c_inv is not None
        d = Direction(i_star, self.c_inv @ i_star, self.category)
        mask = out.token_mask([[0]] * len(prompts)) if self.recipe.positions == "own" else None
        edited = edit.edit_encodings(e, [d], [self.gate], [mask])
        kv = self.base.pack(edited.encodings, additions=[Addition(edited.gates[0], self.delta, self.keys)])
        return kv, out, e_concept.detach()

    def _value_only(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Encoded, None]:
        with torch.no_grad():
            out = self.base.encode(prompts)
        mask = out.token_mask([[0]] * len(prompts), last=True)
        return self.base.pack(out.e, additions=[Addition(mask, self.delta, self.keys)]), out, None

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Masked squared error, mean over all pixels, and the concept's encoding (D,) for i*.

        With `prior_weight`, the prediction around the subject should be that of the plain category: what a
        value puts there colours the other subject as soon as two concepts share an image.
        """
        kv, encoded, e_concept = self.condition(batch.prompts)
        prediction = self._predict(batch, kv, encoded)
        error = (prediction - batch.target).square() * batch.mask
        if self.recipe.prior_weight and bool((batch.mask < 1).any()):
            with torch.no_grad():
                plain = self.base.encode(batch.prompts)
                prior = self._predict(batch, self.base.pack(plain.e), plain)
            error = error + self.recipe.prior_weight * (prediction - prior).square() * (1 - batch.mask)
        return error.mean(), e_concept

    def _predict(self, batch: Batch, kv: Tensor, text: Encoded) -> Tensor:
        """The denoiser's prediction for the noisy latents, (B, C, h, w) float32."""
        height, width = (n * self.base.vae_scale_factor for n in batch.x_t.shape[2:])
        x_t, size = batch.x_t.to(self.base.dtype), (height, width)
        return self.base.predict(x_t, batch.t, kv, pooled=text.pooled, mask=text.mask, size=size).float()

    @torch.no_grad()
    def update_i_star(self, e_concept: Tensor | None) -> None:
        """Move i* towards the concept's encoding of this step: i* <- 0.99 i* + 0.01 e."""
        if e_concept is not None:
            self.i_star = I_STAR_DECAY * self.i_star + (1 - I_STAR_DECAY) * e_concept

    def to_concept(self, c_hash: str, record: dict[str, Any]) -> Concept:
        """The concept as it is now; `record` says how it was trained."""
        start = self.base.word_vectors(self.recipe.category)
        word_deltas = tuple((w.detach() - s).cpu() for w, s in zip(self.words, start, strict=False))
        return Concept(
            name=self.recipe.name,
            category=self.recipe.category,
            mode=self.recipe.mode,
            origin=self.base.origin,
            word_deltas=word_deltas,
            i_star=self.i_star.detach().cpu().clone(),
            dual=torch.zeros(1) if self.c_inv is None else edit.dual(self.i_star, self.c_inv).cpu(),
            delta=unpacked_delta(self.base, self.delta),
            keys={} if self.keys is None else unpacked_delta(self.base, self.keys),
            c_hash=c_hash if self.gated else "",
            recipe=record,
        )
