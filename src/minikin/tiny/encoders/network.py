"""Networks of the sticker world's encoders: a convolutional image encoder, a small text encoder, projections.

The shapes are chosen for two processor cores: the image is folded to 32x32x48, the first convolution
reduces it to 16x16, and from there on there are channels enough for matrix units (96 and up). A layer at
32x32 took a third of the training time. GroupNorm, not BatchNorm, makes an image's vector independent of
its batch. Images are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLD = 4  # pixels of a side that become channels
GROUPS = 8


@dataclass(frozen=True)
class ImageEncoderShape:
    """Channels and residual blocks at 16x16 and at 8x8, queries of the pooling, features of the output."""

    channels: tuple[int, int]
    blocks: tuple[int, int] = (2, 2)
    queries: int = 6
    features: int = 256


@dataclass(frozen=True)
class TextEncoderShape:
    """A transformer over the tokens of a caption."""

    vocabulary: int
    context: int = 32
    width: int = 128
    layers: int = 2
    heads: int = 4


def keep_tensor_names(module: nn.Module, names: Mapping[str, str]) -> None:
    """Store submodules in state dicts under other names, those of existing weight files and checkpoints.

    names  attribute of the module -> name in state dicts
    """

    def rename(state: dict[str, Any], prefix: str, names: Mapping[str, str]) -> None:
        items = list(state.items())
        state.clear()
        for key, value in items:
            if key.startswith(prefix):
                head, dot, rest = key.removeprefix(prefix).partition(".")
                key = f"{prefix}{names.get(head, head)}{dot}{rest}"
            state[key] = value

    back = {stored: attribute for attribute, stored in names.items()}
    hooks: Any = module  # their registration has no types
    hooks.register_state_dict_post_hook(lambda _, state, prefix, __: rename(state, prefix, names))
    hooks.register_load_state_dict_pre_hook(lambda _, state, prefix, *__: rename(state, prefix, back))


class Residual(nn.Module):
    """Residual block x + f(x) of two 3x3 convolutions; starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.scale = nn.GroupNorm(GROUPS, channels)
        nn.init.zeros_(self.scale.weight)

    def forward(self, x: Tensor) -> Tensor:  # (n, c, h, w)
        inner: Tensor = self.scale(self.second(F.relu(self.norm(self.first(x)))))
        return F.relu(x + inner)


class AttentionPooling(nn.Module):
    """Pools a feature map by learned queries, each with weights by content and by position."""

    def __init__(self, channels: int, side: int, queries: int) -> None:
        super().__init__()
        self.content = nn.Conv2d(channels, queries, 1)
        self.place = nn.Parameter(0.1 * torch.randn(queries, side * side))

    def forward(self, x: Tensor) -> Tensor:  # (n, c, side, side) -> (n, queries * c)
        scores = self.content(x).flatten(2) + self.place  # (n, q, side * side)
        weights = scores.float().softmax(-1)
        return torch.einsum("nqs,ncs->nqc", weights, x.flatten(2).float()).flatten(1)


class ImageEncoder(nn.Module):
    """Images (n, 3, 128, 128) in [-1, 1] to features (n, features)."""

    def __init__(self, shape: ImageEncoderShape) -> None:
        super().__init__()
        middle, coarse = shape.channels
        self.body = nn.Sequential(
            nn.PixelUnshuffle(FOLD),
            *_down(3 * FOLD * FOLD, middle),
            *(Residual(middle) for _ in range(shape.blocks[0])),
            *_down(middle, coarse),
            *(Residual(coarse) for _ in range(shape.blocks[1])),
        )
        self.pooling = AttentionPooling(coarse, 8, shape.queries)
        self.out = nn.Linear(shape.queries * coarse, shape.features)
        keep_tensor_names(self, {"pooling": "gaze"})  # word: tensor name in files since format 1

    def feature_map(self, images: Tensor) -> Tensor:
        """Features by position (n, channels, 8, 8)."""
        out: Tensor = self.body(images.contiguous(memory_format=torch.channels_last))
        return out

    def pooled(self, feature_map: Tensor) -> Tensor:
        """Features of the whole image (n, features)."""
        return F.gelu(self.out(self.pooling(feature_map)))

    def forward(self, images: Tensor) -> Tensor:
        return self.pooled(self.feature_map(images))


