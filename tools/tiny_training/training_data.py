"""What both judges learn from: the build's images, held-out combinations, and lookalikes.

The combinations of objects and backgrounds that the world holds out are held out from the *model*.
A judge that never saw them learns that they do not exist, and then calls right images wrong:
trained without them, the classifier had 99 % of the backgrounds right on new scenes of the training
split and 89 % on the test split, objects 96 and 89 %. So judges see scenes of both splits, about as
often as the world would draw them, and are measured on scenes of other seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tools.tiny_training import art
from tools.tiny_training.augmentations import Glimpses, Rows
from tools.tiny_training.hard_negatives import Lookalikes
from tools.tiny_training.images import stores, stream, world_of
from tools.tiny_training.job import Job
from tools.tiny_training.pool import spread
from tools.tiny_training.shards import Shards, write

from minikin import events
from minikin.tiny.encoders.dual_encoder import Tokens

HELD_SHARE = 0.2  # scenes of the test split, of those of the training split
BLOCKS, BLOCKS_HELD, SEED = 1600, 120, 1  # of lookalikes


class Joined:
    """Several tables of images as one."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *(len(p) for p in parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        which = np.searchsorted(self.starts, rows, side="right") - 1
        found = [self.parts[k][np.array([i - self.starts[k]])][0] for k, i in zip(which, rows, strict=True)]
        return np.stack(found)


def draw(job: Job) -> Iterator[events.Event]:
    """Render the held-out scenes that are missing, by worker processes."""
    store, p = held_store(job), job.recipe.pictures
    calls = [
        (store.path(i), job.recipe.world, i * p.shard, p.shard, p.seed, p.backdrops, job.art)
        for i in store.missing()
    ]
    for done in spread(render, calls, job.workers):
        yield events.Progress("pictures-held", done, len(calls), "files of held-out scenes")


def material(job: Job, tokens: Tokens | None = None) -> tuple[Glimpses, Lookalikes]:
    """What a judge of this build learns from, and the lookalikes it is measured on.

    Lookalikes are drawn at the first use. Raises BadRecipe when stage `pictures` has not run.
    """
    store, held, p = stores(job)[0][1], held_store(job), job.recipe.pictures
    for number in store.missing():
        job.need(store.path(number), "pictures")
    world = world_of(job.recipe.world, p.backdrops, job.art)
    folder, pack = job.folder("lookalikes"), art.fingerprint(job.art)
    seen = Lookalikes.draw(folder, world, BLOCKS, SEED, "train", pack)
    scenes = [world_of(stream(job, i), p.backdrops, job.art).scene(p.seed, i) for i in range(len(store))]
    scenes += [world.scene(p.seed, i, "test") for i in range(len(held))]
    glimpses = Glimpses(world.spec, Joined([store, held]), scenes, seen, tokens)
    return glimpses, Lookalikes.draw(folder, world, BLOCKS_HELD, SEED, "test", pack)


def held_store(job: Job) -> Shards:
    """The table of held-out scenes; row i is scene i of the test split. Raises BadRecipe, AssetError."""
    p = job.recipe.pictures
    facts = {"seed": p.seed, "backdrops": p.backdrops, "art": art.fingerprint(job.art), "split": "test"}
    folder, count = job.folder("pictures-held"), max(1, round(HELD_SHARE * p.count))
    return Shards(folder, count, p.shard, {**facts, "world": job.recipe.world})


def render(path: Path, world: str, start: int, n: int, seed: int, backdrops: int, pack: Path | None) -> None:
    """Write scenes start .. start + n of the test split; runs in a worker. Raises StorageError."""
    w = world_of(world, backdrops, pack)
    write(path, np.stack([np.asarray(w.draw(w.scene(seed, i, "test"))[0]) for i in range(start, start + n)]))
