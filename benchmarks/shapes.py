"""Latent shapes and U-Net widths compared by training from scratch (docs/tiny.md, "Finding the shape").

    python -m benchmarks.shapes prepare                scenes, tokens, latents of tiny's own autoencoder
    python -m benchmarks.shapes train 8x8x16           one U-Net from scratch, on one core
    python -m benchmarks.shapes table                  accuracy on held-out prompts by the classifier

8x8x16 are the 16 principal channels of tiny's 32, so that both have one autoencoder, and what is lost is what
those 16 cannot hold: the classifier is shown scenes that went through each, too. Losses on different latents
do not compare; what is painted does. 8x8x32-wide has levels half as wide again, on the same latents as 8x8x32,
where losses do compare. The tokenizer and the text encoder are tiny's own.

16x16x8 wants an autoencoder of factor 8 with 8 channels: `prepare --autoencoder FOLDER --out ELSEWHERE`, a
diffusers folder. 16x16x8-folded are the same latents with every 2x2 positions as channels, 8x8x32, so that
losses compare here, too.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tools.tiny_training import images, latents, stages
from tools.tiny_training.evaluate import evaluate
from tools.tiny_training.evaluation.model import Model
from tools.tiny_training.job import Job
from tools.tiny_training.recipes import Build, Images, recipe
from tools.tiny_training.sampler import Painter
from tools.tiny_training.shards import write
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from minikin import events
from minikin.files import atomic_write
from minikin.models.loading.registry import tiny_folder


@dataclass(frozen=True)
class Shape:
    """Latents and width of a U-Net."""

    encoded: int  # channels of the autoencoder
    channels: int  # principal channels of them
    levels: tuple[int, ...]
    fold: int = 1  # side of the squares of positions that become channels


SHAPES = {
    "8x8x32": Shape(32, 32, (128, 256)),
    "8x8x16": Shape(32, 16, (128, 256)),
    "8x8x32-wide": Shape(32, 32, (192, 384)),
    "16x16x8": Shape(8, 8, (64, 128, 256)),
    "16x16x8-folded": Shape(8, 8, (128, 256), fold=2),
}
SCENES, BATCH = 8_192, 128
SHARED = ("images", "tokenizer", "text", "tokens", "autoencoder")


def job(out: Path, name: str, minutes: float = 1.0) -> Job:
    """The build in out/name; everything but its latents and its U-Net is shared in out/common."""
    small = recipe("small", "cpu")
    plan = small.unet.plan.model_copy(update={"steps": None, "minutes": minutes, "batch": BATCH})
    scenes = Images(count=SCENES, pairs=SCENES // 4, things=1)
    unet = {"plan": plan} | ({"channels": SHAPES[name].levels, "convolutional": 0} if name in SHAPES else {})
    build = Build(images=scenes, unet=small.unet.model_copy(update=unet))
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    for part in SHARED if name != "common" else ():
        if not (folder / part).is_symlink():
            (folder / part).symlink_to(Path("..") / "common" / part)
    return Job(recipe=build, out=folder, workers=1)


def prepare(out: Path, autoencoder: Path) -> Iterator[events.Event]:
    """Scenes, tokens and latents for every U-Net that fits the autoencoder."""
    common = job(out, "common")
    yield from images.stage(common)
    for name, source in (("autoencoder", autoencoder), ("tokenizer", tiny_folder()), ("text", tiny_folder())):
        yield from stages.run(replace(common, source=source), [name])
    yield from latents.stage(common)
    common_latents = latents.stores(common)[0]
    z = torch.from_numpy(common_latents.all()).float()
    for name, shape in SHAPES.items():
        if shape.encoded != z.shape[1]:
            continue
        p = principal(z, shape.channels)
        store = latents.stores(job(out, name))[0]
        for i in store.missing():
            part = torch.from_numpy(np.array(common_latents.shard(i))).float()
            write(store.path(i), pixel_unshuffle(projected(part, p), shape.fold).half().numpy())
        np.save(out / name / "projection.npy", p.numpy())


def principal(z: Tensor, channels: int) -> Tensor:
    """Orthogonal projection (channels, C) on the directions of largest variance; the identity for all C."""
    if channels == z.shape[1]:
        return torch.eye(channels)
    flat = z.transpose(0, 1).flatten(1)
    return torch.linalg.eigh(flat @ flat.T / flat.shape[1])[1].T.flip(0)[:channels].contiguous()


def projected(z: Tensor, p: Tensor) -> Tensor:
    return torch.einsum("kc,bchw->bkhw", p, z)


class Projected(Model):
    """Generates in the projected latents and decodes by tiny's own decoder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "model", "cpu")
        self.p = torch.from_numpy(np.load(folder / "projection.npy"))
        self.fold = SHAPES[folder.name].fold

    def decode(self, x: Tensor) -> np.ndarray:
        return super().decode(projected(pixel_shuffle(x, self.fold), self.p.T))

    def latents(self, images: np.ndarray) -> Tensor:
        return pixel_unshuffle(projected(super().latents(images), self.p), self.fold)


def table(out: Path, n: int) -> None:
    """Print and store a row for each U-Net."""
    rows: list[dict[str, Any]] = []
    for name in (n for n in SHAPES if (out / n / "model").is_dir()):
        model = Projected(out / name)
        evaluation = evaluate(model, images=n, steps=25, guidance=3.0, seed=11, show_progress=True)
        evaluation.sheet().save(out / name / "sheet.png")
        log = [json.loads(line) for line in (out / name / "unet" / "log.jsonl").read_text().splitlines()]
        report = evaluation.report.as_json()
        examples = max(line.get("seen", 0) for line in log)
        columns = ("drawn", "captions", "psnr", "v_loss")
        rows.append({"latents": name, "examples": examples} | {k: report[k] for k in columns})
        print(evaluation.report.text(), json.dumps(rows[-1]), sep="\n", flush=True)
    atomic_write(out / "table.json", (json.dumps(rows, indent=1) + "\n").encode())


def main() -> None:
    p = argparse.ArgumentParser("python -m benchmarks.shapes", description=__doc__)
    p.add_argument("what", choices=("prepare", "train", "table"))
    p.add_argument("name", nargs="?", choices=SHAPES)
    p.add_argument("--out", type=Path, default=Path("out/shapes"))
    p.add_argument("--autoencoder", type=Path, default=tiny_folder(), help="diffusers folder of it")
    p.add_argument("--minutes", type=float, default=30.0, help="training time of a U-Net")
    p.add_argument("--images", type=int, default=400, help="generated with each")
    a = p.parse_args()
    if a.what == "train" and not a.name:
        p.error(f"train wants one of {', '.join(SHAPES)}")
    if a.what == "table":
        table(a.out, a.images)
        return
    from minikin.cli import display

    if a.what == "train":
        torch.set_num_threads(1)  # one process per core
        Painter.sheet = lambda self: Image.new("RGB", (8, 8))  # type: ignore[method-assign]  # `table` has samples
    stage_events = (
        prepare(a.out, a.autoencoder)
        if a.what == "prepare"
        else stages.run(job(a.out, a.name, a.minutes), ["unet", "export"])
    )
    ended = (e for e in stage_events if not isinstance(e, events.Done))  # the end of one stage
    display.run(e for part in (ended, [events.Done("", {})]) for e in part)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
