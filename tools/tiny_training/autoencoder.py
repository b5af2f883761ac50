"""Stage `autoencoder`: images to 16x16 latents of 16 channels and back, trained on crops around things.

A thing is recognised by its pattern, and patterns are small. So most crops lie around things, pixels
inside things have a larger weight, and things have random patterns (things.py). The norms do not normalise
(neutral.py). The loss is L1 of pixels and of their differences, the squared error and its logarithm, which PSNR
measures, and weak regularisation of the latents. The decoder is trained on noisy latents, so it tolerates
small errors of the diffusion model. The shipped autoencoder was trained otherwise (docs/tiny.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tools.tiny_training import images
from tools.tiny_training.job import Job, adopt, digest, save_part
from tools.tiny_training.neutral import freeze_constant, is_neutral, neutralise
from tools.tiny_training.normalise import normalise
from tools.tiny_training.recipes import Autoencoder
from tools.tiny_training.shards import Shards
from torch import Tensor

from minikin import events
from minikin.training.config import StepContext
from minikin.training.trainer import Losses, Trainer

AROUND = 0.85  # share of crops around a thing
JITTER = 16  # px: largest distance of a crop's middle from the thing's pixel that was sampled
NOISE_RAMP = 500  # steps from no noise to all of it
LATENT_WEIGHT = 1e-4  # of the squared latents in the loss
VISIBLE = 2e-4  # squared error (43 dB) below which differences are not visible


def stage(job: Job) -> Iterator[events.Event]:
    """Train the autoencoder and write it, with normalised latents, to autoencoder/vae."""
    r, device = job.recipe.autoencoder, torch.device(job.device)
    if job.takes("autoencoder"):
        yield events.Note(f"autoencoder: {adopt(job, 'vae', job.vae)}")
        return
    crops = Crops(images.store_of_things(job).complete("images"), r.crop)
    test, masks = split(torch.from_numpy(images.held_out(job, r.held_out)), device)
    torch.manual_seed(r.plan.seed)
    model = _load(str(job.adopted("vae"))) if job.source else new(r, test.shape[-1])
    if is_neutral(model):
        freeze_constant(model)
    model.to(device, memory_format=torch.channels_last)
    facts = {"channels": list(r.channels), "latents": r.latents, "crop": r.crop, "noise": r.noise}
    facts["source"] = digest(job.source / "vae") if job.source else None
    trainer = Trainer(
        job.folder("autoencoder"),
        model,
        job.plan("autoencoder", r.plan),
        device=device,
        facts=facts,
        stage="autoencoder",
    )

    def decoded() -> Tensor:
        with trainer.autocast():
            parts = [model.decode(model.encode(x).latent_dist.mean).sample for x in torch.split(test, 16)]
        return torch.cat(parts).float()

    def evaluate() -> Mapping[str, float]:
        error = ((decoded().clamp(-1, 1) - test) / 2).pow(2).mean(1, keepdim=True)
        inside = (error * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3)).clamp(min=1)
        return {"PSNR": decibel(error.mean((1, 2, 3))), "inside": decibel(inside[masks.any(3).any(2)[:, 0]])}

    yield from trainer.train(
        Loss(trainer, r),
        prepare=crops.batch,
        evaluate=evaluate,
        sample=lambda: before_after(test[:16], decoded()[:16]),
    )
    with trainer.averaged_weights():
        finished, spread = normalise(model, test, trainer.autocast())
        save_part(finished, job.vae)
    yield events.Note(f"autoencoder: written to {job.vae} ({digest(job.vae)}); latents' deviation {spread}")


def build(channels: Sequence[int], latents: int, size: int) -> Any:
    """An AutoencoderKL with one level for each number of channels and diffusers' initial weights.

    The norms have one group, since more groups of few channels would normalise colours away.
    """
    from diffusers import AutoencoderKL

    n = len(channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        latent_channels=latents,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=size,
        scaling_factor=1.0,
    )


def new(r: Autoencoder, size: int) -> Any:
    """An untrained autoencoder with neutral norms."""
    model = build(r.channels, r.latents, size)
    neutralise(model)
    return model


def to_float(pixels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1], channels last."""
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def split(rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows (B, H, W, 4) uint8 as images (B, 3, H, W) in [-1, 1] and masks (B, 1, H, W), 0 or 1."""
    rows = rows.to(device, non_blocking=True)
    return to_float(rows[..., :3]), (rows[..., 3] > 127).float()[:, None]


def decibel(error: Tensor) -> float:
    """Mean PSNR of squared errors (B,) of values in [0, 1]."""
    return float(-10 * error.clamp(min=1e-8).log10().mean())


class Crops:
    """Random crops of images with masks, most of them around things, some mirrored or in other colours."""

    def __init__(self, store: Shards, side: int) -> None:
        self.store, self.side = store, side
        store.shard(0)  # raises the error of a missing or damaged file before the training

    def batch(self, ctx: StepContext) -> Tensor:
        """(B, side, side, 4) uint8."""
        rng = ctx.rng
        rows = self.store[rng.integers(0, len(self.store), ctx.batch_size)]
        return torch.from_numpy(np.stack([self._crop(row, rng) for row in rows]))

    def _crop(self, row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        slack = row.shape[0] - self.side
        inside = np.flatnonzero(row[..., 3])
        if rng.random() < AROUND and len(inside):
            middle = np.array(divmod(int(rng.choice(inside)), row.shape[1]))
            corner = middle - self.side // 2 + rng.integers(-JITTER, JITTER + 1, 2)
        else:
            corner = rng.integers(0, slack + 1, 2)
        y, x = np.clip(corner, 0, slack)
        crop = row[y : y + self.side, x : x + self.side].copy()
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        if rng.random() < 0.3:
            crop = crop[..., [*rng.permutation(3), 3]]
        if rng.random() < 0.05:
            crop[..., :3] = 255 - crop[..., :3]
        return crop


class Loss:
    """Training loss; pixels inside things have a larger weight."""

    def __init__(self, trainer: Trainer, recipe: Autoencoder) -> None:
        self.trainer, self.noise, self.inside = trainer, recipe.noise, recipe.inside
        model: Any = trainer.model
        self.encoder, self.decoder = trainer.compiled(model.encoder), trainer.compiled(model.decoder)
        self.quant, self.post = model.quant_conv, model.post_quant_conv

    def __call__(self, ctx: StepContext, crops: Tensor) -> Losses:
        x, masks = split(crops, self.trainer.device)
        weight = 1 + self.inside * masks
        weight = weight / weight.mean()
        with self.trainer.autocast():
            mean = self.quant(self.encoder(x)).float().chunk(2, 1)[0]
            largest = 2 * self.noise * min(1.0, ctx.step / NOISE_RAMP)
            amount = largest * torch.rand(len(x), 1, 1, 1, device=x.device)
            noise = amount * mean.detach().std((0, 2, 3), keepdim=True) * torch.randn_like(mean)
            y = self.decoder(self.post(mean + noise)).float()
        difference = y - x
        l1 = (difference.abs() * weight).mean()
        edges = (difference.diff(dim=-2).abs() * weight[..., 1:, :]).mean()
        edges = edges + (difference.diff(dim=-1).abs() * weight[..., 1:]).mean()
        squared = (difference.pow(2) * weight).mean((1, 2, 3))
        total = l1 + 0.5 * edges + 0.1 * (squared + VISIBLE).log().mean() + 2 * squared.mean()
        return {"loss": total + LATENT_WEIGHT * mean.pow(2).mean(), "l1": l1, "edges": edges}


def before_after(x: Tensor, y: Tensor) -> Image.Image:
    """Rows of images x and, under each, the decoded images y; both in [-1, 1]."""
    n = min(8, len(x))
    rows = [
        torch.cat(list(part), -1) for i in range(0, len(x) - n + 1, n) for part in (x[i : i + n], y[i : i + n])
    ]
    pixels = torch.cat(rows, -2).float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _load(folder: str) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)
