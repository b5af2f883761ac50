"""The networks of the judges: a small convolutional eye, a small text reader, and what stands on them.

All shapes are chosen for two processor cores: the image is folded to 32x32x48, the first convolution
takes it to 16x16 at once, and from there the channels are many enough for matrix units (96 and up). A
layer at 32x32 took a third of the time of training. GroupNorm, not batch
statistics, so that an image is judged the same in any company. Inputs are in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLD = 4  # pixels of a side that become channels
GROUPS = 8


@dataclass(frozen=True)
class EyeShape:
    """Channels and residual blocks at 16x16 and at 8x8, and what comes out."""

    channels: tuple[int, int]
    blocks: tuple[int, int] = (2, 2)
    queries: int = 6
    features: int = 256


@dataclass(frozen=True)
class ReaderShape:
    """A transformer over the tokens of a caption."""

    vocabulary: int
    context: int = 32
    width: int = 128
    layers: int = 2
    heads: int = 4


class Residual(nn.Module):
    """x + f(x), two 3x3 convolutions; starts as the identity."""

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


class Gaze(nn.Module):
    """Pools a feature map by learned queries, each looking at some contents in some places."""

    def __init__(self, channels: int, side: int, queries: int) -> None:
        super().__init__()
        self.content = nn.Conv2d(channels, queries, 1)
        self.place = nn.Parameter(0.1 * torch.randn(queries, side * side))

    def forward(self, x: Tensor) -> Tensor:  # (n, c, side, side) -> (n, queries * c)
        scores = self.content(x).flatten(2) + self.place  # (n, q, side * side)
        weights = scores.float().softmax(-1)
        return torch.einsum("nqs,ncs->nqc", weights, x.flatten(2).float()).flatten(1)


class Eye(nn.Module):
    """Images (n, 3, 128, 128) in [-1, 1] to features (n, features)."""

    def __init__(self, shape: EyeShape) -> None:
        super().__init__()
        middle, coarse = shape.channels
        self.body = nn.Sequential(
            nn.PixelUnshuffle(FOLD),
            *_down(3 * FOLD * FOLD, middle),
            *(Residual(middle) for _ in range(shape.blocks[0])),
            *_down(middle, coarse),
            *(Residual(coarse) for _ in range(shape.blocks[1])),
        )
        self.gaze = Gaze(coarse, 8, shape.queries)
        self.out = nn.Linear(shape.queries * coarse, shape.features)

    def cells(self, pictures: Tensor) -> Tensor:
        """Features by place (n, channels, 8, 8)."""
        out: Tensor = self.body(pictures.contiguous(memory_format=torch.channels_last))
        return out

    def whole(self, cells: Tensor) -> Tensor:
        """Features of the whole image (n, features) from those by place."""
        return F.gelu(self.out(self.gaze(cells)))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.whole(self.cells(pictures))


def _down(before: int, after: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
    return conv, nn.GroupNorm(GROUPS, after), nn.ReLU()


class ReaderLayer(nn.Module):
    """Self-attention in both directions and a two-layer network, both behind a LayerNorm."""

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


class Reader(nn.Module):
    """Token ids (n, context) to features (n, width): the mean over the caption's own tokens."""

    def __init__(self, shape: ReaderShape, end: int) -> None:
        super().__init__()
        self.end = end
        self.words = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Parameter(0.02 * torch.randn(shape.context, shape.width))
        self.layers = nn.ModuleList(ReaderLayer(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        nn.init.normal_(self.words.weight, std=0.05)

    def forward(self, ids: Tensor) -> Tensor:
        is_end = ids == self.end
        padding = is_end.cumsum(1) > is_end.long()  # everything behind the first end token
        x = self.words(ids) + self.places
        for layer in self.layers:
            x = layer(x, padding)
        own = (~padding)[..., None]
        mean: Tensor = (self.norm(x).float() * own).sum(1) / own.sum(1)
        return mean


class JudgeNet(nn.Module):
    """Two towers into one space of unit vectors, and a likeness of things on the image tower."""

    def __init__(self, eye: EyeShape, reader: ReaderShape, end: int, dimensions: int) -> None:
        super().__init__()
        self.eye = Eye(eye)
        self.reader = Reader(reader, end)
        self.seen = nn.Linear(eye.features, dimensions)
        self.read = nn.Linear(reader.width, dimensions)
        self.like = nn.Linear(eye.features, dimensions)

    def image(self, features: Tensor) -> Tensor:
        """Unit vectors (n, dimensions) of the eye's features: what the whole image shows."""
        return F.normalize(self.seen(features).float(), dim=-1)

    def likeness(self, features: Tensor) -> Tensor:
        """Unit vectors (n, dimensions) of the eye's features: which thing this is."""
        return F.normalize(self.like(features).float(), dim=-1)

    def text(self, ids: Tensor) -> Tensor:
        """Unit vectors (n, dimensions) of token ids (n, context)."""
        return self.joined(self.reader(ids))

    def joined(self, features: Tensor) -> Tensor:
        """Unit vectors (n, dimensions) of the reader's features."""
        return F.normalize(self.read(features).float(), dim=-1)


class ClassifierNet(nn.Module):
    """Scores of every answer of every field, and a likeness of things of its own."""

    def __init__(self, eye: EyeShape, answers: int, dimensions: int) -> None:
        super().__init__()
        self.eye = Eye(eye)
        self.answers = nn.Linear(eye.features, answers)
        self.like = nn.Linear(eye.features, dimensions)

    def likeness(self, features: Tensor) -> Tensor:
        """As `JudgeNet.likeness`, learned apart from it: a second opinion."""
        return F.normalize(self.like(features).float(), dim=-1)
