"""Stage `unet`: the diffusion model, trained on the latents and tokens of stage `latents`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from tools.tiny_training.job import Job, digest, save_part
from tools.tiny_training.latents import stores
from tools.tiny_training.noise import STEPS, Levels, scheduler
from tools.tiny_training.recipes import Unet
from tools.tiny_training.sampler import Painter
from torch import Tensor, nn

from minikin import events
from minikin.errors import BadRecipe
from minikin.training.config import StepContext
from minikin.training.trainer import Losses, Trainer


def stage(job: Job) -> Iterator[events.Event]:
    """Train the U-Net and write its EMA to unet/unet, also when it is interrupted."""
    r, device = job.recipe.unet, torch.device(job.device)
    data = Data(job)
    torch.manual_seed(r.plan.seed)
    unet = _adopted(job, data) if job.source else build(r, data.shape, job.recipe.text.width)
    prepare_for(unet, device)
    facts = {"channels": list(r.channels), "data": data.made_from}
    facts["source"] = digest(job.source / "unet") if job.source else None
    trainer = Trainer(
        job.folder("unet"), unet, job.plan("unet", r.plan), device=device, facts=facts, stage="unet"
    )
    painter = Painter(job, unet, trainer)
    objective = Objective(trainer, r, data, painter.encode)
    try:
        yield from trainer.train(
            objective.loss, prepare=objective.draw, evaluate=objective.evaluate, sample=painter.sheet
        )
    except KeyboardInterrupt:
        _write(trainer, job)
        yield events.Note(f"unet: the EMA so far is in {job.unet}; --stage export makes it a model.")
        raise
    _write(trainer, job)
    yield events.Note(f"unet: {trainer.state.seen} samples seen, written to {job.unet} ({digest(job.unet)})")


def build(r: Unet, latents: tuple[int, int], text_width: int) -> Any:
    """A UNet2DConditionModel; residual branches start at zero. latents: (channels, side)."""
    from diffusers import UNet2DConditionModel

    last = len(r.channels) - 1
    attends = [r.convolutional <= k < last for k in range(last + 1)]
    unet = UNet2DConditionModel(
        sample_size=latents[1],
        in_channels=latents[0],
        out_channels=latents[0],
        layers_per_block=1,
        block_out_channels=r.channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=text_width,
        attention_head_dim=[c // r.head for c in r.channels],
        norm_num_groups=r.groups,
    )
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "conv_out", "proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def prepare_for(unet: Any, device: torch.device) -> None:
    """Move to the device, with its fastest memory layout and attention."""
    from diffusers.models.attention_processor import AttnProcessor

    if device.type == "cpu":  # the backward of fused attention takes 37 % of a step, of plain products 4 %
        unet.set_attn_processor(AttnProcessor())
    unet.to(device, memory_format=torch.channels_last)


class Data:
    """Latents (N, C, h, w) float16 and tokens (N, K, context) in memory; the last rows are held out."""

    def __init__(self, job: Job) -> None:
        latents, tokens = (s.complete("latents") for s in stores(job))
        device = torch.device(job.device)
        self.latents = torch.from_numpy(latents.all()).to(device)
        self.tokens = torch.from_numpy(tokens.all().astype(np.int64)).to(device)
        self.train = len(self.latents) - job.recipe.unet.held_out
        if self.train < 1:
            raise BadRecipe(
                f"{len(self.latents)} scenes are too few: {job.recipe.unet.held_out} are held out. "
                "Render more images."
            )
        manifests = [digest(s.folder / "manifest.json") for s in (latents, tokens)]
        self.made_from = [*manifests, digest(job.need(job.text_encoder, "text"))]

    @property
    def shape(self) -> tuple[int, int]:
        return self.latents.shape[1], self.latents.shape[2]


class Objective:
    """Training objective: mean squared error of v."""

    def __init__(self, trainer: Trainer, r: Unet, data: Data, encode: Any) -> None:
        self.trainer, self.r, self.data, self.encode = trainer, r, data, encode
        self.unet = trainer.compiled(trainer.model)
        self.levels = Levels(scheduler().alphas_cumprod, uniform=r.uniform, centre=r.centre, spread=r.spread)
        self.nothing: Tensor = encode.tokens([""])  # (1, context)
        n, d = r.held_out, data.latents[data.train :]
        g = torch.Generator().manual_seed(1)
        self.held = (
            d,
            torch.randn(d.shape, generator=g),
            torch.arange(n) * STEPS // n,
            data.tokens[data.train :, 0],
        )

    def draw(self, ctx: StepContext) -> tuple[Tensor, ...]:
        """Random choices of a batch, on the CPU: rows, wordings, dropped captions, timesteps."""
        g, n = ctx.generator, ctx.batch_size
        rows = torch.randint(self.data.train, (n,), generator=g)
        wording = torch.randint(self.data.tokens.shape[1], (n,), generator=g)
        dropped = torch.rand(n, generator=g) < self.r.drop
        t = self.levels.draw(n, g)
        return rows, wording, dropped, t

    def loss(self, ctx: StepContext, batch: tuple[Tensor, ...]) -> Losses:
        device = self.trainer.device
        rows, wording, dropped, t = (v.to(device, non_blocking=True) for v in batch)
        tokens = torch.where(dropped[:, None], self.nothing, self.data.tokens[rows, wording])
        x0 = self.data.latents[rows].float()
        return {"loss": self._errors(self.unet, x0, torch.randn_like(x0), t, tokens).mean()}

    def evaluate(self) -> Mapping[str, float]:
        """v-loss on held-out scenes with fixed noise and uniform timesteps; also by noise quarter."""
        device = self.trainer.device
        parts = [
            self._errors(self.trainer.model, *(v.to(device) for v in part)).cpu()
            for part in zip(*(torch.split(v, 64) for v in self.held), strict=True)
        ]
        errors = torch.cat(parts)
        quarters = {f"quarter {i}": float(q.mean()) for i, q in enumerate(errors.chunk(4), 1)}
        return {"v-loss": float(errors.mean()), **quarters}

    def _errors(self, unet: Any, x0: Tensor, eps: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Mean squared errors of v (B,)."""
        x_t, v = self.levels.mix(x0.float(), eps, t)
        e = self.encode(tokens)
        with self.trainer.autocast():
            out = unet(x_t.contiguous(memory_format=torch.channels_last), t, e, return_dict=False)[0]
        errors: Tensor = (out.float() - v).pow(2).mean((1, 2, 3))
        return errors


def _adopted(job: Job, data: Data) -> Any:
    """The U-Net of `source`. Raises BadRecipe when it does not fit the latents or the text encoder."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(
        job.adopted("unet"), use_safetensors=True, torch_dtype=torch.float32
    )
    c = unet.config
    theirs = (c.in_channels, c.sample_size, c.cross_attention_dim)
    ours = (*data.shape, job.recipe.text.width)
    if theirs != ours:
        raise BadRecipe(
            f"The U-Net of {job.source} is for latents of {theirs[0]}x{theirs[1]}x{theirs[1]} and text of "
            f"width {theirs[2]}; this build has {ours[0]}x{ours[1]}x{ours[1]} and {ours[2]}. "
            "Train without --from."
        )
    return unet


def _write(trainer: Trainer, job: Job) -> None:
    with trainer.averaged_weights():
        save_part(trainer.model, job.unet)
