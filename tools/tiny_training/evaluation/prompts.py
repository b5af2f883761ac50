"""Prompts of the evaluation and what each of them demands.

Prompts are captions of scenes of the "test" split: objects that training knows, in combinations that it
never had. `PromptSpec` holds only what the caption's words say, since nothing else can be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minikin.tiny import vocabulary as words
from minikin.tiny.captions import caption
from minikin.tiny.encoders.fields import slots_of
from minikin.tiny.world import Look, Scene, Thing, World, is_held_out, reserved

# layout -> share of the prompts; pairs are more frequent than in the world, to have enough for a measurement
SHARES = (("single", 0.50), ("pair", 0.30), ("hat", 0.10), ("count", 0.10))
RICH_SHARES = (
    ("single", 0.40), ("pair", 0.20), ("trio", 0.10), ("hat", 0.05), ("on", 0.05), ("front", 0.05),
    ("hold", 0.05), ("in", 0.05), ("count", 0.05),
)  # fmt: skip


@dataclass(frozen=True)
class ThingSpec:
    """One thing of a prompt: its category and colours, as far as the words name them."""

    category: str
    colour: str | None = None  # one named colour
    pattern: str | None = None
    paints: tuple[str, ...] = ()  # the two named colours of a pattern


@dataclass(frozen=True)
class PromptSpec:
    """A prompt and what its words demand; None where they leave it open."""

    prompt: str
    scene: Scene
    layout: str
    things: tuple[ThingSpec, ...]  # in the order of the slots (encoders.fields)
    background: str | None
    art: str | None
    size: str | None
    count: int | None  # of a count prompt
    has_sides: bool  # True when the words say left or right


def prompt_of(scene: Scene, seed: int) -> PromptSpec:
    """The caption of a scene as a prompt."""
    text = caption(scene, np.random.default_rng((seed, scene.index, 5))).text
    return PromptSpec(
        text,
        scene,
        scene.layout,
        tuple(_thing(t) for t in slots_of(scene)),
        scene.background if _says(text, _places(scene.background)) else None,
        scene.art if not scene.treatment and _says(text, words.ART_SETS[scene.art].words) else None,
        scene.size if scene.size and _says(text, words.SIZES[scene.size]) else None,
        scene.count if scene.layout == "count" else None,
        _says(text, ("on the left", "to the left of", "to the right of")),
    )


def prompts(world: World, n: int, seed: int) -> list[PromptSpec]:
    """n prompts in the shares above, from the first fitting scenes of a seed, shuffled."""
    layouts, all_shares = dict(world.spec.layouts), RICH_SHARES if world.spec.is_rich else SHARES
    missing = {layout: round(n * share) for layout, share in all_shares if layout in layouts}
    missing["single"] += n - sum(missing.values())
    out = []
    for scene in world.scenes(seed, split="test"):
        if missing.get(scene.layout, 0) > 0:
            missing[scene.layout] -= 1
            out.append(prompt_of(scene, seed))
        if not any(missing.values()):
            return [out[int(i)] for i in np.random.default_rng(seed).permutation(n)]
    raise AssertionError("the stream of scenes has no end")


def of_each(world: World, n: int, seed: int) -> list[PromptSpec]:
    """n one-object prompts of every kind of object, from held-out scenes where the kind has any."""
    out: list[PromptSpec] = []
    for place, kind in enumerate(world.spec.objects):
        rng, is_held = np.random.default_rng((seed, place)), bool(reserved(world.spec, kind))
        count = 0
        while count < n:
            scene = world.decide(rng, seed, len(out), layout="single", category=kind)
            if is_held_out(scene) == is_held:
                out.append(prompt_of(scene, seed))
                count += 1
    return [out[int(i)] for i in np.random.default_rng(seed).permutation(len(out))]


def _thing(thing: Thing) -> ThingSpec:
    look: Look = thing.look
    return ThingSpec(thing.category, look.colour, look.pattern, look.colour_names or ())


def _places(background: str) -> tuple[str, ...]:
    if background.startswith("plain_"):
        return (f"{background[6:]} background",)
    return words.BACKGROUNDS[background]


def _says(text: str, phrases: tuple[str, ...]) -> bool:
    return any(p in text for p in phrases)
