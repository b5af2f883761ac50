"""Drawing score: subject fidelity without a network, from the subject's masked photos.

`locate` finds the subject by normalised cross-correlation with its masked reference drawings at several
scales, mirrored and not. Inside the mask at the best position, `compare` computes three numbers, at most 1:

    hist  overlap of the colour histograms
    pcc   Pearson correlation of the pixels
    hog   intersection over union of the histograms of oriented gradients, cell by cell

Equal colours in another drawing have a low `pcc` and `hog`, an equal drawing in other colours has a low `hist`,
and an equal drawing in another pattern a low `hog`. The `score` is their geometric mean, so it is low when any
of them is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 12  # of a colour channel; a value between two bin centres is divided between them
CELLS, ORIENTATIONS = 6, 8  # of the gradient histograms: cells along a side, bins of a cell
SCALES = tuple(float(s) for s in np.geomspace(0.45, 1.6, 12))  # of a reference drawing
FINE_SCALES = (0.95, 0.975, 1.0, 1.025, 1.05)  # around the best scale, at full resolution
MIN_SIDE = 16  # px: shorter side of the smallest template


@dataclass(frozen=True)
class Drawing:
    """A subject cut out of one photo: colours (3, h, w) and mask (1, h, w), both in [0, 1]."""

    rgb: Tensor
    mask: Tensor

    @classmethod
    def from_photo(cls, pixels: np.ndarray, mask: np.ndarray) -> Drawing:
        """The masked part of a photo (H, W, 3) uint8; mask (H, W), true or above 127 where the subject is."""
        inside = mask if mask.dtype == bool else mask > 127
        if not inside.any():
            raise ValueError("The mask is empty: no pixel of the photo belongs to the subject.")
        ys, xs = np.nonzero(inside)
        box = (slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1))
        return cls(_tensor(pixels[box]), torch.from_numpy(inside[box]).float()[None])

    @classmethod
    def from_rgba(cls, rgba: np.ndarray) -> Drawing:
        """A drawing (h, w, 4) uint8 whose alpha channel is the mask."""
        return cls.from_photo(rgba[..., :3], rgba[..., 3])

    def resized(self, height: int, width: int, flip: bool = False) -> Drawing:
        """The drawing at another size, mirrored if `flip`; the mask stays binary."""
        rgb = _resize(self.rgb * self.mask, height, width)
        mask = _resize(self.mask, height, width)
        rgb = rgb / mask.clamp(min=1e-3)
        mask = (mask > 0.5).float()
        return Drawing(rgb.flip(-1), mask.flip(-1)) if flip else Drawing(rgb, mask)


@dataclass(frozen=True)
class Match:
    """Similarity of one position of an image to one reference drawing."""

    hist: float
    pcc: float
    hog: float
    box: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, top, right, bottom

    @property
    def score(self) -> float:
        return float((max(self.hist, 0) * max(self.pcc, 0) * max(self.hog, 0)) ** (1 / 3))


def drawing_score(pixels: np.ndarray, references: Sequence[Drawing]) -> Match:
    """The best match of any reference in an image (H, W, 3) uint8; all zeros when there is none.

    The position of each reference is where it correlates best; the match with the highest score is returned.
    """
    image = _tensor(pixels)
    matches = [match for r in references if (match := locate(image, r))]
    return max(matches, key=lambda m: m.score, default=Match(0.0, 0.0, 0.0))


def locate(image: Tensor, drawing: Drawing) -> Match | None:
    """The match where `image` (3, H, W) correlates best with a drawing; None when no scale fits into the image.

    All scales are searched at half the resolution, then those near the best one at full resolution.
    """
    half = F.avg_pool2d(image[None], 2)[0]
    coarse = _best(half, [(drawing, s / 2, flip) for s in SCALES for flip in (False, True)])
    if coarse is None:
        return None
    _, _, (_, scale, flip) = coarse
    fine = _best(image, [(drawing, 2 * scale * s, flip) for s in FINE_SCALES])
    if fine is None:
        return None
    template, (y, x), _ = fine
    h, w = template.mask.shape[-2:]
    return compare(image[:, y : y + h, x : x + w], template.rgb, template.mask, (x, y, x + w, y + h))


def compare(
    image: Tensor, drawing: Tensor, mask: Tensor, box: tuple[int, int, int, int] = (0, 0, 0, 0)
) -> Match:
    """Similarity of two images (3, h, w) in [0, 1] inside a mask (1, h, w)."""
    return Match(_hist(image, drawing, mask), _pcc(image, drawing, mask), _hog(image, drawing, mask), box)


# ---- hist, pcc, hog ----------------------------------------------------------------------------


def _hist(a: Tensor, b: Tensor, mask: Tensor) -> float:
    inside = mask[0] > 0.5
    return float(torch.minimum(_colour_histogram(a[:, inside]), _colour_histogram(b[:, inside])).sum())


def _colour_histogram(rgb: Tensor) -> Tensor:
    """Joint histogram (BINS^3,) of colours (3, N), with trilinear interpolation between bins; sums to 1."""
    position = rgb.clamp(0, 1) * (BINS - 1)
    low = position.floor().clamp(max=BINS - 2)
    part = position - low
    out = torch.zeros(BINS**3)
    for corner in range(8):
        up = torch.tensor([corner & 1, corner >> 1 & 1, corner >> 2 & 1])[:, None]
        weight = torch.where(up == 1, part, 1 - part).prod(0)
        index = (low + up).long()
        out.index_add_(0, (index[0] * BINS + index[1]) * BINS + index[2], weight)
    return out / max(rgb.shape[1], 1)


def _pcc(a: Tensor, b: Tensor, mask: Tensor) -> float:
    """Correlation over pixels and channels, each channel about its mean."""
    inside = mask[0] > 0.5
    x, y = a[:, inside], b[:, inside]
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    norm = (x.pow(2).sum() * y.pow(2).sum()).sqrt()
    return float((x * y).sum() / norm) if norm > 1e-6 else 0.0


def _hog(a: Tensor, b: Tensor, mask: Tensor) -> float:
    """Intersection over union of oriented-gradient histograms in CELLS x CELLS cells, unnormalised."""
    x, y = _gradients(a, mask), _gradients(b, mask)
    union = torch.maximum(x, y).sum()
    return float(torch.minimum(x, y).sum() / union) if union > 0 else 0.0


def _gradients(rgb: Tensor, mask: Tensor) -> Tensor:
    """Mean gradient strength (ORIENTATIONS, CELLS, CELLS) inside the mask, of the strongest channel."""
    p = F.pad(rgb[None], (1, 1, 1, 1), mode="replicate")[0]
    dx = p[:, 1:-1, 2:] - p[:, 1:-1, :-2]
    dy = p[:, 2:, 1:-1] - p[:, :-2, 1:-1]
    strength, channel = (dx.pow(2) + dy.pow(2)).max(0)
    dx, dy = (d.gather(0, channel[None])[0] for d in (dx, dy))
    inner = -F.max_pool2d(-mask[None], 3, 1, 1)[0, 0]  # gradients at the outline depend on the background
    angle = torch.atan2(dy, dx).remainder(torch.pi) / torch.pi * ORIENTATIONS
    low = angle.floor()
    part = angle - low
    strength = strength.sqrt() * inner
    index = low.long() % ORIENTATIONS
    maps = F.one_hot(index, ORIENTATIONS) * (1 - part)[..., None]
    maps = maps + F.one_hot((index + 1) % ORIENTATIONS, ORIENTATIONS) * part[..., None]
    maps = (maps * strength[..., None]).permute(2, 0, 1)
    return F.adaptive_avg_pool2d(maps, CELLS)


# ---- the search ----------------------------------------------------------------------------------

Candidate = tuple[Drawing, float, bool]  # reference, scale, mirrored


def _best(image: Tensor, candidates: Sequence[Candidate]) -> tuple[Drawing, tuple[int, int], Candidate] | None:
    """The candidate with the highest correlation: its template, top left corner (y, x), and the candidate."""
    height, width = image.shape[-2:]
    templates = []
    for drawing, scale, flip in candidates:
        h, w = (round(side * scale) for side in drawing.mask.shape[-2:])
        if min(h, w) >= MIN_SIDE // 2 and h <= height and w <= width:
            templates.append((drawing.resized(h, w, flip), (drawing, scale, flip)))
    if not templates:
        return None
    values = _correlations(image, [t for t, _ in templates])
    k = int(values.flatten(1).amax(1).argmax())
    y, x = divmod(int(values[k].argmax()), width)
    return templates[k][0], (y, x), templates[k][1]


def _correlations(image: Tensor, templates: Sequence[Drawing]) -> Tensor:
    """Masked normalised cross-correlation (T, H, W) by top left corner; -1 where a template does not fit.

    By FFT after Padfield, "Masked object registration in the Fourier domain" (2012), with an unmasked image.
    """
    height, width = image.shape[-2:]
    size = (2 * height, 2 * width)
    rgb, mask = torch.zeros(len(templates), 3, height, width), torch.zeros(len(templates), 1, height, width)
    fits = torch.zeros(len(templates), height, width, dtype=torch.bool)
    for k, t in enumerate(templates):
        h, w = t.mask.shape[-2:]
        centred = t.rgb - (t.rgb * t.mask).sum((1, 2), keepdim=True) / t.mask.sum().clamp(min=1)
        rgb[k, :, :h, :w], mask[k, :, :h, :w] = centred * t.mask, t.mask
        fits[k, : height - h + 1, : width - w + 1] = True
    spectrum = torch.fft.rfft2(torch.cat([image, image.pow(2)]), s=size)

    def correlate(signal: Tensor, kernel: Tensor) -> Tensor:
        product = signal * torch.fft.rfft2(kernel, s=size).conj()
        out: Tensor = torch.fft.irfft2(product, s=size)[..., :height, :width]
        return out

    cross = correlate(spectrum[:3], rgb).sum(1)
    sums = correlate(spectrum, mask)  # (T, 6, H, W): of the values and of their squares
    area = mask.sum((1, 2, 3)).clamp(min=1)[:, None, None]
    variance = (sums[:, 3:] - sums[:, :3].pow(2) / area[:, None]).clamp(min=0).sum(1)
    norm = (variance * rgb.pow(2).sum((1, 2, 3))[:, None, None]).sqrt()
    return torch.where(fits & (norm > 1e-3 * area), cross / norm.clamp(min=1e-6), -torch.ones(()))


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.tensor(pixels).permute(2, 0, 1).float() / 255


def _resize(x: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x[None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
