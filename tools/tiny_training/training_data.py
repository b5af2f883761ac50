"""Training data of the encoders: the build's images, held-out combinations, and hard negatives.

The combinations of objects and backgrounds that the world holds out are held out from the *diffusion
model*. An encoder trained without them learns that they do not exist and then rates correct images as
wrong: the classifier had 99 % of the backgrounds right on new scenes of the training split and 89 % on the
test split, objects 96 and 89 %. So the encoders are trained on scenes of both splits, about as often as
the world draws them, and are measured on scenes of other seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tools.tiny_training import art, images
from tools.tiny_training.augmentations import EncoderBatches, Rows
from tools.tiny_training.hard_negatives import HardNegatives
from tools.tiny_training.images import stream, world_of
from tools.tiny_training.job import Job
from tools.tiny_training.pool import spread
from tools.tiny_training.shards import Shards, write

from minikin import events
from minikin.tiny.encoders.dual_encoder import Tokens

HELD_SHARE = 0.2  # scenes of the test split, as a share of those of the training split
BLOCKS, BLOCKS_HELD, SEED = 1600, 120, 1  # of hard negatives


class Joined:
    """Several arrays of images as one."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *(len(p) for p in parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        which = np.searchsorted(self.starts, rows, side="right") - 1
        images = [self.parts[k][np.array([i - self.starts[k]])][0] for k, i in zip(which, rows, strict=True)]
        return np.stack(images)


def draw_held_out(job: Job) -> Iterator[events.Event]:
    """Render the missing files of held-out scenes, by worker processes."""
    store, p = held_store(job), job.recipe.images
    calls = [
        (store.path(i), job.recipe.world, i * p.shard, p.shard, p.seed, p.backdrops, job.art)
        for i in store.missing()
    ]
    for done in spread(render, calls, job.workers):
        yield events.Progress("images-held", done, len(calls), "files of held-out scenes")


def encoder_data(job: Job, tokens: Tokens | None = None) -> tuple[EncoderBatches, HardNegatives]:
    """Training batches of this build's encoders, and the hard negatives of their evaluation.

    Hard negatives are rendered at the first use. Raises BadRecipe when stage `images` has not run.
    """
    store, held, p = images.store(job), held_store(job), job.recipe.images
    for number in store.missing():
        job.need(store.path(number), "images")
    world = world_of(job.recipe.world, p.backdrops, job.art)
    folder, pack = job.folder("hard-negatives"), art.fingerprint(job.art)
    train_negatives = HardNegatives.draw(folder, world, BLOCKS, SEED, "train", pack)
    scenes = [world_of(stream(job, i), p.backdrops, job.art).scene(p.seed, i) for i in range(len(store))]
    scenes += [world.scene(p.seed, i, "test") for i in range(len(held))]
    batches = EncoderBatches(world.spec, Joined([store, held]), scenes, train_negatives, tokens)
    return batches, HardNegatives.draw(folder, world, BLOCKS_HELD, SEED, "test", pack)


def held_store(job: Job) -> Shards:
    """Files of held-out scenes; row i is scene i of the test split. Raises BadRecipe, AssetError."""
    p = job.recipe.images
    facts = {"seed": p.seed, "backdrops": p.backdrops, "art": art.fingerprint(job.art), "split": "test"}
    folder, count = job.folder("images-held"), max(1, round(HELD_SHARE * p.count))
    return Shards(folder, count, p.shard, {**facts, "world": job.recipe.world})


def render(path: Path, world: str, start: int, n: int, seed: int, backdrops: int, pack: Path | None) -> None:
    """Write scenes of the test split from `start` to `start + n`; runs in a worker. Raises StorageError."""
    w = world_of(world, backdrops, pack)
    write(path, np.stack([np.asarray(w.draw(w.scene(seed, i, "test"))[0]) for i in range(start, start + n)]))
