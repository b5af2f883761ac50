"""Training examples as latents and captions, computed once and cached in the output folder.

Latents are float16 in files of SHARD examples, each written atomically, so a killed run keeps its
finished files and several processes share the work. Images are encoded by the base's VAE (posterior
mean); for captions without images the teacher generates one each. For a method that needs captions
alone no image is opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minikin import events
from minikin.distillation import concept_captions
from minikin.distillation.sampling import many_steps
from minikin.distillation.sources import Source, squared
from minikin.distillation.student import Encoder, Network
from minikin.errors import AssetError, BadRecipe
from minikin.files import atomic_write
from minikin.models.backends import module_hash
from minikin.models.base import Base
from minikin.recipes import Distill
from minikin.training.distributed import Ranks

SHARD = 256  # examples in a file: 8 MB of SD 1.5's latents
BATCH = 8  # images encoded or generated at once
USUAL_GUIDANCE = 6.0  # of the teacher's images, when the recipe has none


class ExampleBatch(NamedTuple):
    """The examples of one step: their indices (B,) and one caption each."""

    rows: Tensor
    captions: list[str]


@dataclass(frozen=True)
class Examples:
    """A data set of N examples.

    latents   (N, C, h, w) float16 on the CPU, or None for a method that needs captions alone
    captions  one or more of each example
    shape     (C, h, w) of the latents
    identity  equal for equal data
    """

    latents: Tensor | None
    captions: list[list[str]]
    shape: tuple[int, int, int]
    identity: str

    def __len__(self) -> int:
        return len(self.captions)

    def draw(self, n: int, g: torch.Generator) -> ExampleBatch:
        rows = torch.randint(len(self), (n,), generator=g)
        wording = torch.randint(1 << 30, (n,), generator=g).tolist()
        captions = [self.captions[i] for i in rows.tolist()]
        return ExampleBatch(rows, [c[k % len(c)] for c, k in zip(captions, wording, strict=True)])

    def x0(self, rows: Tensor, device: torch.device) -> Tensor:
        """Latents of these examples (B, C, h, w), float32 on the device."""
        assert self.latents is not None
        return self.latents[rows].to(device, torch.float32)


def side_of(base: Base, recipe: Distill) -> int:
    """Side of the training images in pixels. Raises BadRecipe when the base's U-Net cannot take it."""
    side = recipe.size or base.size_px
    step = base.vae_scale_factor * 2 ** (len(base.denoiser.config.block_out_channels) - 1)
    if side % step:
        near = step * max(1, round(side / step))
        raise BadRecipe(f"size must be a multiple of {step} for this base, but it is {side}; use {near}.")
    return side


