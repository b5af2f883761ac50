"""Stage `autoencoder`: learned without its last level first, then grown by that level; last the decoder alone.

A factor-16 autoencoder trained from nothing learns badly (docs/tiny.md); with one level inserted at
the bottom of a trained factor-8 one it passes that in a few hundred steps. Loss: L1 of pixels and of
their differences, some L2, and weak pulls on the latents. The decoder sees noise on the latents, so
it forgives the diffusion model's small errors; every eighth step it decodes latents averaged 2x2
against pixels averaged 2x2, which makes neighbouring latents mean neighbouring things. At the end the
encoder is frozen and the decoder goes on by Muon for what PSNR measures, the mean logarithm of squared errors:
latents stay what they are, so a U-Net that was trained on them may stay, too.
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
from minikin.training.plan import Plan, Turn
from minikin.training.run import Losses, Run

POOLED_EVERY, POOLED_FROM = 8, 400  # steps
SHARES = {"first": 0.3, "grown": 0.4, "decoder": 0.3}  # of a budget for all parts
NOISE_RAMP = 500  # steps from nothing to the full noise


def stage(job: Job) -> Iterator[events.Event]:
    """Train both parts and write the normalised autoencoder to autoencoder/vae."""
    r = job.recipe.autoencoder
    if job.takes("autoencoder"):
        yield events.Note(f"autoencoder: {adopt(job, 'vae', job.vae)}")
        return
    device = torch.device(job.device)
    scenes = Scenes([store.complete("pictures") for _, store in images.stores(job)])
    held = to_float(torch.from_numpy(images.held_out(job, r.held_out)))
    torch.manual_seed(r.grown.seed)
    if job.source:
        start = _load(str(job.adopted("vae")))
    else:
        small = build(r.channels[:-1], r.first_latents, r.crop)
        plan = job.plan("autoencoder", r.first, SHARES["first"])
        first = yield from train(job, "first", small, plan, scenes, held, r.crop, partial(Loss, ramp=True))
        with first.averaged():
            start = grown(small.cpu(), build(r.channels, r.latents, held.shape[-1]))
    rest = 1 - SHARES["first"] if job.source else 1.0
    plan = job.plan("autoencoder", r.grown, SHARES["grown"] / rest)
    run = yield from train(job, "grown", start, plan, scenes, held, held.shape[-1], Loss)
    with run.averaged():
        finished, spread = normalise(start, held.to(device), run.autocast())
    for part in (finished.encoder, finished.quant_conv):
        part.requires_grad_(False)
    plan = job.plan("autoencoder", r.decoder, SHARES["decoder"] / rest)
    run = yield from train(job, "decoder", finished, plan, scenes, held, held.shape[-1], DecoderLoss)
    with run.averaged():
        save_part(finished.cpu(), job.vae)
    yield events.Note(f"autoencoder: written to {job.vae} ({digest(job.vae)}); latents' deviation {spread}")


def build(channels: Sequence[int], latents: int, size: int) -> Any:
    """An AutoencoderKL with one level for each number of channels.

    One group in the norms: with few channels more groups would normalise the colour away.
    """
    from diffusers import AutoencoderKL

    n = len(channels)
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n, block_out_channels=tuple(channels), layers_per_block=1,
        latent_channels=latents, norm_num_groups=1, mid_block_add_attention=False, sample_size=size,
        scaling_factor=1.0,
    )  # fmt: skip


def grown(small: Any, large: Any) -> Any:
    """`large` with the weights of `small`, whose levels lie around the new one at the bottom."""
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
            s.shard(0)  # tells a missing or damaged file before the work begins

    def batch(self, turn: Turn, crop: int) -> Tensor:
        """(B, crop, crop, 3) uint8."""
        rng = turn.rng
        rows = np.sort(rng.integers(0, self.ends[-1], turn.size))
        parts = np.split(rows, np.searchsorted(rows, self.ends[:-1]))
        starts = [0, *self.ends[:-1].tolist()]
        found = [s[p - a] for s, p, a in zip(self.stores, parts, starts, strict=True) if len(p)]
        pixels = np.concatenate(found)
        slack = pixels.shape[1] - crop
        out = np.empty((turn.size, crop, crop, 3), np.uint8)
        places = rng.integers(0, slack + 1, (turn.size, 2))
        for i, (picture, (x, y), flip) in enumerate(
            zip(pixels, places, rng.random(turn.size) < 0.5, strict=True)
        ):
            part = picture[y : y + crop, x : x + crop]
            out[i] = part[:, ::-1] if flip else part
        return torch.from_numpy(out)


def train(
    job: Job, name: str, model: Any, plan: Plan, scenes: Scenes, held: Tensor, crop: int,
    minimised: Callable[[Run, Autoencoder], Callable[[Turn, Tensor], Losses]],
) -> Generator[events.Event, None, Run]:  # fmt: skip
    """Train one part; returns its Run."""
    r, device = job.recipe.autoencoder, torch.device(job.device)
    model.to(device, memory_format=torch.channels_last)
    facts = {"channels": list(model.config.block_out_channels), "crop": crop, "noise": r.noise}
    facts["source"] = digest(job.source / "vae") if job.source else None
    run = Run(
        job.folder("autoencoder") / name, model, plan, device=device, facts=facts, stage=f"autoencoder, {name}"
    )
    loss = minimised(run, r)
    test = held[..., : crop // 2 * 2, : crop // 2 * 2].to(device)

    def decoded() -> Tensor:
        with run.autocast():
            return torch.cat(
                [model.decode(model.encode(x).latent_dist.mean).sample.float() for x in torch.split(test, 16)]
            )

    def evaluate() -> Mapping[str, float]:
        error = ((decoded().clamp(-1, 1) - test) / 2).pow(2).mean((1, 2, 3))
        return {"PSNR": float(-10 * error.log10().mean())}

    yield from run.train(
        loss, prepare=lambda turn: scenes.batch(turn, crop), evaluate=evaluate,
        sample=lambda: before_after(test[:16], decoded()[:16]),
    )  # fmt: skip
    return run


class Loss:
    """What one step minimises. `ramp` begins with little noise: for a network that knows nothing."""

    def __init__(self, run: Run, recipe: Autoencoder, *, ramp: bool = False) -> None:
        self.run, self.noise, self.ramp = run, recipe.noise, ramp
        model: Any = run.model
        self.encoder, self.decoder = run.compiled(model.encoder), run.compiled(model.decoder)
        self.quant, self.post = model.quant_conv, model.post_quant_conv

    def __call__(self, turn: Turn, pixels: Tensor) -> Losses:
        x = target = to_float(pixels.to(self.run.device, non_blocking=True))
        noise = self.noise * min(1.0, turn.step / NOISE_RAMP) if self.ramp else self.noise
        with self.run.autocast():
            mean, logvar = self.quant(self.encoder(x)).float().chunk(2, 1)
            deviation = mean.detach().std((0, 2, 3), keepdim=True)
            z = mean
            if turn.step % POOLED_EVERY == POOLED_EVERY - 1 and (turn.step > POOLED_FROM or not self.ramp):
                z, target = F.avg_pool2d(z, 2), F.avg_pool2d(x, 2)
            z = z + noise * deviation * torch.randn_like(z)
            y = self.decoder(self.post(z)).float()
        l1 = (y - target).abs().mean()
        edges = _edges(y, target)
        wanted = 2 * torch.log(self.noise * deviation + 1e-4)  # the posterior says how much noise is borne
        pulls = 1e-4 * mean.pow(2).mean() + 1e-3 * (logvar.clamp(-30, 20) - wanted).pow(2).mean()
        total = l1 + edges + 10 * (y - target).pow(2).mean() + pulls
        return {"loss": total, "l1": l1, "edges": edges}


class DecoderLoss:
    """What one step of the decoder alone minimises; half of the latents are noisy."""

    def __init__(self, run: Run, recipe: Autoencoder) -> None:
        self.run, self.noise = run, recipe.noise
        model: Any = run.model
        self.encoder, self.quant = run.compiled(model.encoder), model.quant_conv
        self.decoder, self.post = run.compiled(model.decoder), model.post_quant_conv

    def __call__(self, turn: Turn, pixels: Tensor) -> Losses:
        x = to_float(pixels.to(self.run.device, non_blocking=True))
        with self.run.autocast():
            with torch.no_grad():
                z = self.quant(self.encoder(x)).float().chunk(2, 1)[0]
                noisy = torch.rand((len(z), 1, 1, 1), device=z.device) < 0.5
                z += noisy * self.noise * z.std((0, 2, 3), keepdim=True) * torch.randn_like(z)
            y = self.decoder(self.post(z)).float()
        # 1e-4 is 46 dB: from there on nobody sees a difference
        error = ((y - x).pow(2).mean((1, 2, 3)) + 1e-4).log().mean()
        l1, edges = (y - x).abs().mean(), _edges(y, x)
        return {"loss": 0.1 * error + l1 + 0.5 * edges, "l1": l1, "edges": edges}


def _edges(a: Tensor, b: Tensor) -> Tensor:
    """L1 of the differences between neighbouring pixels, down and across."""
    down = (a.diff(dim=-2) - b.diff(dim=-2)).abs().mean()
    return down + (a.diff(dim=-1) - b.diff(dim=-1)).abs().mean()


def before_after(x: Tensor, y: Tensor) -> Image.Image:
    """Rows of images and, under each row, what came back; both in [-1, 1]."""
    n = min(8, len(x))
    rows = [
        torch.cat(list(part), -1) for i in range(0, len(x) - n + 1, n) for part in (x[i : i + n], y[i : i + n])
    ]
    pixels = torch.cat(rows, -2).float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _load(folder: str) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)
