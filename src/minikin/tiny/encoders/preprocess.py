"""Preprocessing of the sticker world's encoders: images of the usual kinds to (n, 3, 128, 128) in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minikin.errors import BadPhoto
from minikin.tiny.world import RESOLUTION

CHUNK = 64  # images encoded at once
BLANK = 128 / 127.5 - 1  # the grey in place of a masked background

Images = Sequence[Image.Image] | Sequence[np.ndarray] | np.ndarray | Tensor
Masks = Sequence[np.ndarray | None] | np.ndarray


def as_batch(images: Images, masks: Masks | None = None) -> Tensor:
    """Images (n, 3, 128, 128) float32 in [-1, 1]; where a mask (h, w) is 0 they are grey.

    A tensor must be (n, 3, h, w) in [-1, 1] already, as an autoencoder decodes; arrays are (h, w, 3)
    uint8 each. Other sizes are resized. Raises BadPhoto for anything else.
    """
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3:
            raise BadPhoto(f"Expected images (n, 3, h, w) in [-1, 1], got {tuple(images.shape)}.")
        batch = images.float()
        if batch.shape[-2:] != (RESOLUTION, RESOLUTION):
            batch = torch.nn.functional.interpolate(
                batch, size=(RESOLUTION, RESOLUTION), mode="bilinear", antialias=True
            )
    elif len(images):
        batch = torch.stack([_tensor(image) for image in images])
    else:
        batch = torch.zeros(0, 3, RESOLUTION, RESOLUTION)
    return batch if masks is None else _masked(batch, masks)


def in_chunks(batch: Tensor, device: torch.device, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """`encode` of all images, CHUNK at a time on the device; the result is float32 on the CPU."""
    if not len(batch):  # encode one image for the shape of the result
        return encode(torch.zeros(1, *batch.shape[1:], device=device))[:0].cpu()
    return torch.cat([encode(chunk.to(device)).float().cpu() for chunk in torch.split(batch, CHUNK)])


def _tensor(image: Image.Image | np.ndarray) -> Tensor:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise BadPhoto(f"Expected an image (h, w, 3) of uint8, got {image.shape} of {image.dtype}.")
        image = Image.fromarray(image)
    image = image.convert("RGB")
    if image.size != (RESOLUTION, RESOLUTION):
        image = image.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


def _masked(batch: Tensor, masks: Masks) -> Tensor:
    if len(masks) != len(batch):
        raise BadPhoto(f"{len(batch)} images but {len(masks)} masks: give one for each, or None in its place.")
    out = batch.clone()
    for image, mask in zip(out, masks, strict=True):
        if mask is None:
            continue
        resized = Image.fromarray(np.asarray(mask) > 0.5).resize(
            (RESOLUTION, RESOLUTION), Image.Resampling.NEAREST
        )
        image[:, ~torch.from_numpy(np.asarray(resized).copy())] = BLANK
    return out
