"""Prompts as a base's tokenizers and text encoders take them: tokens, where a concept's word is, emphasis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.models.prompt import Prompt

NO_MEAN = 1e-4  # a mean below this share of an encoding's root mean square is rounding


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

    def opening(self, uses: Sequence[Sequence[int]], *, last: bool = False) -> Tensor:
        """(B, N): 1 at the tokens (or the last token) of these uses of each prompt, 0 elsewhere."""
        mask = torch.zeros(self.e.shape[:2], device=self.e.device)
        for b, wanted in enumerate(uses):
            for k in wanted:
                at = self.positions[b][k]
                mask[b, list(at[-1:] if last else at)] = 1
        return mask


def tokenized(tokenizer: Any, prompts: Sequence[Prompt]) -> tuple[Tensor, list[tuple[tuple[int, ...], ...]]]:
    """Token ids (B, N), and per prompt the positions of each concept's word.

    Raises BadRecipe when a concept lies beyond the prompt's last token.
    """
    batch = tokenizer(
        [p.text for p in prompts], padding="max_length", max_length=tokenizer.model_max_length,
        truncation=True, return_tensors="pt", return_offsets_mapping=True,
    )  # fmt: skip
    places = []
    for prompt, spans in zip(prompts, batch.offset_mapping.tolist(), strict=True):
        found = tuple(_inside(spans, use.start, use.end) for use in prompt.uses)
        for use, at in zip(prompt.uses, found, strict=True):
            whole = len(tokenizer(prompt.text[use.start : use.end]).input_ids) - 2
            if len(at) < whole:
                raise BadRecipe(
                    f"The prompt is longer than the {tokenizer.model_max_length - 2} tokens this base "
                    f"reads, and <{use.name}> lies beyond them. Shorten it or name it earlier."
                )
        places.append(found)
    return batch.input_ids, places


def weighted(e: Tensor, prompts: Sequence[Prompt], tokenizer: Any) -> Tensor:
    """A1111's emphasis: scale the tokens, then restore the mean of the encoding.

    An encoding whose mean is 0 (a text encoder that ends in a plain layer norm) has none to restore.
    """
    factors = torch.ones(e.shape[:2], device=e.device, dtype=torch.float32)
    texts = [p.text for p in prompts]
    spans = tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
        return_offsets_mapping=True,
    ).offset_mapping  # fmt: skip
    for b, prompt in enumerate(prompts):
        for w in prompt.weights:
            for position in _inside(spans[b], w.start, w.end):
                factors[b, position] *= w.value
    scaled = e.float() * factors[..., None]
    touched = (factors != 1).any(-1)[:, None, None]
    before, after = (x.mean((1, 2), keepdim=True) for x in (e.float(), scaled))
    least = NO_MEAN * e.float().square().mean((1, 2), keepdim=True).sqrt()
    some = (before.abs() > least) & (after.abs() > least)
    mean = torch.where(some, before / torch.where(some, after, 1.0), 1.0)
    return torch.where(touched, scaled * mean, e.float()).to(e.dtype)


@contextmanager
def words_in_place(model: Any, rows: Sequence[tuple[int, tuple[int, ...], Tensor]]) -> Iterator[None]:
    """While inside, the token embedding gives these vectors at these places of the batch."""
    if not rows:
        yield
        return

    def put(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        out = output.clone()
        for b, positions, vectors in rows:
            if len(positions) != len(vectors):
                raise BadRecipe(
                    f"The concept has {len(vectors)} word vectors, but its category takes "
                    f"{len(positions)} tokens in this prompt."
                )
            out[b, list(positions)] = vectors.to(out.device, out.dtype)
        return out

    handle = model.get_input_embeddings().register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def _inside(spans: Sequence[Sequence[int]], start: int, end: int) -> tuple[int, ...]:
    """Positions of the tokens that overlap characters [start, end)."""
    return tuple(i for i, (a, b) in enumerate(spans) if a < end and b > start and b > a)
