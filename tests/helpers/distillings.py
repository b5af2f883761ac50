"""What the tests of distillation share: settings on miniatures with made-up latents, folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from minikin import events
from minikin.distillation.data import Examples
from minikin.distillation.distill import distill
from minikin.distillation.objective import DistillationContext
from minikin.models.base import Base
from minikin.recipes import Distill

CAPTIONS = ["a cat on the beach", "a dog in the snow", "a red car", "a bird", "two cups", "a tree at night"]


def context(base: Base, n: int = 12, **recipe: Any) -> DistillationContext:
    """A distillation of a miniature on `n` examples of noise."""
    r = Distill.make(**{"data": "x", "rank": 4, "batch": 4, "steps": 4, **recipe}).resolved(False)
    shape = (int(base.denoiser.config.in_channels), 8, 8)
    latents = torch.randn((n, *shape), generator=torch.Generator().manual_seed(3)).half()
    captions = [[CAPTIONS[i % len(CAPTIONS)]] for i in range(n)]
    return DistillationContext.of(base, r, Examples(latents, captions, shape, "noise"))


def image_folder(folder: Path, n: int = 5, side: int = 64) -> Path:
    """Images of one colour each with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = np.full((side, side, 3), 40 * i + 20, np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i % len(CAPTIONS)])
    return folder


def captions_file(folder: Path, lines: list[str] | None = None) -> Path:
    path = folder / "captions.txt"
    path.write_text("\n".join(lines or CAPTIONS))
    return path


def run(base: Base, out: Path, data: Path, *, resume: bool = False, **recipe: Any) -> list[events.Event]:
    """Distil a miniature for a few steps; all events, the last of them Done."""
    how = {"rank": 4, "batch": 4, "steps": 4, "teacher_steps": 2, "save_minutes": 0, "lr": 1e-2}
    recipe_ = Distill.make(data=str(data), base=base.name, **{**how, **recipe})
    return list(distill(base, recipe_, out, resume=resume))
