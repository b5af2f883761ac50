"""Text encoders of a pipeline: parsed prompts to encodings, with word vectors of concepts in their places.

    ClipText   Stable Diffusion 1, 2, XL and tiny: one or two CLIP models, prompts in windows of 75 tokens
    T5Text     PixArt: one T5 encoder, one window; padding is masked in cross-attention
    GemmaText  SANA: the same with Gemma, which reads an instruction before the prompt

All say where the tokens of a concept's category lie (`Encoded.positions`). The last of them is the token whose
value a concept of mode value changes, as it has read the whole word, in causal encoders (CLIP, Gemma) too.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minikin.errors import BadModelFile, BadRecipe
from minikin.models.families import Family
from minikin.models.prompt import Prompt
from minikin.models.text import (
    MAX_CHUNKS,
    Encoded,
    Tokens,
    apply_emphasis,
    chunk_tokens,
    emphasis,
    hidden_state,
    token_embedding,
    tokenize,
    word_vectors_replaced,
)


class TextEncoders:
    """Tokenizers and text encoders of a pipeline, in pairs.

    window      tokens of a prompt that are read at once, without special ones
    max_chunks  windows that a prompt may fill
    Raises BadModelFile for a pipeline without them.
    """

    window: int
    max_chunks: int
    trained_clip_skip = 1

    def __init__(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        if any(tokenizer is None or model is None for tokenizer, model in pairs):
            raise BadModelFile(
                "This base has no text encoder or tokenizer. Minikin needs them to train word vectors; use the "
                "full pipeline folder, not the denoiser alone."
            )
        self.tokenizers = [tokenizer for tokenizer, _ in pairs]
        self.models = [model for _, model in pairs]
        self._lock = threading.RLock()  # fast tokenizers keep the padding as state

    def encode(
        self, prompts: Sequence[Prompt], words: Mapping[str, Sequence[Tensor]] | None, *, device: torch.device,
        chunks: int = 1, clip_skip: int = 1, second: Sequence[Prompt] | None = None,
    ) -> Encoded:  # fmt: skip
        """Encodings of prompts before the denoiser's projection of them; see `Base.encode`."""
        raise NotImplementedError

    def needed_chunks(self, prompt: Prompt) -> int:
        """Number of windows of tokens that all of a prompt fills."""
        raise NotImplementedError

    def check_clip_skip(self, clip_skip: int, name: str) -> None:
        """Raise BadRecipe for a layer that the text encoder of the base of this name does not have."""
        raise NotImplementedError

    def spelled(self, text: str) -> str:
        """A text as it reaches the tokenizer."""
        return text

    def word(self, text: str) -> str:
        """A word as it is tokenized inside a prompt."""
        return self.spelled(text)

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a text, without special ones."""
        with self._lock:
            return len(self.tokenizers[0](self.word(text), add_special_tokens=False).input_ids)

    def word_vectors(self, text: str) -> tuple[Tensor, ...]:
        """Token embeddings of a text, per text encoder (n, d_k), float32."""
        out = []
        for tokenizer, model in zip(self.tokenizers, self.models, strict=True):
            with self._lock:
                ids = tokenizer(self.word(text), add_special_tokens=False, return_tensors="pt").input_ids[0]
            table = token_embedding(model).weight
            out.append(table[ids.to(table.device)].detach().float().clone())
        return tuple(out)


class ClipText(TextEncoders):
    """CLIP, once, or twice for SDXL: their encodings are joined on the last axis.

    trained_clip_skip  counted from the last layer, the one the U-Net was trained with: 2 for SD 2 and SDXL. SD
                       2's text encoder is stored without the layer after it.
    """

    max_chunks = MAX_CHUNKS

    def __init__(self, pairs: Sequence[tuple[Any, Any]], family: Family) -> None:
        super().__init__(pairs)
        self.is_xl = len(pairs) > 1
        self.trained_clip_skip = 2 if self.is_xl or family.name == "sd2" else 1
        self.window = int(self.tokenizers[0].model_max_length) - 2

    def encode(
        self, prompts: Sequence[Prompt], words: Mapping[str, Sequence[Tensor]] | None, *, device: torch.device,
        chunks: int = 1, clip_skip: int = 1, second: Sequence[Prompt] | None = None,
    ) -> Encoded:  # fmt: skip
        states, pooled, positions, n = [], None, None, self.window + 2
        tokens = None
        weighted = any(p.weights for p in (*prompts, *(second or ())))
        norm, layer = not self.is_xl, self._layer(clip_skip)
        for k, (tokenizer, model) in enumerate(zip(self.tokenizers, self.models, strict=True)):
            texts = second if k and second else prompts
            with self._lock:
                tokens = tokenize(tokenizer, texts, chunks)
            positions = positions or tokens.positions
            replacements = [
                (b * chunks + at[0] // n, tuple(i % n for i in at), words[use.name][k])
                for b, prompt in enumerate(texts)
                for use, at in zip(prompt.uses, tokens.positions[b], strict=True)
                if words and use.name in words
            ]
            with word_vectors_replaced(model, replacements):
                out = model(tokens.ids.to(device), output_hidden_states=not norm or layer > 1)
            state = hidden_state(out, model, layer, norm)
            if weighted:
                state = apply_emphasis(state, emphasis(tokens, texts))
            states.append(state)
            if self.is_xl and k == len(self.models) - 1:
                pooled = out[0][::chunks]  # of the first chunk, as in A1111 and ComfyUI
        e = torch.cat(states, -1).to(device)  # elsewhere under enable_model_cpu_offload
        assert positions is not None
        assert tokens is not None
        eos = (tokens.ids == self.tokenizers[-1].eos_token_id).int().argmax(-1)
        valid = torch.arange(e.shape[1])[None] <= eos[:, None]
        e, valid = (x.reshape(len(prompts), -1, *x.shape[2:]) for x in (e, valid))
        return Encoded(e, pooled, tuple(positions), valid.to(device))

    def needed_chunks(self, prompt: Prompt) -> int:
        with self._lock:
            return max(len(chunk_tokens(tokenizer, prompt)) for tokenizer in self.tokenizers)

    def check_clip_skip(self, clip_skip: int, name: str) -> None:
        layers = min(int(m.config.num_hidden_layers) for m in self.models)
        most = layers + (self.trained_clip_skip - 1 if not self.is_xl else 0)
        if clip_skip > most:
            raise BadRecipe(
                f"clip_skip {clip_skip} asks for a layer that the text encoder of '{name}' does not have: "
                f"it is at most {most}."
            )

    def _layer(self, clip_skip: int) -> int:
        """The layer of a clip skip, counted from the last one there is; never above the trained one."""
        layer = max(clip_skip, self.trained_clip_skip)
        return layer if self.is_xl else layer - self.trained_clip_skip + 1


class T5Text(TextEncoders):
    """T5's encoder: lower-case text in one window of tokens, without a token for the beginning.

    Padding is masked in cross-attention, as in the stock pipelines: `Encoded.mask`.
    """

    max_chunks, kind = 1, "T5"

    def __init__(self, pairs: Sequence[tuple[Any, Any]], family: Family) -> None:
        super().__init__(pairs)
        self.length = family.tokens
        self.window = family.tokens - 1  # and the token of the end

    def encode(
        self, prompts: Sequence[Prompt], words: Mapping[str, Sequence[Tensor]] | None, *, device: torch.device,
        chunks: int = 1, clip_skip: int = 1, second: Sequence[Prompt] | None = None,
    ) -> Encoded:  # fmt: skip
        (tokenizer,), (model,) = self.tokenizers, self.models
        prompts = [self._spelled_prompt(prompt) for prompt in prompts]
        with self._lock:
            tokens = self._tokens(tokenizer, prompts)
        replacements = [
            (b, at, words[use.name][0])
            for b, prompt in enumerate(prompts)
            for use, at in zip(prompt.uses, tokens.positions[b], strict=True)
            if words and use.name in words
        ]
        with word_vectors_replaced(model, replacements):
            e = model(tokens.ids.to(device), attention_mask=tokens.mask.to(device))[0]
        e, tokens = self._read(e, tokens)
        if any(p.weights for p in prompts):
            e = apply_emphasis(e, emphasis(tokens, prompts))
        mask = tokens.mask.to(device)
        return Encoded(e.to(device), None, tuple(tokens.positions), mask.bool(), mask)

    def _tokens(self, tokenizer: Any, prompts: Sequence[Prompt]) -> Tokens:
        return tokenize(tokenizer, prompts, length=self.length)

    def _read(self, e: Tensor, tokens: Tokens) -> tuple[Tensor, Tokens]:
        """Of the encodings (B, N, D), those that the denoiser reads, and their tokens."""
        return e, tokens

    def needed_chunks(self, prompt: Prompt) -> int:
        return max(1, -(-self.count_tokens(prompt.text) // self.window))

    def check_clip_skip(self, clip_skip: int, name: str) -> None:
        if clip_skip > 1:
            raise BadRecipe(
                f"clip_skip {clip_skip} is for CLIP, and the text encoder of '{name}' is {self.kind}: it is at "
                "most 1."
            )

    def spelled(self, text: str) -> str:
        """As the stock pipelines do where beautifulsoup4 and ftfy are not installed."""
        return text.lower().strip()

    def _spelled_prompt(self, prompt: Prompt) -> Prompt:
        """The prompt in the spelling that is tokenized, with its concepts and weights at their places there."""
        text = prompt.text
        before = len(text.lower()) - len(text.lower().lstrip())

        return _moved(prompt, self.spelled(text), lambda at: max(0, len(text[:at].lower()) - before))


class GemmaText(T5Text):
    """Gemma: causal, with a token for the beginning; before the prompt it reads SANA's instruction.

    The denoiser reads the first token and the last `length` - 1, which are those of the prompt: the instruction
    is read by the prompt's tokens alone. Negative prompts have none (SANA, arXiv:2410.10629, section 3.1).

    instruction  text before the prompt, as the stock pipeline of this diffusers has it
    """

    kind = "Gemma"

    def __init__(self, pairs: Sequence[tuple[Any, Any]], family: Family, instruction: str) -> None:
        super().__init__(pairs, family)
        (tokenizer,) = self.tokenizers
        tokenizer.padding_side = "right"  # as the stock pipelines set it at every call
        self.instruction = instruction
        # its last blank joins the prompt's first word; the token of the beginning is in `length`
        self.n_instruction = len(tokenizer(instruction).input_ids) - 2

    def word(self, text: str) -> str:
        return f" {self.spelled(text)}"  # Gemma's tokens begin with the blank before a word

    def _tokens(self, tokenizer: Any, prompts: Sequence[Prompt]) -> Tokens:
        """Of one prompt or several, which are all negative or none."""
        if prompts[0].negative:
            return super()._tokens(tokenizer, prompts)
        n, before = self.n_instruction, len(self.instruction)
        instructed = [_moved(p, self.instruction + p.text, before.__add__) for p in prompts]
        tokens = tokenize(tokenizer, instructed, length=self.length + n, instruction=n)
        spans = [[(max(0, a - before), max(0, b - before)) for a, b in row] for row in tokens.spans]
        return tokens._replace(spans=spans)

    def _read(self, e: Tensor, tokens: Tokens) -> tuple[Tensor, Tokens]:
        first = e.shape[1] - self.window  # of the last tokens that are read
        keep = [0, *range(first, e.shape[1])]
        positions = [tuple(tuple(k - first + 1 for k in at) for at in uses) for uses in tokens.positions]
        spans = [[row[k] for k in keep] for row in tokens.spans]
        return e[:, keep], Tokens(tokens.ids[:, keep], spans, positions, tokens.mask[:, keep])


def _moved(prompt: Prompt, text: str, place: Callable[[int], int]) -> Prompt:
    """The prompt with another text, and its concepts and weights at the places of their characters there."""

    def moved(part: Any) -> Any:
        return replace(part, start=place(part.start), end=place(part.end))

    uses, weights = (tuple(map(moved, parts)) for parts in (prompt.uses, prompt.weights))
    return replace(prompt, text=text, uses=uses, weights=weights)


def text_encoders(pipe: Any, family: Family) -> TextEncoders:
    """The text encoders of a pipeline of this family; raises BadModelFile where it has none."""
    pairs = [(pipe.tokenizer, pipe.text_encoder)]
    if getattr(pipe, "text_encoder_2", None) is not None:
        pairs.append((pipe.tokenizer_2, pipe.text_encoder_2))
    if family.text == "gemma":
        call = inspect.signature(type(pipe).__call__).parameters
        return GemmaText(pairs, family, "\n".join(call["complex_human_instruction"].default))
    return T5Text(pairs, family) if family.text == "t5" else ClipText(pairs, family)
