"""Latents to images, or an error that says why not; never a black image without a word.

    too little memory  a batch is decoded image by image, then in the autoencoder's tiles
    NaN or Inf         those images are decoded again in float32 (float16 ends at 65,504, which the
                       autoencoders of SD 1 and XL pass now and then); if that does not help, NotFinite

Decoding that succeeds at once is the stock pipelines', bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from minikin.errors import NanOrInf
from minikin.generation.tiling import tiled_autoencoder
from minikin.models.base import Base
from minikin.models.memory import is_out_of_memory

Warn = Callable[[str], None]


@torch.no_grad()
def decode(base: Base, latents: Tensor, warn: Warn = lambda text: None) -> list[Image.Image]:
    """Latents (B, C, h, w) to B images; `warn` hears of a second attempt.

    Raises NotFinite, torch.OutOfMemoryError.
    """
    if bad := _not_finite(latents):
        raise NanOrInf(
            f"{len(bad)} of {len(latents)} images came out of the model as NaN or Inf. Try "
            "--dtype float32, a lower guidance, or a smaller weight of the concepts and LoRAs in the prompt."
        )
    pixels = _decode_within_memory(base, latents, warn)
    bad = _not_finite(pixels)
    if bad and base.vae.dtype is not torch.float32:
        warn("The autoencoder's numbers were too large for half precision; it decoded again in float32.")
        again = _decode(base, latents[bad], torch.float32)
        pixels[bad] = again.to(pixels.dtype)  # the others stay as they are
        bad = _not_finite(pixels)
    if bad:
        raise NanOrInf(
            f"{len(bad)} of {len(latents)} images could not be decoded: the autoencoder gave NaN "
            "or Inf, in float32 too. Its weights are probably damaged: get this base again."
        )
    watermark = getattr(base.pipe, "watermark", None)  # SDXL's, where its library is installed
    if watermark is not None:
        pixels = watermark.apply_watermark(pixels)
    images: list[Image.Image] = base.pipe.image_processor.postprocess(pixels.detach(), output_type="pil")
    return images


def _not_finite(values: Tensor) -> list[int]:
    """Which rows of (B, ...) hold NaN or Inf."""
    return (~torch.isfinite(values).flatten(1).all(1)).nonzero().flatten().tolist()


def _decode_within_memory(base: Base, latents: Tensor, warn: Warn) -> Tensor:
    """Pixels, decoded as a batch, one by one, or in tiles: the first that memory allows."""
    dtype = base.vae.dtype
    upcast = dtype is torch.float16 and base.vae.config.get("force_upcast")  # as SDXL's configuration asks
    dtype = torch.float32 if upcast else dtype
    pixels = _unless_out_of_memory(lambda: _decode(base, latents, dtype))
    if pixels is None and len(latents) > 1:
        warn("Too little memory to decode the batch at once; its images are decoded one by one.")
        pixels = _unless_out_of_memory(
            lambda: torch.cat([_decode(base, image, dtype) for image in torch.split(latents, 1)])
        )
    if pixels is None:
        warn("Too little memory to decode an image as a whole; it is decoded in tiles.")
        with tiled_autoencoder(base, base.size_px // 2):
            pixels = torch.cat([_decode(base, image, dtype) for image in torch.split(latents, 1)])
    return pixels


def _unless_out_of_memory(decode: Callable[[], Tensor]) -> Tensor | None:
    """None when memory ran out; the memory of the attempt is free again when this returns."""
    try:
        return decode()
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        return None


def _decode(base: Base, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Latents to pixels (B, 3, H, W) in about [-1, 1], with the autoencoder in this precision."""
    vae = base.vae
    before = vae.dtype
    try:
        if before is not dtype:
            vae.to(dtype)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scaled = latents.to(dtype) / vae.config.scaling_factor + shift
        pixels: Tensor = vae.decode(scaled, return_dict=False)[0]
        return pixels
    finally:
        if before is not dtype:
            vae.to(before)
