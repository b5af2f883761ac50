"""Images of the category that the base paints itself, for prior preservation and regularisation.

Kept in the cache by base, prompt and size, one file an image, so that an interrupted painting goes on
and a thousand runs paint them once. What is taught from is always what the files hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from minikin import events
from minikin.files import cache_folder
from minikin.generation.plan import plan
from minikin.generation.sampler import paint_batch
from minikin.images.encode import save_image
from minikin.images.photos import Photo, load_photo
from minikin.models.base import Base
from minikin.models.prompt import article, parse
from minikin.recipes import Paint

BATCH = 4
FIRST_SEED = 1_000_000  # far from the seeds anything is judged by


def prompt(category: str) -> str:
    """The class prompt of DreamBooth."""
    return f"a photo of {article(category)} {category}"


def folder(base: Base, recipe: Paint) -> Path:
    """Where the images of this recipe lie."""
    decided = plan(base, recipe).recipe.model_dump(exclude={"base", "n", "seed", "device", "dtype"})
    facts = json.dumps([base.fingerprint, base.text_hash, str(base.dtype), decided], sort_keys=True)
    return cache_folder() / "class-pictures" / hashlib.sha256(facts.encode()).hexdigest()[:24]


def class_pictures(base: Base, category: str, n: int) -> Iterator[events.Event]:
    """Paint those of `n` images that are missing; the last event is Done with all as photos."""
    text = prompt(category)
    recipe = Paint(prompt=text, base=base.name, batch=BATCH)
    where = folder(base, recipe)
    paths = [where / f"{i:05d}.png" for i in range(n)]
    for first in range(0, n, BATCH):
        group = range(first, first + BATCH)  # always whole: an image is then the same whatever is missing
        if all(p.is_file() for p in paths[first : first + BATCH]):
            continue
        made = paint_batch(base, recipe, parse(text, {}), {}, [FIRST_SEED + i for i in group])
        for i, one in zip(group, made, strict=True):
            save_image(one.image, where / f"{i:05d}.png")
        yield events.Progress("class images", min(first + BATCH, n), n)
    photos: list[Photo] = [load_photo(p) for p in paths]
    yield events.Done(photos, {"folder": str(where)})
