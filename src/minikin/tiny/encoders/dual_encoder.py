"""Dual encoder of the sticker world: images and captions as vectors in one space, subjects in another.

    encoder = DualEncoder.open()
    encoder.encode_images(images) @ encoder.encode_texts(captions).T   how well each caption fits each image
    encoder.encode_subjects(images) @ encoder.encode_subjects(photos).T   whether they show the same thing

An image encoder and a text encoder, trained contrastively as in CLIP (Radford et al. 2021,
arXiv:2103.00020) on the sticker world alone, so they are meaningful for its images only. `encode_subjects` is a
third projection, trained to recognise the same drawing in the same look in other scenes, among hard
negatives. With masks it encodes the masked thing alone; without, the main thing of the image.
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
from minikin.tiny.encoders.network import DualEncoderNet, ImageEncoderShape, TextEncoderShape
from minikin.tiny.encoders.preprocess import Images, Masks, as_batch, in_chunks

KIND = "judge"  # word: kind in the headers and name of the weight files since format 1
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
    """Hash of vocabulary and merges; the rest of the file differs between versions of libraries."""
    model = json.loads(data)["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    text = json.dumps([sorted(model["vocab"].items()), merges])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class DualEncoder:
    """Image and text encoder. Every method returns unit vectors (n, d), float32 on the CPU."""

    def __init__(self, net: DualEncoderNet, tokens: Tokens) -> None:
        self.net, self.tokens = net, tokens

    @classmethod
    def open(cls, path: Path | None = None, tokenizer: Path | None = None) -> DualEncoder:
        """Open the embedded encoder, or one from a file. Raises AssetError for a missing or damaged file."""
        path = path or weights.embedded(KIND)
        tensors, facts = weights.read(path, KIND)
        tokens = Tokens(tokenizer)
        if facts["tokenizer"] != tokens.digest:
            raise AssetError(
                f"{path} was trained with another tokenizer ({facts['tokenizer']}, here {tokens.digest}); its "
                f"words would mean other things. {weights.REMEDY}"
            )
        image, text = ImageEncoderShape(**facts["eye"]), TextEncoderShape(**facts["reader"])
        net = DualEncoderNet(image, text, tokens.end, facts["dimensions"])
        weights.fill(path, net, tensors)
        return cls(net.eval().requires_grad_(False), tokens)

    @property
    def device(self) -> torch.device:
        return self.net.image_projection.weight.device

    @torch.no_grad()
    def encode_images(self, images: Images) -> Tensor:
        """Vectors of whole images, to be compared with captions."""
        return in_chunks(as_batch(images), self.device, lambda x: self.net.image(self.net.image_encoder(x)))

    @torch.no_grad()
    def encode_subjects(self, images: Images, masks: Masks | None = None) -> Tensor:
        """Vectors of the subjects of images; with a mask only the pixels inside it count."""
        batch = as_batch(images, masks)
        return in_chunks(batch, self.device, lambda x: self.net.subject(self.net.image_encoder(x)))

    @torch.no_grad()
    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """Vectors of captions, to be compared with whole images."""
        return self.net.text(self.tokens(captions).to(self.device)).cpu()

    def fit(self, images: Images, captions: Sequence[str]) -> Tensor:
        """Cosine similarity of every image with every caption (images, captions)."""
        return self.encode_images(images) @ self.encode_texts(captions).T


def facts_of(
    image: ImageEncoderShape, text: TextEncoderShape, dimensions: int, tokens: Tokens, world: str
) -> dict[str, Any]:
    """The header of a dual encoder's weight file; keys as in format 1."""
    facts = {"world": world, "eye": asdict(image), "reader": asdict(text), "dimensions": dimensions}
    return weights.as_json({**facts, "tokenizer": tokens.digest})
