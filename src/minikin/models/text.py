"""Parsed prompts to the inputs of text encoders: token ids in chunks, token positions of concepts, emphasis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.models.prompt import Prompt

MAX_CHUNKS = 10  # windows of tokens in a prompt; each adds its share to the keys and values of every layer
MIN_MEAN = 1e-4  # of an encoding's root mean square; a smaller mean is rounding


class Encoded(NamedTuple):
    """Text encodings of a batch of prompts.

    e          (B, N, D); N is the window's length times the number of chunks
    pooled     (B, P) of SDXL's second encoder, else None
    positions  per prompt, per concept use: token positions of the concept's word, in order
    valid      (B, N) bool, true from BOS to the first EOS of each chunk
    mask       (B, N) 1 at the tokens that cross-attention reads; None where it reads all
    """

    e: Tensor
    pooled: Tensor | None
    positions: tuple[tuple[tuple[int, ...], ...], ...]
    valid: Tensor
    mask: Tensor | None = None

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


class Tokens(NamedTuple):
    """Token ids of a batch of prompts, each in the same number of chunks.

    ids        (B * chunks, N)
    spans      per row and token, the characters of the prompt it stands for; (0, 0) for special tokens
    positions  per prompt, per concept use: positions in the prompt's concatenated chunks
    mask       (B * chunks, N) 1 for tokens, 0 for padding, as the tokenizer says; all 1 for several chunks
    """

    ids: Tensor
    spans: list[list[tuple[int, int]]]
    positions: list[tuple[tuple[int, ...], ...]]
    mask: Tensor


def tokenize(
    tokenizer: Any, prompts: Sequence[Prompt], chunks: int = 1, *, length: int = 0, instruction: int = 0
) -> Tokens:
    """Token ids of prompts; tokens after the last chunk are left out.

    chunks       windows of the text encoder a prompt fills; shorter ones get empty ones. BREAK counts from 2 on
    length       of the only window, with special tokens; the tokenizer's own by default
    instruction  tokens of `length` that are no part of what was written
    Raises BadRecipe when a concept stands after the last token that is kept.
    """
    if chunks == 1:
        batch = tokenizer(
            [p.text for p in prompts],
            padding="max_length",
            max_length=length or tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
            return_offsets_mapping=True,
        )
        ids, spans = batch.input_ids, [[(a, b) for a, b in row] for row in batch.offset_mapping.tolist()]
        mask = batch.attention_mask
    else:
        rows = [row for p in prompts for row in _rows(tokenizer, chunk_tokens(tokenizer, p), chunks)]
        ids = torch.tensor([[i for i, _, _ in row] for row in rows])
        spans, mask = [[(a, b) for _, a, b in row] for row in rows], torch.ones_like(ids)
    positions = []
    for k, prompt in enumerate(prompts):
        flat = [span for row in spans[k * chunks : (k + 1) * chunks] for span in row]
        of_prompt = tuple(_inside(flat, use.start, use.end) for use in prompt.uses)
        for use, at in zip(prompt.uses, of_prompt, strict=True):
            if not at or flat[at[-1]][1] < use.end:
                n_read = length - 1 - instruction if length else chunks * (tokenizer.model_max_length - 2)
                raise BadRecipe(
                    f"The prompt is longer than the {n_read} tokens that are read, and <{use.name}> lies "
                    "beyond them. Shorten it or name it earlier."
                )
        positions.append(of_prompt)
    return Tokens(ids, spans, positions, mask)


def chunk_tokens(tokenizer: Any, prompt: Prompt) -> list[list[tuple[int, int, int]]]:
    """The prompt's tokens (id, first character, end) in chunks of the text encoder's window, as in A1111.

    BREAK ends a chunk. A concept's tokens stay in one chunk where they fit, because its word is encoded there.
    At least one chunk, which may be empty.
    """
    size = tokenizer.model_max_length - 2
    ends = (*prompt.breaks, len(prompt.text))
    chunks: list[list[tuple[int, int, int]]] = []
    for start, end in zip((0, *prompt.breaks), ends, strict=True):
        text = prompt.text[start:end]
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pairs = zip(out.input_ids, out.offset_mapping, strict=True)
        tokens = [(i, start + a, start + b) for i, (a, b) in pairs]
        chunks += _split(tokens, prompt, size)
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


def _split(tokens: list[tuple[int, int, int]], prompt: Prompt, size: int) -> list[list[tuple[int, int, int]]]:
    """Pieces of at most `size` tokens; a piece ends early where it would cut a concept's word in two."""
    spans = [(a, b) for _, a, b in tokens]
    words = [at for use in prompt.uses if (at := _inside(spans, use.start, use.end))]
    pieces, first = [], 0
    while len(tokens) - first > size:
        end = first + size
        end = next((at[0] for at in words if first < at[0] < end <= at[-1]), end)
        pieces.append(tokens[first:end])
        first = end
    return [*pieces, tokens[first:]]


