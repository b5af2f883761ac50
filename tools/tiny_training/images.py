"""Stage `images`: scenes of the world, rendered once by worker processes and cached on disk.

Rows are (128, 128, 3) uint8; row i is scene i of the recipe's stream, the last ones of its pairs alone:
two things and their sides are the hardest to learn. The images that the autoencoder is trained on are separate
files (things.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

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
    from tools.tiny_training import things

    art.check(job.art)
    p, world = job.recipe.images, job.recipe.world
    common = (p.shard, p.seed, p.backdrops, job.art)
    files = store(job)
    calls = [(files.path(i), stream(job, i * p.shard), i * p.shard, *common) for i in files.missing()]
    yield from _render_missing(files, render, calls, job, f"scenes of the {world} world")
    files = store_of_things(job)
    thing_calls = [(files.path(i), world, i * p.shard, *common, p.photos) for i in files.missing()]
    yield from _render_missing(files, things.render, thing_calls, job, "images of things in random patterns")


def _render_missing(
    files: Shards, function: Callable[..., None], calls: Sequence[tuple[Any, ...]], job: Job, contents: str
) -> Iterator[events.Event]:
    name, size, before = files.folder.name, job.recipe.images.shard, files.files - len(calls)
    for done in spread(function, calls, job.workers):
        yield events.Progress(name, (before + done) * size, len(files), contents)
    yield events.Note(f"{name}: {len(files)} {contents}.")
    yield _sample(files, contents)


def store(job: Job) -> Shards:
    """Files of the world's scenes. Raises BadRecipe, AssetError."""
    p = job.recipe.images
    facts = {"seed": p.seed, "backdrops": p.backdrops, "art": art.fingerprint(job.art)}
    return Shards(
        job.folder("images"), p.count, p.shard, {**facts, "world": job.recipe.world, "pairs": p.pairs}
    )


def store_of_things(job: Job) -> Shards:
    """Files of the autoencoder's training images (things.py). Raises BadRecipe, AssetError."""
    p = job.recipe.images
    facts = {"seed": p.seed, "backdrops": p.backdrops, "art": art.fingerprint(job.art)}
    facts |= {"world": job.recipe.world, "photos": str(p.photos or "")}
    return Shards(job.folder("images-things"), p.things, p.shard, facts)


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
    """Held-out scenes for evaluation, with masks of their things: (n, 128, 128, 4) uint8."""
    from tools.tiny_training import things

    w = world_of(job.recipe.world, job.recipe.images.backdrops, job.art)
    return np.stack([things.draw(w, w.scene(EVALUATION_SEED, i, "test")) for i in range(n)])


def _sample(files: Shards, contents: str) -> events.ImageReady:
    from PIL import Image

    from minikin.images.encode import save_image
    from minikin.images.sheet import contact_sheet

    rows = files[np.arange(min(32, len(files)))]
    sheet = contact_sheet([Image.fromarray(r[..., :3]) for r in rows], columns=8)
    save_image(sheet, files.folder / "sample.png")
    return events.ImageReady(sheet, contents)
