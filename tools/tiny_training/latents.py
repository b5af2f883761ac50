"""Stage `latents`: images as latents and captions as tokens, computed once for the U-Net's training.

Latents are posterior means (C, h, w) float16, encoded in this process; tokens are (captions, context)
uint16, by worker processes. There is one file of each for every file of images.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tools.tiny_training import images
from tools.tiny_training.autoencoder import to_float
from tools.tiny_training.job import Job, digest
from tools.tiny_training.pool import spread
from tools.tiny_training.shards import Shards, write

from minikin import events
from minikin.models import precision
from minikin.tiny.captions import caption
from minikin.training.signals import interruptible


def stage(job: Job) -> Iterator[events.Event]:
    """Compute the missing files of both."""
    latents, tokens = stores(job)
    images.store(job).complete("images")
    yield from _tokenise(job, tokens)
    yield from _encode(job, latents)
    yield events.Note(f"latents: {len(latents)} scenes, {job.recipe.latents.captions} captions of each")


def stores(job: Job) -> tuple[Shards, Shards]:
    """Files of latents and tokens. Raises BadRecipe when autoencoder or tokenizer has changed since."""
    p, r = job.recipe.images, job.recipe.latents
    vae, tokenizer = job.need(job.vae, "autoencoder"), job.need(job.tokenizer, "tokenizer")
    scenes = images.store(job)
    made_from = {"pictures": digest(scenes.folder / "manifest.json")}  # word: key in manifests since 0.1
    latents = Shards(job.folder("latents"), p.count, p.shard, {**made_from, "autoencoder": digest(vae)})
    facts = {**made_from, "tokenizer": digest(tokenizer), "captions": r.captions, "backdrops": p.backdrops}
    return latents, Shards(job.folder("tokens"), p.count, p.shard, facts)


def _tokenise(job: Job, tokens: Shards) -> Iterator[events.Event]:
    p, r = job.recipe.images, job.recipe
    file = job.tokenizer / "tokenizer.json"
    calls = [
        (
            tokens.path(i),
            file,
            images.stream(job, i * p.shard),
            i * p.shard,
            p.shard,
            p.seed,
            r.latents.captions,
            r.text.context,
            p.backdrops,
            job.art,
        )
        for i in tokens.missing()
    ]
    before = tokens.files - len(calls)
    for done in spread(tokenise, calls, job.workers):
        yield events.Progress("captions", (before + done) * p.shard, len(tokens))


def tokenise(
    path: Path,
    tokenizer: Path,
    world: str,
    start: int,
    n: int,
    seed: int,
    captions: int,
    context: int,
    backdrops: int,
    art: Path | None,
) -> None:
    """Write the tokens of the scenes from `start` to `start + n` to a file; runs in a worker."""
    w, t = images.world_of(world, backdrops, art), _tokenizer(tokenizer, context)
    texts = [
        caption(scene, np.random.default_rng((seed, i, k))).text
        for i in range(start, start + n)
        for scene in [w.scene(seed, i)]
        for k in range(captions)
    ]
    ids = np.array([e.ids for e in t.encode_batch(texts)], np.uint16)
    write(path, ids.reshape(n, captions, context))


@lru_cache(maxsize=2)
def _tokenizer(file: Path, context: int) -> Any:
    """The fast tokenizer without transformers, whose import takes seconds in every worker."""
    from tokenizers import Tokenizer

    t = Tokenizer.from_file(str(file))
    end = "<|endoftext|>"
    t.enable_truncation(context)
    t.enable_padding(length=context, pad_id=t.token_to_id(end), pad_token=end)
    return t


def _encode(job: Job, latents: Shards) -> Iterator[events.Event]:
    from diffusers import AutoencoderKL

    missing = latents.missing()
    if not missing:
        return
    device, size = torch.device(job.device), job.recipe.latents.batch
    vae = AutoencoderKL.from_pretrained(job.vae, use_safetensors=True, torch_dtype=torch.float32).eval()
    vae.to(device, memory_format=torch.channels_last)
    scenes = images.store(job)
    with interruptible() as stop, torch.no_grad():
        for done, i in enumerate(missing, latents.files - len(missing) + 1):
            rows = torch.from_numpy(np.array(scenes.shard(i)))
            with precision.autocast(device, job.recipe.unet.plan.bf16):
                means = [vae.encode(to_float(x.to(device))).latent_dist.mean for x in torch.split(rows, size)]
            write(latents.path(i), torch.cat(means).half().contiguous().cpu().numpy())
            yield events.Progress("latents", done * latents.size, len(latents))
            if stop.is_set():
                raise KeyboardInterrupt