def _rows(
    tokenizer: Any, pieces: list[list[tuple[int, int, int]]], chunks: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Each chunk with its own BOS, EOS and padding; chunks that are missing are empty ones."""
    n, pad = tokenizer.model_max_length, tokenizer.pad_token_id
    for piece in (pieces + [[]] * chunks)[:chunks]:
        row = [(tokenizer.bos_token_id, 0, 0), *piece, (tokenizer.eos_token_id, 0, 0)]
        yield row + [(pad, 0, 0)] * (n - len(row))


def emphasis(tokens: Tokens, prompts: Sequence[Prompt]) -> Tensor:
    """The attention weight of each token (B * chunks, N), float32."""
    factors = torch.ones(tokens.ids.shape, dtype=torch.float32)
    chunks = len(tokens.ids) // len(prompts)
    for row, spans in enumerate(tokens.spans):
        for w in prompts[row // chunks].weights:
            for position in _inside(spans, w.start, w.end):
                factors[row, position] *= w.value
    return factors


def apply_emphasis(e: Tensor, factors: Tensor) -> Tensor:
    """Emphasis as in A1111: scale the encodings of the weighted tokens, then restore the encoding's mean.

    As there, each text encoder and each chunk has its own mean. The mean is not restored where it is 0, as
    after a text encoder that ends in a plain layer norm.

    e        (B, N, D), of one text encoder; returns the same shape
    factors  (B, N)
    """
    factors = factors.to(e.device)
    scaled = e.float() * factors[..., None]
    emphasized = (factors != 1).any(-1)[:, None, None]
    before, after = (x.mean((1, 2), keepdim=True) for x in (e.float(), scaled))
    least = MIN_MEAN * e.float().square().mean((1, 2), keepdim=True).sqrt()
    has_mean = (before.abs() > least) & (after.abs() > least)
    mean = torch.where(has_mean, before / torch.where(has_mean, after, 1.0), 1.0)
    return torch.where(emphasized, scaled * mean, e.float()).to(e.dtype)


def hidden_state(out: Any, model: Any, layer: int, norm: bool) -> Tensor:
    """The encoding after a layer, counted from the last, which is 1; with the final norm or without it.

    out  the model's output, with hidden states where it is not the last layer with its norm
    """
    if layer == 1 and norm:
        last: Tensor = out[0]
        return last
    state: Tensor = out.hidden_states[-layer]
    if norm:
        state = getattr(model, "text_model", model).final_layer_norm(state)
    return state


def token_embedding(model: Any) -> Any:
    """The layer that looks up token embeddings; T5's encoder has one beside that of the whole model."""
    in_encoder = getattr(getattr(model, "encoder", None), "embed_tokens", None)
    return model.get_input_embeddings() if in_encoder is None else in_encoder


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

    def replace(embedding: Any, _inputs: Any, output: Tensor) -> Tensor:
        out = output.clone()
        scale = getattr(embedding, "embed_scale", torch.ones(()))  # Gemma's embedding multiplies its table
        for b, positions, vectors in replacements:
            if len(positions) != len(vectors):
                raise BadRecipe(
                    f"The concept has {len(vectors)} word vectors, but its category takes "
                    f"{len(positions)} tokens in this prompt. Put a word before it, such as 'the'."
                )
            out[b, list(positions)] = vectors.to(out) * scale.to(out)
        return out

    handle = token_embedding(model).register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _inside(spans: Sequence[Sequence[int]], start: int, end: int) -> tuple[int, ...]:
    """Positions of the tokens that overlap characters [start, end)."""
    return tuple(i for i, (a, b) in enumerate(spans) if a < end and b > start and b > a)
