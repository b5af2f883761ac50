"""Stage `autoencoder`: trained without its last level, grown by that level, then the decoder alone.

A factor-16 autoencoder trained from nothing learns badly (docs/tiny.md); a trained factor-8 one with one
more level at the bottom passes it in a few hundred steps. The loss is L1 of pixels and of their
differences, some L2, and weak regularisation of the latents. The decoder is trained on noisy latents, so it
tolerates small errors of the diffusion model; every eighth step it decodes latents averaged 2x2 to pixels
averaged 2x2, which makes latents locally linear. At the end the encoder is frozen and the decoder is trained
with Muon on the mean logarithm of squared errors, which PSNR measures. The latents do not change then, so
a U-Net that was trained on them stays valid.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tools.tiny_training import images
from tools.tiny_training.job import Job, adopt, digest, save_part
from tools.tiny_training.normalise import normalise
from tools.tiny_training.recipes import Autoencoder
from tools.tiny_training.shards import Shards
from torch import Tensor

from minikin import events
from minikin.training.config import StepContext, TrainingConfig
from minikin.training.trainer import Losses, Trainer

POOLED_EVERY, POOLED_FROM = 8, 400  # steps
SHARES = {"first": 0.3, "grown": 0.4, "decoder": 0.3}  # of a budget for all parts
NOISE_RAMP = 500  # steps from nothing to the full noise


def stage(job: Job) -> Iterator[events.Event]:
    """Train all parts and write the normalised autoencoder to autoencoder/vae."""
    r = job.recipe.autoencoder
    if job.takes("autoencoder"):
        yield events.Note(f"autoencoder: {adopt(job, 'vae', job.vae)}")
        return
    device = torch.device(job.device)
    scenes = Scenes([store.complete("images") for _, store in images.stores(job)])
    held = to_float(torch.from_numpy(images.held_out(job, r.held_out)))
    torch.manual_seed(r.grown.seed)
    if job.source:
        start = _load(str(job.adopted("vae")))
    else:
        small = build(r.channels[:-1], r.first_latents, r.crop)
        plan = job.plan("autoencoder", r.first, SHARES["first"])
        first = yield from train(job, "first", small, plan, scenes, held, r.crop, partial(Loss, ramp=True))
        with first.averaged_weights():
            start = grown(small.cpu(), build(r.channels, r.latents, held.shape[-1]))
    rest = 1 - SHARES["first"] if job.source else 1.0
    plan = job.plan("autoencoder", r.grown, SHARES["grown"] / rest)
    trainer = yield from train(job, "grown", start, plan, scenes, held, held.shape[-1], Loss)
    with trainer.averaged_weights():
        finished, spread = normalise(start, held.to(device), trainer.autocast())
    for part in (finished.encoder, finished.quant_conv):
        part.requires_grad_(False)
    plan = job.plan("autoencoder", r.decoder, SHARES["decoder"] / rest)
    trainer = yield from train(job, "decoder", finished, plan, scenes, held, held.shape[-1], DecoderLoss)
    with trainer.averaged_weights():
        save_part(finished.cpu(), job.vae)
    yield events.Note(f"autoencoder: written to {job.vae} ({digest(job.vae)}); latents' deviation {spread}")


def build(channels: Sequence[int], latents: int, size: int) -> Any:
    """An AutoencoderKL with one level for each number of channels.

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


def grown(small: Any, large: Any) -> Any:
    """`large` with the weights of `small`, whose levels enclose the new level at the bottom."""
    new = large.state_dict()
    for key, value in small.state_dict().items():
        parts = key.split(".")
        if key.startswith("decoder.up_blocks."):
            parts[2] = str(int(parts[2]) + 1)  # the new level decodes first
        name = ".".join(parts)
        if "quant_conv" not in key and name in new and new[name].shape == value.shape:
            new[name] = value
    large.load_state_dict(new)
    return large


