"""The judge: images and captions as vectors in one space, and things as vectors of their own.

    judge = Judge.open()
    judge.image(images) @ judge.text(captions).T     how well each caption fits each image
    judge.likeness(images) @ judge.likeness(photos).T  whether the same thing is in them

Two contrastive towers as in CLIP (Radford et al. 2021, arXiv:2103.00020), trained on the sticker
world alone, so they judge nothing but its images. `likeness` is a third projection that learned to
find the same drawing in the same look again, in other scenes, among lookalikes. With masks it looks
at the masked thing alone; without, at the main thing of the image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minikin.errors import AssetError
from minikin.tiny.encoders import weights
from minikin.tiny.encoders.network import EyeShape, JudgeNet, ReaderShape
from minikin.tiny.encoders.preprocess import Masks, Pictures, as_batch, in_chunks

KIND = "judge"
END = "<|endoftext|>"
CONTEXT = 32  # tokens of a caption; longer ones are cut


class Tokens:
    """Captions to token ids (n, context) by the tokenizer of the embedded base, or of another folder."""

    def __init__(self, folder: Path | None = None) -> None:
        from tokenizers import Tokenizer

        folder = folder or Path(str(resources.files("minikin.tiny") / "weights" / "tokenizer"))
        path = folder / "tokenizer.json"
        try:
            data = path.read_bytes()
            self._tokenizer = Tokenizer.from_buffer(data)
        except Exception as e:  # the reader of tokenizers raises bare Exceptions
            raise AssetError(f"The tokenizer {path} cannot be read ({e}). {weights.REMEDY}") from e
        self.digest = _digest(data)
        self.size: int = self._tokenizer.get_vocab_size()
        end = self._tokenizer.token_to_id(END)
        if end is None:
            raise AssetError(f"The tokenizer {path} has no token {END}. {weights.REMEDY}")
        self.end: int = end
        self.context = CONTEXT
        self._tokenizer.enable_truncation(self.context)
        self._tokenizer.enable_padding(length=self.context, pad_id=self.end, pad_token=END)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        ids = [e.ids for e in self._tokenizer.encode_batch(list(captions))]
        return torch.tensor(ids, dtype=torch.long).view(len(captions), self.context)


def _digest(data: bytes) -> str:
    """Of the vocabulary and the merges alone: libraries write the rest in their own ways."""
    model = json.loads(data)["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    text = json.dumps([sorted(model["vocab"].items()), merges])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Judge:
    """Image and text tower; every method returns unit vectors (n, d), float32."""

    def __init__(self, net: JudgeNet, tokens: Tokens) -> None:
        self.net, self.tokens = net, tokens

    @classmethod
    def open(cls, path: Path | None = None, tokenizer: Path | None = None) -> Judge:
        """The embedded judge, or one from a file. Raises AssetError when a file is missing or damaged."""
        path = path or weights.embedded(KIND)
        tensors, facts = weights.read(path, KIND)
        tokens = Tokens(tokenizer)
        if facts["tokenizer"] != tokens.digest:
            raise AssetError(
                f"{path} was trained with another tokenizer ({facts['tokenizer']}, here {tokens.digest}); its "
                f"words would mean other things. {weights.REMEDY}"
            )
        eye, reader = EyeShape(**facts["eye"]), ReaderShape(**facts["reader"])
        net = JudgeNet(eye, reader, tokens.end, facts["dimensions"])
        weights.fill(path, net, tensors)
        return cls(net.eval().requires_grad_(False), tokens)

    @property
    def device(self) -> torch.device:
        return self.net.seen.weight.device

    @torch.no_grad()
    def image(self, pictures: Pictures) -> Tensor:
        """What the images show."""
        return in_chunks(as_batch(pictures), self.device, lambda x: self.net.image(self.net.eye(x)))

    @torch.no_grad()
    def likeness(self, pictures: Pictures, masks: Masks | None = None) -> Tensor:
        """Which thing is in the images; where a mask is given, only what is inside it counts."""
        return in_chunks(as_batch(pictures, masks), self.device, lambda x: self.net.likeness(self.net.eye(x)))

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Tensor:
        """What the captions say."""
        return self.net.text(self.tokens(captions).to(self.device)).cpu()

    def fit(self, pictures: Pictures, captions: Sequence[str]) -> Tensor:
        """Cosine of every image with every caption (images, captions)."""
        return self.image(pictures) @ self.text(captions).T


def facts_of(eye: EyeShape, reader: ReaderShape, dimensions: int, tokens: Tokens, world: str) -> dict[str, Any]:
    """What a judge's file says of itself."""
    facts = {"world": world, "eye": asdict(eye), "reader": asdict(reader), "dimensions": dimensions}
    return weights.as_json({**facts, "tokenizer": tokens.digest})
