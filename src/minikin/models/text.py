"""Parsed prompts to the inputs of text encoders: token ids, token positions of concepts, emphasis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.models.prompt import Prompt

MIN_MEAN = 1e-4  # of an encoding's root mean square; a smaller mean is rounding


class Encoded(NamedTuple):
    """Text encodings of a batch of prompts.

    e          (B, N, D)
    pooled     (B, P) of SDXL's second encoder, else None
    positions  per prompt, per concept use: token positions of the concept's word, in order
    valid      (B, N) bool, true from BOS to the first EOS
    """

    e: Tensor
    pooled: Tensor | None
    positions: tuple[tuple[tuple[int, ...], ...], ...]
    valid: Tensor

    def token_mask(self, uses: Sequence[Sequence[int]], *, last: bool = False) -> Tensor:
        """Mask (B, N): 1 at the tokens of these concept uses of each prompt, 0 elsewhere.

        uses  per prompt, indices into its `uses`
        last  mark only the last token of each use
        """
        mask = torch.zeros(self.e.shape[:2], device=self.e.device)
        for b, indices in enumerate(uses):
            for k in indices:
                at = self.positions[b][k]
                mask[b, list(at[-1:] if last else at)] = 1
        return mask


def tokenize(tokenizer: Any, prompts: Sequence[Prompt]) -> tuple[Tensor, list[tuple[tuple[int, ...], ...]]]:
    """Token ids (B, N) and, per prompt, the token positions of each concept use.

    Raises BadRecipe when a concept stands after the last token that the tokenizer keeps.
    """
    batch = tokenizer(
        [p.text for p in prompts],
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
        return_offsets_mapping=True,
    )
    positions = []
    for prompt, spans in zip(prompts, batch.offset_mapping.tolist(), strict=True):
        of_prompt = tuple(_inside(spans, use.start, use.end) for use in prompt.uses)
        for use, at in zip(prompt.uses, of_prompt, strict=True):
            n_tokens = len(tokenizer(prompt.text[use.start : use.end]).input_ids) - 2
            if len(at) < n_tokens:
                raise BadRecipe(
                    f"The prompt is longer than the {tokenizer.model_max_length - 2} tokens this base "
                    f"reads, and <{use.name}> lies beyond them. Shorten it or name it earlier."
                )
        positions.append(of_prompt)
    return batch.input_ids, positions


def apply_emphasis(e: Tensor, prompts: Sequence[Prompt], tokenizer: Any) -> Tensor:
    """Emphasis as in A1111: scale the encodings of the weighted tokens, then restore the encoding's mean.

    The mean is not restored where it is 0, as after a text encoder that ends in a plain layer norm.

    e  (B, N, D); returns the same shape
    """
    factors = torch.ones(e.shape[:2], device=e.device, dtype=torch.float32)
    texts = [p.text for p in prompts]
    spans = tokenizer(
        texts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_offsets_mapping=True,
    ).offset_mapping
    for b, prompt in enumerate(prompts):
        for w in prompt.weights:
            for position in _inside(spans[b], w.start, w.end):
                factors[b, position] *= w.value
    scaled = e.float() * factors[..., None]
    emphasized = (factors != 1).any(-1)[:, None, None]
    before, after = (x.mean((1, 2), keepdim=True) for x in (e.float(), scaled))
    least = MIN_MEAN * e.float().square().mean((1, 2), keepdim=True).sqrt()
    has_mean = (before.abs() > least) & (after.abs() > least)
    mean = torch.where(has_mean, before / torch.where(has_mean, after, 1.0), 1.0)
    return torch.where(emphasized, scaled * mean, e.float()).to(e.dtype)


@contextmanager
def word_vectors_replaced(
    model: Any, replacements: Sequence[tuple[int, tuple[int, ...], Tensor]]
) -> Iterator[None]:
    """Context in which the token embedding returns other vectors at some positions.

    replacements  (index in the batch, token positions, vectors (n, d))
    """
    if not replacements:
        yield
        return

    def replace(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        out = output.clone()
        for b, positions, vectors in replacements:
            if len(positions) != len(vectors):
                raise BadRecipe(
                    f"The concept has {len(vectors)} word vectors, but its category takes "
                    f"{len(positions)} tokens in this prompt."
                )
            out[b, list(positions)] = vectors.to(out.device, out.dtype)
        return out

    handle = model.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _inside(spans: Sequence[Sequence[int]], start: int, end: int) -> tuple[int, ...]:
    """Positions of the tokens that overlap characters [start, end)."""
    return tuple(i for i, (a, b) in enumerate(spans) if a < end and b > start and b > a)
