"""Stage `images`: scenes of the world, rendered once by worker processes and cached on disk.

Rows are (128, 128, 3) uint8; row i is scene i of the recipe's stream, the last ones of its pairs alone:
two things and their sides are the hardest to learn. In the small world the autoencoder also sees
images of the wide one, since personal photos show drawings of its styles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from tools.tiny_training import art
from tools.tiny_training.job import Job
from tools.tiny_training.pool import spread
from tools.tiny_training.shards import Shards, write

from minikin import events
from minikin.tiny import vocabulary as words
from minikin.tiny.world import World

EVALUATION_SEED = 99  # of scenes that are never trained on


def stage(job: Job) -> Iterator[events.Event]:
    """Render the missing files."""
    art.check(job.art)
    p = job.recipe.images
    for k, (world, store) in enumerate(stores(job)):
        calls = [
            (
                store.path(i),
                stream(job, i * p.shard) if k == 0 else world,
                i * p.shard,
                p.shard,
                p.seed,
                p.backdrops,
                job.art,
            )
            for i in store.missing()
        ]
        name, before = store.folder.name, store.files - len(calls)
        for done in spread(render, calls, job.workers):
            yield events.Progress(name, (before + done) * p.shard, len(store), f"{world} scenes")
        yield events.Note(f"{name}: {len(store)} scenes of the {world} world.")
        yield _sample(job, store, world)


def stores(job: Job) -> list[tuple[str, Shards]]:
    """Image files as pairs (world, files), the recipe's world first. Raises BadRecipe, AssetError."""
    p, world = job.recipe.images, job.recipe.world
    facts = {"seed": p.seed, "backdrops": p.backdrops, "art": art.fingerprint(job.art)}
    world_facts = {**facts, "world": world, "pairs": p.pairs}
    out = [(world, Shards(job.folder("images"), p.count, p.shard, world_facts))]
    if p.others:
        folder = job.folder("images-others")
        out.append(("wide", Shards(folder, p.others, p.shard, {**facts, "world": "wide"})))
    return out


def stream(job: Job, row: int) -> str:
    """Name of the world of scene `row`, for `world_of`."""
    p = job.recipe.images
    pairs = row // p.shard * p.shard >= p.count - p.pairs
    return f"{job.recipe.world}:pair" if pairs else job.recipe.world


def render(path: Path, world: str, start: int, n: int, seed: int, backdrops: int, pack: Path | None) -> None:
    """Write the scenes from `start` to `start + n` to a file; runs in a worker. Raises StorageError."""
    w = world_of(world, backdrops, pack)
    write(path, np.stack([np.asarray(w.draw(w.scene(seed, i))[0]) for i in range(start, start + n)]))


@lru_cache(maxsize=3)
def world_of(world: str, backdrops: int, pack: Path | None) -> World:
    """The world by its name; "small:pair" has one layout alone. Cached: backgrounds take seconds to paint."""
    name, _, layout = world.partition(":")
    spec = words.WORLDS[name]
    if layout:
        spec = replace(spec, layouts=((layout, 1.0),))
    return World(spec, backdrops=backdrops, art=pack)


def held_out(job: Job, n: int) -> np.ndarray:
    """Images (n, 128, 128, 3) uint8 of held-out scenes, for evaluation."""
    w = world_of(job.recipe.world, job.recipe.images.backdrops, job.art)
    return np.stack([np.asarray(w.draw(w.scene(EVALUATION_SEED, i, "test"))[0]) for i in range(n)])


def _sample(job: Job, store: Shards, world: str) -> events.ImageReady:
    from PIL import Image

    from minikin.images.encode import save_image
    from minikin.images.sheet import contact_sheet

    rows = store[np.arange(min(32, len(store)))]
    sheet = contact_sheet([Image.fromarray(r) for r in rows], columns=8)
    save_image(sheet, store.folder / "sample.png")
    return events.ImageReady(sheet, f"scenes of the {world} world")
