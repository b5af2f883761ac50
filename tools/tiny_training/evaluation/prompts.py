"""Which prompts are drawn, and what each of them asks for.

Captions of scenes of the "test" split: kinds of objects that training knows, in combinations it never
saw. What a caption leaves out cannot be wrong, so `Asked` holds only what the words say.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minikin.tiny import vocabulary as words
from minikin.tiny.captions import caption
from minikin.tiny.encoders.fields import slots_of
from minikin.tiny.world import Look, Scene, Thing, World, is_held_out, reserved

# layout -> share of the prompts; more pairs than in the world, whose share would be too few to measure
SHARES = (("single", 0.50), ("pair", 0.30), ("hat", 0.10), ("count", 0.10))


@dataclass(frozen=True)
class AskedThing:
    """One thing: its category and how the words say it is painted."""

    category: str
    colour: str | None = None  # one named colour
    pattern: str | None = None
    paints: tuple[str, ...] = ()  # the two named colours of a pattern


@dataclass(frozen=True)
class Asked:
    """A prompt and what it asks for; None where the words leave it open."""

    prompt: str
    scene: Scene
    layout: str
    things: tuple[AskedThing, ...]  # left and right; wearer and hat
    background: str | None
    art: str | None
    size: str | None
    count: int | None  # of a count prompt
    has_sides: bool  # whether it says what is left or right


def ask(scene: Scene, seed: int) -> Asked:
    """The caption of a scene and what it says."""
    text = caption(scene, np.random.default_rng((seed, scene.index, 5))).text
    return Asked(
        text,
        scene,
        scene.layout,
        tuple(_thing(t) for t in slots_of(scene) if t is not None),
        scene.background if _says(text, _places(scene.background)) else None,
        scene.art if not scene.treatment and _says(text, words.ART_SETS[scene.art].words) else None,
        scene.size if scene.size and _says(text, words.SIZES[scene.size]) else None,
        scene.count if scene.layout == "count" else None,
        _says(text, ("on the left", "to the left of", "to the right of")),
    )


def prompts(world: World, n: int, seed: int) -> list[Asked]:
    """n prompts in the shares above, from the first scenes of the stream `seed` that fit, mixed."""
    known = {name for name, _ in world.spec.layouts}
    want = {layout: round(n * share) for layout, share in SHARES if layout in known}
    want["single"] += n - sum(want.values())
    out = []
    for scene in world.scenes(seed, split="test"):
        if want.get(scene.layout, 0) > 0:
            want[scene.layout] -= 1
            out.append(ask(scene, seed))
        if not any(want.values()):
            return [out[int(i)] for i in np.random.default_rng(seed).permutation(n)]
    raise AssertionError("the stream of scenes has no end")


def of_each(world: World, n: int, seed: int) -> list[Asked]:
    """n one-object prompts of every kind of object, held out where something of a kind is reserved."""
    out: list[Asked] = []
    for place, kind in enumerate(world.spec.objects):
        rng, held = np.random.default_rng((seed, place)), bool(reserved(world.spec, kind))
        found = 0
        while found < n:
            scene = world.decide(rng, seed, len(out), layout="single", category=kind)
            if is_held_out(scene) == held:
                out.append(ask(scene, seed))
                found += 1
    return [out[int(i)] for i in np.random.default_rng(seed).permutation(len(out))]


def _thing(thing: Thing) -> AskedThing:
    look: Look = thing.look
    return AskedThing(thing.category, look.colour, look.pattern, look.named or ())


def _places(background: str) -> tuple[str, ...]:
    if background.startswith("plain_"):
        return (f"{background[6:]} background",)
    return words.BACKGROUNDS[background]


def _says(text: str, phrases: tuple[str, ...]) -> bool:
    return any(p in text for p in phrases)
