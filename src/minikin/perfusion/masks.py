"""Subject masks for the training loss, so that a concept does not learn backgrounds.

Mask kind "attention" averages the base's cross-attention to the category's word over noise levels and needs
no other weights. Kind "clipseg" runs CLIPSeg if its weights are on this machine. A mask that comes with a
photo (alpha channel or masks/ folder) takes precedence over both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minikin.errors import NoNetwork
from minikin.images.photos import Fit
from minikin.models.attention import packed_layers
from minikin.models.base import Base
from minikin.models.loading.lock import opening
from minikin.models.loading.registry import models_folder
from minikin.models.text import Encoded
from minikin.perfusion.key_lock import prompt_for
from minikin.recipes import MaskKind

LEVELS = (300, 500, 700)  # positions in the noise schedule at which attention is recorded
BATCH = 8  # photos per call of the U-Net


@torch.no_grad()
def attention_masks(base: Base, latents: Tensor, category: str, seed: int = 0) -> Tensor:
    """Soft masks (B, h, w) in [0, 1] at latent size, from the base's cross-attention.

    latents  (B, C, h, w)
    The attention to the category's last token is compared with the attention to the tokens before it,
    averaged over layers (all but the coarsest) and noise levels, smoothed, and stretched so that the
    background is near 0 and the subject near 1.
    """
    encoded = base.encode([prompt_for("a photo of {}", "x", category)])
    position = encoded.positions[0][0][-1]
    kv = base.pack(encoded.e)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    masks = []
    for i in range(0, len(latents), BATCH):
        x0, eps = latents[i : i + BATCH], noise[i : i + BATCH]
        n, h, w = len(x0), *latents.shape[-2:]
        total = torch.zeros(n, h, w, device=latents.device)
        for level in LEVELS:
            t = base.schedule.timesteps(torch.full((n,), level, device=latents.device))
            x_t = base.schedule.noised(x0, eps, t)
            for weights in _attention_maps(base, x_t, t, kv.expand(n, -1, -1), encoded):
                total += _share(weights, position, (h, w))
        masks.append(_stretched(total))
    return torch.cat(masks)


def image_mask(base: Base, image: Image.Image, category: str) -> np.ndarray:
    """Subject mask (H, W) in [0, 1] of a generated image, from the base's attention."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None]
    mask = attention_masks(base, base.to_latents(pixels.float() / 127.5 - 1).float(), category)
    size = (image.height, image.width)
    return F.interpolate(mask[None].float().cpu(), size, mode="bilinear")[0, 0].numpy()


def proposed_mask(base: Base, photo: Image.Image, category: str) -> Image.Image:
    """Subject mask (mode "L") of a photo of any size; its longer side is that of the base's images."""
    scale, multiple = base.size_px / max(photo.size), base.size_multiple
    size = [max(multiple, round(side * scale / multiple) * multiple) for side in photo.size]
    mask = image_mask(base, photo.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS), category)
    return Image.fromarray((mask * 255).round().astype(np.uint8))


def _share(weights: Tensor, position: int, size: tuple[int, int]) -> Tensor:
    """Share (B, h, w) of a token's attention in the attention to it and to the tokens before it.

    weights  (B, positions, N), mean over heads
    size     (h, w)
    """
    h, w = size
    b, n, _ = weights.shape
    side = round((n * h / w) ** 0.5)
    if side * round(n / side) != n or n < h * w / 16:
        return torch.zeros(b, h, w, device=weights.device)  # the coarsest maps hardly localize
    to_token = weights[..., position]
    mean = weights[..., 1 : position + 1].mean(-1) + 1e-6
    share = (to_token / (to_token + mean)).view(b, 1, side, n // side)
    return F.interpolate(share, size, mode="bilinear", align_corners=False)[:, 0]


def _attention_maps(base: Base, noisy: Tensor, t: Tensor, kv: Tensor, encoded: Encoded) -> list[Tensor]:
    layers = packed_layers(base.denoiser)
    store: list[Tensor] = []
    mask = encoded.mask if encoded.mask is None else encoded.mask.expand(len(noisy), -1)
    for layer in layers:
        layer.record = store
    try:
        base.predict(noisy.to(base.dtype), t, kv, pooled=encoded.pooled, mask=mask)
    finally:
        for layer in layers:
            layer.record = None
    return store


def _stretched(total: Tensor) -> Tensor:
    smooth = F.avg_pool2d(total[:, None], 3, 1, 1, count_include_pad=False)[:, 0].flatten(1)
    low = smooth.quantile(0.25, dim=1, keepdim=True)
    high = smooth.quantile(0.95, dim=1, keepdim=True)
    return ((smooth - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).view_as(total)


def clipseg_masks(pixels: Sequence[np.ndarray], category: str, latent_hw: tuple[int, int]) -> Tensor:
    """Soft masks (B, h, w) from CLIPSeg (ViT-B/16, rd64 refined): sigmoid over its per-image maximum.

    Raises NoNetwork when its weights are not on this machine.
    """
    folder = models_folder() / "clipseg"
    if not (folder / "config.json").is_file():
        raise NoNetwork(
            "--mask clipseg needs the weights of CLIPSeg (600 MB, Apache-2.0), which are not on this "
            "machine. Fetch them with `minikin models pull clipseg`, or use --mask attention."
        )
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    processor = CLIPSegProcessor.from_pretrained(str(folder), local_files_only=True)
    with opening():
        model = CLIPSegForImageSegmentation.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True
        ).eval()
    out = []
    for image in pixels:
        inputs = processor(text=[category], images=[Image.fromarray(image)], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
            p = logits.sigmoid().view(1, 1, *logits.shape[-2:])
        p = F.interpolate(p / p.amax().clamp(min=1e-6), latent_hw, mode="bilinear", antialias=True)
        out.append(p[0, 0])
    return torch.stack(out)


def subject_masks(base: Base, fits: Sequence[Fit], latents: Tensor, category: str, kind: MaskKind) -> Tensor:
    """Masks (B, h, w) for the loss; a mask that comes with a photo takes precedence over `kind`."""
    h, w = latents.shape[-2:]
    if kind == "none" or all(f.mask is not None for f in fits):
        masks = torch.ones(len(latents), h, w)
    elif kind == "attention":
        masks = attention_masks(base, latents, category).cpu()
    else:
        masks = clipseg_masks([f.pixels for f in fits], category, (h, w))
    for i, f in enumerate(fits):
        photo_mask = f.valid if f.mask is None else f.mask * f.valid
        covered = F.interpolate(torch.from_numpy(photo_mask)[None, None], (h, w), mode="area")[0, 0]
        masks[i] = covered if f.mask is not None else masks[i] * covered
    return masks


def overlay_sheet(pixels: Sequence[np.ndarray], masks: Tensor) -> Image.Image:
    """Contact sheet for the user to check: the photos, and below them the photos with red where masked out."""
    side = pixels[0].shape[0]
    sheet = Image.new("RGB", (side * len(pixels), side * 2), "white")
    for i, (image, mask) in enumerate(zip(pixels, masks, strict=True)):
        m = F.interpolate(mask[None, None].float(), (side, side), mode="bilinear")[0, 0].numpy()[..., None]
        dim = image * m + (1 - m) * (0.35 * image + np.array([120, 20, 30]))
        sheet.paste(Image.fromarray(image), (i * side, 0))
        sheet.paste(Image.fromarray(dim.clip(0, 255).astype(np.uint8)), (i * side, side))
    return sheet
