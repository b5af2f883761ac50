"""Latents to images, or a sentence why not: never a black image in silence.

    too little memory     a batch is decoded image by image, then in the autoencoder's tiles
    numbers that are not  those images are decoded again in float32 (float16 ends at 65,504, which the
    finite                autoencoders of SD 1 and XL pass now and then); if that does not help, NotFinite

What goes well the first time is what the stock pipelines decode, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from minikin.errors import NotFinite
from minikin.generation.tiling import tiled_autoencoder
from minikin.models.base import Base
from minikin.models.memory import ran_out

Tell = Callable[[str], None]


@torch.no_grad()
def pictures(base: Base, latents: Tensor, tell: Tell = lambda text: None) -> list[Image.Image]:
    """Latents (B, C, h, w) to B images; `tell` hears what had to be done otherwise than usual.

    Raises NotFinite, torch.OutOfMemoryError.
    """
    if bad := _not_finite(latents):
        raise NotFinite(
            f"{len(bad)} of {len(latents)} images came out of the model as numbers that are not finite. Try "
            "--dtype float32, a lower guidance, or a smaller weight of the concepts and LoRAs in the prompt."
        )
    pixels = _sparing(base, latents, tell)
    bad = _not_finite(pixels)
    if bad and base.vae.dtype is not torch.float32:
        tell("The autoencoder's numbers were too large for half precision; it decoded again in float32.")
        pixels[bad] = _decoded(base, latents[bad], torch.float32).to(
            pixels.dtype
        )  # the others stay as they are
        bad = _not_finite(pixels)
    if bad:
        raise NotFinite(
            f"{len(bad)} of {len(latents)} images could not be decoded: the autoencoder gave numbers that "
            "are not finite, in float32 too. Its weights are probably damaged: get this base again."
        )
    watermark = getattr(base.pipe, "watermark", None)  # SDXL's, where its library is installed
    if watermark is not None:
        pixels = watermark.apply_watermark(pixels)
    made: list[Image.Image] = base.pipe.image_processor.postprocess(pixels.detach(), output_type="pil")
    return made


def _not_finite(values: Tensor) -> list[int]:
    """Which rows (B, ...) hold a number that is not finite."""
    return (~torch.isfinite(values).flatten(1).all(1)).nonzero().flatten().tolist()


def _sparing(base: Base, latents: Tensor, tell: Tell) -> Tensor:
    """Decoded as a whole, or by one, or in tiles: the first that memory allows."""
    dtype = base.vae.dtype
    upcast = dtype is torch.float16 and base.vae.config.force_upcast  # SDXL's own word for it
    dtype = torch.float32 if upcast else dtype
    made = _tried(lambda: _decoded(base, latents, dtype))
    if made is None and len(latents) > 1:
        tell("Too little memory to decode the batch at once; its images are decoded one by one.")
        made = _tried(lambda: torch.cat([_decoded(base, one, dtype) for one in torch.split(latents, 1)]))
    if made is None:
        tell("Too little memory to decode an image as a whole; it is decoded in tiles.")
        with tiled_autoencoder(base, base.size_px // 2):
            made = torch.cat([_decoded(base, one, dtype) for one in torch.split(latents, 1)])
    return made


def _tried(decode: Callable[[], Tensor]) -> Tensor | None:
    """None when memory ran out; what the attempt held is free again when this returns."""
    try:
        return decode()
    except RuntimeError as e:
        if not ran_out(e):
            raise
        return None


def _decoded(base: Base, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 3, H, W) in about [-1, 1], the autoencoder in this precision for the while."""
    vae = base.vae
    before = vae.dtype
    try:
        if before is not dtype:
            vae.to(dtype)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        given = latents.to(dtype) / vae.config.scaling_factor + shift
        decoded: Tensor = vae.decode(given, return_dict=False)[0]
        return decoded
    finally:
        if before is not dtype:
            vae.to(before)