def _down(before: int, after: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
    return conv, nn.GroupNorm(GROUPS, after), nn.ReLU()


class TextEncoderLayer(nn.Module):
    """Bidirectional self-attention and a two-layer network, both behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:  # (n, t, width), (n, t) True where padded
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # plain products: the fused attention's backward pass is slow on processors
        scores = (q @ k.transpose(-1, -2)).float() * (width // self.heads) ** -0.5  # (n, heads, t, t)
        weights = scores.masked_fill(padding[:, None, None], -torch.inf).softmax(-1)
        x = x + self.mix((weights.to(v.dtype) @ v).transpose(1, 2).reshape(n, t, width))
        out: Tensor = x + self.mlp(x)
        return out


class TextEncoder(nn.Module):
    """Token ids (n, context) to features (n, width): the mean over the tokens before the padding."""

    def __init__(self, shape: TextEncoderShape, end: int) -> None:
        super().__init__()
        self.end = end
        self.words = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Parameter(0.02 * torch.randn(shape.context, shape.width))
        self.layers = nn.ModuleList(TextEncoderLayer(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        nn.init.normal_(self.words.weight, std=0.05)

    def forward(self, ids: Tensor) -> Tensor:
        is_end = ids == self.end
        padding = is_end.cumsum(1) > is_end.long()  # everything behind the first end token
        x = self.words(ids) + self.places
        for layer in self.layers:
            x = layer(x, padding)
        is_token = (~padding)[..., None]
        mean: Tensor = (self.norm(x).float() * is_token).sum(1) / is_token.sum(1)
        return mean


class DualEncoderNet(nn.Module):
    """Image and text encoder with projections into one space, and a subject projection of image features."""

    def __init__(self, image: ImageEncoderShape, text: TextEncoderShape, end: int, dimensions: int) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder(image)
        self.text_encoder = TextEncoder(text, end)
        self.image_projection = nn.Linear(image.features, dimensions)
        self.text_projection = nn.Linear(text.width, dimensions)
        self.subject_projection = nn.Linear(image.features, dimensions)
        names = {"image_encoder": "eye", "text_encoder": "reader", "image_projection": "seen"}
        keep_tensor_names(self, {**names, "text_projection": "read", "subject_projection": "like"})

    def image(self, features: Tensor) -> Tensor:
        """Unit vectors (n, dimensions) of whole images from image features."""
        return F.normalize(self.image_projection(features).float(), dim=-1)

    def subject(self, features: Tensor) -> Tensor:
        """Unit vectors (n, dimensions) of the subjects from image features."""
        return F.normalize(self.subject_projection(features).float(), dim=-1)

    def text(self, ids: Tensor) -> Tensor:
        """Unit vectors (n, dimensions) of token ids (n, context)."""
        return self.projected_text(self.text_encoder(ids))

    def projected_text(self, features: Tensor) -> Tensor:
        """Unit vectors (n, dimensions) of captions from text features."""
        return F.normalize(self.text_projection(features).float(), dim=-1)


class ClassifierNet(nn.Module):
    """Image encoder with scores of every answer of every field, and a subject projection."""

    def __init__(self, image: ImageEncoderShape, answers: int, dimensions: int) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder(image)
        self.answers = nn.Linear(image.features, answers)
        self.subject_projection = nn.Linear(image.features, dimensions)
        keep_tensor_names(self, {"image_encoder": "eye", "subject_projection": "like"})

    def subject(self, features: Tensor) -> Tensor:
        """As `DualEncoderNet.subject`, trained apart from it, so that each can check the other."""
        return F.normalize(self.subject_projection(features).float(), dim=-1)
