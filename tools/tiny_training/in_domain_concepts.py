"""In-domain concepts: things of tiny's world and captions that name them, for students that follow concepts.

The things are drawn as in training (a category, one drawing of it, a two-colour pattern), so none is an
identity of `examples/`, on which concepts are evaluated. Five photos of each are taught in mode `value`.
Half of the captions are those of training scenes; in the other half a thing's name replaces its category.

    FOLDER/photos/thing00/   photos and masks        FOLDER/concepts/thing00.safetensors
    FOLDER/captions.txt      one caption a line
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from minikin import Studio, events
from minikin.files import atomic_write
from minikin.models.base import Base
from minikin.recipes import Teach
from minikin.tiny import vocabulary as words
from minikin.tiny.captions import caption
from minikin.tiny.world import Look, World, any_rgb, is_held_out

SEED, SCENES = 77, 5  # of the things, and the stream of the captions' scenes
BACKGROUNDS = (
    "meadow",
    "room",
    "plain_white",
    "beach",
    "city",
    "forest",
    "snow",
    "plain_blue",
    "desert",
    "night",
)
PHOTOS, TRIES = 5, 20
STRENGTHS = ("", "", "", ":0.8", ":0.6", ":1.2")  # half as taught


def make(
    base: Base, folder: Path, world: str, *, things: int, steps: int, captions: int
) -> Iterator[events.Event]:
    """Draw and teach the missing concepts, and write `captions` captions of either kind.

    Concepts that were taught on another base or in another number of steps are taught again.
    """
    drawer, studio = World(world, backdrops=8), Studio(base)
    _delete_outdated(folder, {"base": base.fingerprint, "text": base.text_hash, "world": world, "steps": steps})
    by_category: dict[str, list[str]] = {}
    for k in range(things):
        name, category = f"thing{k:02d}", drawer.spec.objects[(7 * k + 3) % len(drawer.spec.objects)]
        file = folder / "concepts" / f"{name}.safetensors"
        by_category.setdefault(category, []).append(name)
        if file.exists():
            continue
        photos = _photos(drawer, k, category, folder / "photos" / name)
        recipe: Teach = Teach.make(
            name=name, category=category, mode="value", max_steps=steps, preview=False, base=base.name
        )
        for event in studio.teaching(photos, recipe):
            if isinstance(event, events.Done):
                file.parent.mkdir(parents=True, exist_ok=True)
                event.result.save(file)
            else:
                yield event
    lines = _captions(World(world), by_category, captions)
    atomic_write(folder / "captions.txt", ("\n".join(lines) + "\n").encode())


def _delete_outdated(folder: Path, facts: dict[str, object]) -> None:
    """Delete concepts that were taught with other facts."""
    file, now = folder / "things.json", json.dumps(facts, indent=1) + "\n"
    if file.exists() and file.read_text() == now:
        return
    for old in (folder / "concepts").glob("thing*.safetensors"):
        old.unlink()
    atomic_write(file, now.encode())


def _photos(world: World, k: int, category: str, folder: Path) -> Path:
    """Draw photos of thing `k`, none of them a held-out scene; returns the folder."""
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    rng, arts = np.random.default_rng((SEED, k)), world.spec.art
    art = next(a for a in (arts[k % len(arts)], *arts) if world.art.has(category, a))
    patterns = tuple(words.PATTERNS)
    look = Look(None, patterns[k % len(patterns)], (any_rgb(rng), any_rgb(rng)))
    code, n = "", 0
    for background in BACKGROUNDS:
        for _ in range(TRIES):
            scene = world.decide(
                rng, layout="single", background=background, category=category, look=look, art=art
            )
            code = code or scene.things[0].code
            things = (replace(scene.things[0], code=code),)
            scene = replace(scene, things=things, sticker=False, treatment=None)
            if not is_held_out(scene):
                break
        else:
            continue
        image, masks = world.draw(scene)
        image.save(folder / f"{n:02d}.jpg", quality=92)
        Image.fromarray(masks[0]).save(folder / "masks" / f"{n:02d}.png")
        n += 1
        if n == PHOTOS:
            break
    return folder


def _captions(world: World, by_category: dict[str, list[str]], count: int) -> list[str]:
    """`count` captions of training scenes and as many that name a thing, shuffled."""
    plain: list[str] = []
    with_concepts: list[str] = []
    i = 0
    while len(with_concepts) < count:
        scene, rng = world.scene(SCENES, i), np.random.default_rng((SCENES, i, 9))
        scene_caption, i = caption(scene, rng), i + 1
        if len(plain) < count:
            plain.append(scene_caption.text)
        for category, start, end in scene_caption.nouns:
            if category in by_category and scene_caption.text[start:end] == category:  # no plural, no synonym
                strength = rng.choice(STRENGTHS)
                name = f"<{rng.choice(by_category[category])}{strength}>"
                with_concepts.append(scene_caption.text[:start] + name + scene_caption.text[end:])
                break
    lines = plain + with_concepts
    np.random.default_rng(3).shuffle(lines)
    return lines
