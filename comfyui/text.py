"""ComfyUI's text encoders as Minikin's edit needs them: a concept's tokens, and word vectors there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minikin.errors import BadRecipe, BaseMismatch
from minikin.models.prompt import Prompt
from minikin.models.text import Encoded

ENCODERS = (
    "l",
    "h",
    "g",
)  # ComfyUI's names of CLIP ViT-L, ViT-H and ViT-bigG, in the order of a concept's words
LETTERS = "qxzj"  # words of one token each


class ClipText:
    """A CLIP object of ComfyUI, with the methods that `perfusion` calls on a base."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip
        names = [*clip.tokenize("")]
        if not set(names) <= set(ENCODERS):
            raise BaseMismatch(
                f"This model's text encoders are {', '.join(names)}; concepts for ComfyUI are of Stable "
                "Diffusion 1.x, 2.x and XL, whose text encoders are CLIP. Load a checkpoint of one of these."
            )
        self.names = [name for name in ENCODERS if name in names]

    def word_vectors(self, text: str) -> tuple[Tensor, ...]:
        """Token embeddings of a text, per text encoder (n, d), float32, on the CPU."""
        tokens = self.clip.tokenize(text)
        return tuple(self._rows(name)[self._word(tokens, name)].float().cpu() for name in self.names)

    def count_chunks(self, prompt: Prompt) -> int:
        return sum(len(chunk) for chunk in self._tokens(prompt)[self.names[0]]) // self._window()

    def encode(
        self, prompts: Sequence[Prompt], words: Mapping[str, tuple[Tensor, ...]] | None, chunks: int
    ) -> Encoded:
        """Encodings of prompts of one length (see `minikin.models.text.Encoded`)."""
        each = [self.entries(prompt, words or {})[0][0] for prompt in prompts]
        return each[0]._replace(
            e=torch.cat([one.e for one in each]), positions=tuple(one.positions[0] for one in each)
        )

    def entries(
        self, prompt: Prompt, words: Mapping[str, tuple[Tensor, ...]]
    ) -> list[tuple[Encoded, dict[str, Any]]]:
        """What CLIPTextEncode returns, each entry's tensor as encodings with the positions of concepts.

        words  by concept: word vectors per text encoder (n, d), which replace the category's
        """
        tokens = self._tokens(prompt)
        positions = tuple(self._positions(prompt, k, tokens) for k in range(len(prompt.uses)))
        for use, at in zip(prompt.uses, positions, strict=True):
            for name, vectors in zip(self.names, words.get(use.name, ()), strict=False):
                _replace(tokens[name], at, vectors, use.name)
        out = []
        for e, options in self.clip.encode_from_tokens_scheduled(tokens):
            valid = torch.ones(e.shape[:2], dtype=torch.bool, device=e.device)
            out.append((Encoded(e, options.get("pooled_output"), (positions,), valid), options))
        return out

    def _tokens(self, prompt: Prompt) -> dict[str, list[list[tuple[Any, float]]]]:
        return {
            name: [list(chunk) for chunk in chunks] for name, chunks in self.clip.tokenize(prompt.text).items()
        }

    def _positions(self, prompt: Prompt, k: int, tokens: dict[str, Any]) -> tuple[int, ...]:
        """Token positions of the prompt's use k, over all chunks.

        They are where the tokens change if other words of as many tokens stand there. So weights, embeddings
        and whatever else ComfyUI reads in a prompt stay its own affair.
        """
        use, name = prompt.uses[k], self.names[0]
        word = self._word(self.clip.tokenize(prompt.text[use.start : use.end]), name)
        letters = [c for c in LETTERS if not set(self._word(self.clip.tokenize(c), name)) & set(word)]
        other = " ".join([letters[0]] * len(word))
        changed = self.clip.tokenize(prompt.text[: use.start] + other + prompt.text[use.end :])
        pairs = zip(_flat(tokens[name]), _flat(changed[name]), strict=True)
        at = tuple(i for i, (a, b) in enumerate(pairs) if isinstance(a, int) and a != b)
        if [_flat(tokens[name])[i] for i in at] != word:
            raise BadRecipe(
                f"<{use.name}> cannot be told apart from the words around it. Put spaces around it."
            )
        return at

    def _word(self, tokens: dict[str, Any], name: str) -> list[int]:
        """The tokens of a text without those that begin, end and pad its chunks."""
        empty = _flat(self.clip.tokenize("")[name])
        start, others = empty[0], set(empty[1:])
        return [i for i in _flat(tokens[name])[1:] if i != start and i not in others]

    def _window(self) -> int:
        return len(_flat(self.clip.tokenize("")[self.names[0]]))

    def _rows(self, name: str) -> Tensor:
        encoder = getattr(self.clip.cond_stage_model, f"clip_{name}")
        table: Tensor = encoder.transformer.get_input_embeddings().weight
        return table


def _flat(chunks: list[list[tuple[Any, float]]]) -> list[Any]:
    return [token for chunk in chunks for token, *_ in chunk]


def _replace(chunks: list[list[tuple[Any, float]]], at: tuple[int, ...], vectors: Tensor, name: str) -> None:
    """Put word vectors in place of the tokens at these positions."""
    if len(at) != len(vectors):
        raise BaseMismatch(
            f"The category of concept '{name}' has {len(at)} tokens here and {len(vectors)} where it was "
            "taught: this model's text encoder is another one. Teach the concept on it."
        )
    places = [(c, i) for c, chunk in enumerate(chunks) for i in range(len(chunk))]
    for position, vector in zip(at, vectors, strict=True):
        c, i = places[position]
        chunks[c][i] = (vector, *chunks[c][i][1:])
