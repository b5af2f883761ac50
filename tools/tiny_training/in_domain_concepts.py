"""Things of tiny's own world and captions that name them: what a student learns to follow concepts by.

The things are drawn as training draws them (a kind, one drawing of it, a pattern in two colours), so none is
an identity that `examples/` shows and that concepts are judged by. Five photos of each are taught in mode value.
Half of the captions are those of training scenes; in the other half a thing's name stands for its kind.

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
    "meadow", "room", "plain_white", "beach", "city", "forest", "snow", "plain_blue", "desert", "night",
)  # fmt: skip
PHOTOS, TRIES = 5, 20
STRENGTHS = ("", "", "", ":0.8", ":0.6", ":1.2")  # half as taught


def make(
    base: Base, folder: Path, world: str, *, things: int, steps: int, captions: int
) -> Iterator[events.Event]:  # fmt: skip
    """Draw and teach what is not there yet, and write `captions` captions of either sort.

    What was taught otherwise (on another base, in another number of steps) is taught again.
    """
    drawn, studio = World(world, backdrops=8), Studio(base)
    _forget_others(folder, {"base": base.fingerprint, "text": base.text_hash, "world": world, "steps": steps})
    by_kind: dict[str, list[str]] = {}
    for k in range(things):
        name, kind = f"thing{k:02d}", drawn.spec.objects[(7 * k + 3) % len(drawn.spec.objects)]
        file = folder / "concepts" / f"{name}.safetensors"
        by_kind.setdefault(kind, []).append(name)
        if file.exists():
            continue
        photos = _photos(drawn, k, kind, folder / "photos" / name)
        recipe: Teach = Teach.make(
            name=name, category=kind, mode="value", max_steps=steps, preview=False, base=base.name
        )
        for event in studio.teaching(photos, recipe):
            if isinstance(event, events.Done):
                file.parent.mkdir(parents=True, exist_ok=True)
                event.result.save(file)
            else:
                yield event
    lines = _captions(World(world), by_kind, captions)
    atomic_write(folder / "captions.txt", ("\n".join(lines) + "\n").encode())


def _forget_others(folder: Path, facts: dict[str, object]) -> None:
    """Delete things that were not taught by these facts."""
    file, now = folder / "things.json", json.dumps(facts, indent=1) + "\n"
    if file.exists() and file.read_text() == now:
        return
    for old in (folder / "concepts").glob("thing*.safetensors"):
        old.unlink()
    atomic_write(file, now.encode())


def _photos(world: World, k: int, kind: str, folder: Path) -> Path:
    """Photos of thing `k`, none of a scene that is held out."""
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    rng, arts = np.random.default_rng((SEED, k)), world.spec.art
    art = next(a for a in (arts[k % len(arts)], *arts) if world.art.has(kind, a))
    patterns = tuple(words.PATTERNS)
    look = Look(None, patterns[k % len(patterns)], (any_rgb(rng), any_rgb(rng)))
    code, n = "", 0
    for background in BACKGROUNDS:
        for _ in range(TRIES):
            scene = world.decide(rng, layout="single", background=background, category=kind, look=look, art=art)
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


def _captions(world: World, by_kind: dict[str, list[str]], count: int) -> list[str]:
    """`count` captions of training scenes and as many that name a thing, in any order."""
    plain: list[str] = []
    named: list[str] = []
    i = 0
    while len(named) < count:
        scene, rng = world.scene(SCENES, i), np.random.default_rng((SCENES, i, 9))
        said, i = caption(scene, rng), i + 1
        if len(plain) < count:
            plain.append(said.text)
        for kind, start, end in said.nouns:
            if kind in by_kind and said.text[start:end] == kind:  # no plural, no synonym
                strength = rng.choice(STRENGTHS)
                name = f"<{rng.choice(by_kind[kind])}{strength}>"
                named.append(said.text[:start] + name + said.text[end:])
                break
    lines = plain + named
    np.random.default_rng(3).shuffle(lines)
    return lines