def load(
    encoder: Encoder,
    teacher: Network,
    source: Source,
    recipe: Distill,
    folder: Path,
    ranks: Ranks,
    *,
    with_latents: bool = True,
) -> Iterator[events.Event]:
    """Load the examples, computing the latents that `folder` lacks; the last event is Done with the Examples.

    with_latents  False for a method that needs captions alone
    Raises BadPhoto for an image that cannot be used, BadRecipe when the folder holds latents of other
    data, StorageError. Finished files stay in every case.
    """
    from safetensors.torch import save

    base = encoder.base
    side = side_of(base, recipe)
    shape = (
        int(base.denoiser.config.in_channels),
        side // base.vae_scale_factor,
        side // base.vae_scale_factor,
    )
    captions = [source.captions(i) for i in range(len(source))]
    if not with_latents:
        yield events.Done(Examples(None, captions, shape, source.identity), {"examples": len(captions)})
        return
    facts: dict[str, Any] = {"source": source.identity, "count": len(source), "shape": list(shape)}
    facts["autoencoder"] = module_hash(base, base.vae)
    if not source.has_images:
        teacher_facts: dict[str, Any] = {
            "guidance": recipe.scales,
            "teacher_steps": recipe.teacher_steps,
            "seed": recipe.seed,
        }
        teacher_facts |= {"base": base.fingerprint, "unet": module_hash(base, base.denoiser)}
        if encoder.concepts is not None:
            teacher_facts["concepts"] = concept_captions.digest(encoder.concepts)
        facts |= json.loads(json.dumps(teacher_facts))
    _same(folder / "manifest.json", facts, ranks)
    starts = range(0, len(source), SHARD)
    files = [folder / f"{i:05d}.safetensors" for i in range(len(starts))]
    missing = [i for i, f in enumerate(files) if not f.exists()]
    done = SHARD * (len(files) - len(missing))
    for i in missing[ranks.rank :: ranks.count]:
        rows = range(starts[i], min(starts[i] + SHARD, len(source)))
        parts = []
        for latents in _latents(encoder, teacher, source, recipe, rows, side):
            parts.append(latents)
            done += len(latents) * ranks.count
            yield events.Progress("latents", min(done, len(source)), len(source))
        atomic_write(files[i], save({"latents": torch.cat(parts).contiguous()}))
    ranks.barrier()
    loaded = torch.cat([_read(f) for f in files])
    if loaded.shape != (len(source), *shape):
        raise AssetError(f"{folder} holds latents of other shapes. Delete it; they are made anew.")
    yield events.Done(Examples(loaded, captions, shape, source.identity), {"examples": len(captions)})


@torch.no_grad()
def _latents(
    encoder: Encoder, teacher: Network, source: Source, recipe: Distill, rows: range, side: int
) -> Iterator[Tensor]:
    """Latents of these examples, float16 on the CPU, BATCH at a time."""
    base = encoder.base
    batches = [range(i, min(i + BATCH, rows.stop)) for i in range(rows.start, rows.stop, BATCH)]
    if not source.has_images:
        h = side // base.vae_scale_factor
        for part in batches:
            c = int(base.denoiser.config.in_channels)
            generators = [np.random.default_rng((recipe.seed, k)) for k in part]
            x = torch.from_numpy(np.stack([r.standard_normal((c, h, h), np.float32) for r in generators]))
            x = x.to(base.device)
            texts = encoder([source.captions(k)[0] for k in part])
            empty = encoder.empty(len(part))
            yield (
                many_steps(teacher, x, texts, empty, recipe.teacher_steps, painting_scale(recipe)).half().cpu()
            )
        return

    def pixels(k: int) -> Tensor:
        image = squared(source.image(k), side, source.name(k))
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)

    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        for part in batches:
            batch = torch.stack(list(pool.map(pixels, part))).float() / 127.5 - 1
            yield base.to_latents(batch).half().cpu()


def painting_scale(recipe: Distill) -> float:
    """Guidance scale of the teacher's images: the middle of the recipe's range."""
    mean = sum(recipe.scales) / 2
    return mean if mean > 1 else USUAL_GUIDANCE


def _same(manifest: Path, facts: dict[str, Any], ranks: Ranks) -> None:
    """Write the manifest of a new folder (first rank), or check that the folder holds the same data."""
    ranks.barrier()
    stored = None
    if manifest.exists():
        try:
            stored = json.loads(manifest.read_text())
        except (OSError, ValueError) as e:
            raise AssetError(f"{manifest} cannot be read ({e}). Delete its folder; it is made anew.") from e
    ranks.barrier()
    if stored is None and ranks.is_first:
        atomic_write(manifest, json.dumps(facts).encode())
    elif stored is not None and stored != facts:
        differ = sorted(k for k in {**stored, **facts} if stored.get(k) != facts.get(k))
        raise BadRecipe(
            f"{manifest.parent} holds latents of other data ({', '.join(differ)} differ). Choose another "
            "--out, or delete that folder."
        )


def _read(path: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        latents: Tensor = load_file(str(path))["latents"]
        return latents
    except (OSError, SafetensorError, KeyError) as e:
        raise AssetError(f"{path} cannot be read ({e}). Delete this one file; it is made anew.") from e
