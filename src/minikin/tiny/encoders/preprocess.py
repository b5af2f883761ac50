"""Images as the judges take them: any of the usual kinds in, (n, 3, 128, 128) in [-1, 1] out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minikin.errors import BadPhoto
from minikin.tiny.world import RESOLUTION

CHUNK = 64  # images judged at once
BLANK = 128 / 127.5 - 1  # the grey in place of a masked background

Pictures = Sequence[Image.Image] | Sequence[np.ndarray] | np.ndarray | Tensor
Masks = Sequence[np.ndarray | None] | np.ndarray


def as_batch(pictures: Pictures, masks: Masks | None = None) -> Tensor:
    """Images (n, 3, 128, 128) float32 in [-1, 1]; where a mask (h, w) is 0 they are grey.

    A tensor must be (n, 3, h, w) in [-1, 1] already, as an autoencoder decodes; arrays are (h, w, 3)
    uint8 each. Other sizes are resized. Raises BadPhoto for anything else.
    """
    if isinstance(pictures, Tensor):
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise BadPhoto(f"Expected images (n, 3, h, w) in [-1, 1], got {tuple(pictures.shape)}.")
        batch = pictures.float()
        if batch.shape[-2:] != (RESOLUTION, RESOLUTION):
            batch = torch.nn.functional.interpolate(
                batch, size=(RESOLUTION, RESOLUTION), mode="bilinear", antialias=True
            )
    elif len(pictures):
        batch = torch.stack([_one(p) for p in pictures])
    else:
        batch = torch.zeros(0, 3, RESOLUTION, RESOLUTION)
    return batch if masks is None else _blank(batch, masks)


def in_chunks(batch: Tensor, device: torch.device, judge: Callable[[Tensor], Tensor]) -> Tensor:
    """The judgement of all images, a few at a time on the device; the answer is on the CPU, float32."""

    if not len(batch):  # only the shape of the answer
        return judge(torch.zeros(1, *batch.shape[1:], device=device))[:0].cpu()
    return torch.cat([judge(chunk.to(device)).float().cpu() for chunk in torch.split(batch, CHUNK)])


def _one(picture: Image.Image | np.ndarray) -> Tensor:
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
            raise BadPhoto(f"Expected an image (h, w, 3) of uint8, got {picture.shape} of {picture.dtype}.")
        picture = Image.fromarray(picture)
    picture = picture.convert("RGB")
    if picture.size != (RESOLUTION, RESOLUTION):
        picture = picture.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 127.5 - 1


def _blank(batch: Tensor, masks: Masks) -> Tensor:
    if len(masks) != len(batch):
        raise BadPhoto(f"{len(batch)} images but {len(masks)} masks: give one for each, or None in its place.")
    out = batch.clone()
    for picture, mask in zip(out, masks, strict=True):
        if mask is None:
            continue
        kept = Image.fromarray(np.asarray(mask) > 0.5).resize(
            (RESOLUTION, RESOLUTION), Image.Resampling.NEAREST
        )
        picture[:, ~torch.from_numpy(np.asarray(kept).copy())] = BLANK
    return out