def to_float(pixels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1], channels last."""
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


class Scenes:
    """Random crops of the images of several folders, half of them mirrored."""

    def __init__(self, stores: Sequence[Shards]) -> None:
        self.stores = stores
        self.ends = np.cumsum([len(s) for s in stores])
        for s in stores:
            s.shard(0)  # raises the error of a missing or damaged file before the training

    def batch(self, ctx: StepContext, crop: int) -> Tensor:
        """(B, crop, crop, 3) uint8."""
        rng = ctx.rng
        rows = np.sort(rng.integers(0, self.ends[-1], ctx.batch_size))
        parts = np.split(rows, np.searchsorted(rows, self.ends[:-1]))
        starts = [0, *self.ends[:-1].tolist()]
        parts_read = [s[p - a] for s, p, a in zip(self.stores, parts, starts, strict=True) if len(p)]
        pixels = np.concatenate(parts_read)
        slack = pixels.shape[1] - crop
        out = np.empty((ctx.batch_size, crop, crop, 3), np.uint8)
        places = rng.integers(0, slack + 1, (ctx.batch_size, 2))
        for i, (image, (x, y), flip) in enumerate(
            zip(pixels, places, rng.random(ctx.batch_size) < 0.5, strict=True)
        ):
            part = image[y : y + crop, x : x + crop]
            out[i] = part[:, ::-1] if flip else part
        return torch.from_numpy(out)


def train(
    job: Job,
    name: str,
    model: Any,
    plan: TrainingConfig,
    scenes: Scenes,
    held: Tensor,
    crop: int,
    minimised: Callable[[Trainer, Autoencoder], Callable[[StepContext, Tensor], Losses]],
) -> Generator[events.Event, None, Trainer]:
    """Train one part; returns its Trainer."""
    r, device = job.recipe.autoencoder, torch.device(job.device)
    model.to(device, memory_format=torch.channels_last)
    facts = {"channels": list(model.config.block_out_channels), "crop": crop, "noise": r.noise}
    facts["source"] = digest(job.source / "vae") if job.source else None
    trainer = Trainer(
        job.folder("autoencoder") / name, model, plan, device=device, facts=facts, stage=f"autoencoder, {name}"
    )
    loss = minimised(trainer, r)
    test = held[..., : crop // 2 * 2, : crop // 2 * 2].to(device)

    def decoded() -> Tensor:
        with trainer.autocast():
            return torch.cat(
                [model.decode(model.encode(x).latent_dist.mean).sample.float() for x in torch.split(test, 16)]
            )

    def evaluate() -> Mapping[str, float]:
        error = ((decoded().clamp(-1, 1) - test) / 2).pow(2).mean((1, 2, 3))
        return {"PSNR": float(-10 * error.log10().mean())}

    yield from trainer.train(
        loss,
        prepare=lambda ctx: scenes.batch(ctx, crop),
        evaluate=evaluate,
        sample=lambda: before_after(test[:16], decoded()[:16]),
    )
    return trainer


class Loss:
    """Loss of encoder and decoder. `ramp` starts with little noise, for an untrained network."""

    def __init__(self, trainer: Trainer, recipe: Autoencoder, *, ramp: bool = False) -> None:
        self.trainer, self.noise, self.ramp = trainer, recipe.noise, ramp
        model: Any = trainer.model
        self.encoder, self.decoder = trainer.compiled(model.encoder), trainer.compiled(model.decoder)
        self.quant, self.post = model.quant_conv, model.post_quant_conv

    def __call__(self, ctx: StepContext, pixels: Tensor) -> Losses:
        x = target = to_float(pixels.to(self.trainer.device, non_blocking=True))
        noise = self.noise * min(1.0, ctx.step / NOISE_RAMP) if self.ramp else self.noise
        with self.trainer.autocast():
            mean, logvar = self.quant(self.encoder(x)).float().chunk(2, 1)
            deviation = mean.detach().std((0, 2, 3), keepdim=True)
            z = mean
            if ctx.step % POOLED_EVERY == POOLED_EVERY - 1 and (ctx.step > POOLED_FROM or not self.ramp):
                z, target = F.avg_pool2d(z, 2), F.avg_pool2d(x, 2)
            z = z + noise * deviation * torch.randn_like(z)
            y = self.decoder(self.post(z)).float()
        l1 = (y - target).abs().mean()
        edges = _edges(y, target)
        target_logvar = 2 * torch.log(
            self.noise * deviation + 1e-4
        )  # the posterior's deviation matches the noise
        pulls = 1e-4 * mean.pow(2).mean() + 1e-3 * (logvar.clamp(-30, 20) - target_logvar).pow(2).mean()
        total = l1 + edges + 10 * (y - target).pow(2).mean() + pulls
        return {"loss": total, "l1": l1, "edges": edges}


class DecoderLoss:
    """Loss of the decoder alone; half of the latents are noisy."""

    def __init__(self, trainer: Trainer, recipe: Autoencoder) -> None:
        self.trainer, self.noise = trainer, recipe.noise
        model: Any = trainer.model
        self.encoder, self.quant = trainer.compiled(model.encoder), model.quant_conv
        self.decoder, self.post = trainer.compiled(model.decoder), model.post_quant_conv

    def __call__(self, ctx: StepContext, pixels: Tensor) -> Losses:
        x = to_float(pixels.to(self.trainer.device, non_blocking=True))
        with self.trainer.autocast():
            with torch.no_grad():
                z = self.quant(self.encoder(x)).float().chunk(2, 1)[0]
                noisy = torch.rand((len(z), 1, 1, 1), device=z.device) < 0.5
                z += noisy * self.noise * z.std((0, 2, 3), keepdim=True) * torch.randn_like(z)
            y = self.decoder(self.post(z)).float()
        # 1e-4 is 46 dB, where differences are no longer visible
        error = ((y - x).pow(2).mean((1, 2, 3)) + 1e-4).log().mean()
        l1, edges = (y - x).abs().mean(), _edges(y, x)
        return {"loss": 0.1 * error + l1 + 0.5 * edges, "l1": l1, "edges": edges}


def _edges(a: Tensor, b: Tensor) -> Tensor:
    """L1 of the differences between neighbouring pixels, down and across."""
    down = (a.diff(dim=-2) - b.diff(dim=-2)).abs().mean()
    return down + (a.diff(dim=-1) - b.diff(dim=-1)).abs().mean()


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
