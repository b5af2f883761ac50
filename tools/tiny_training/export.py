"""Stage `export`: a diffusers folder in float16 that stock StableDiffusionPipeline opens.

`split` limits the size of a file in megabytes, for hosts that have such a limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tools.tiny_training.card import card
from tools.tiny_training.job import Job, save_part
from tools.tiny_training.noise import scheduler

from minikin import events
from minikin.errors import MinikinError
from minikin.files import atomic_write
from minikin.models.precision import name_float32


def stage(job: Job) -> Iterator[events.Event]:
    """Assemble the parts in OUT/model."""
    pipe = assembled(job)
    room = max(0.5 * job.split, job.split - 0.1) if job.split else 10_000  # MB; headers come on top
    pipe.to(torch.float16)
    save_part(pipe, job.model, safe_serialization=True, max_shard_size=f"{int(1000 * room)}KB")
    name_float32(job.model)
    atomic_write(job.model / "README.md", card(job).encode())
    files = [(p, p.stat().st_size) for p in job.model.rglob("*") if p.is_file()]
    path, size = max(files, key=lambda f: f[1])
    if job.split and size > job.split * 1e6:
        raise MinikinError(
            f"{path} has {size / 1e6:.1f} MB: one tensor in it is larger than --split {job.split:g} allows. "
            "Choose a larger --split."
        )
    total = sum(s for _, s in files) / 1e6
    yield events.Note(
        f"export: {job.model}, {len(files)} files, {total:.1f} MB in all, the largest {size / 1e6:.1f} MB. "
        f'Try it: minikin paint "a photo of a cat on the beach" --base {job.model}'
    )


def assembled(job: Job) -> Any:
    """The pipeline of all parts, in float32."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextModel

    how = {"use_safetensors": True, "torch_dtype": torch.float32}
    vae = AutoencoderKL.from_pretrained(job.need(job.vae, "autoencoder"), **how)
    unet = UNet2DConditionModel.from_pretrained(job.need(job.unet, "unet"), **how)
    for part in (vae, unet):
        part.register_to_config(_name_or_path="")  # no paths of this machine
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=CLIPTextModel.from_pretrained(
            job.need(job.text_encoder, "text"), use_safetensors=True, dtype=torch.float32
        ),
        tokenizer=AutoTokenizer.from_pretrained(job.need(job.tokenizer, "tokenizer")),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
