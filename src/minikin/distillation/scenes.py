"""Data source `scenes:small`: captioned scenes of tiny's world, drawn when they are needed.

Besides models, evaluation and cli this is the one module that knows tiny's world. The scenes have a
seed of their own, and combinations that the world holds out for tests never appear.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from minikin.errors import UnknownName
from minikin.tiny.captions import caption
from minikin.tiny.vocabulary import WORLDS
from minikin.tiny.world import World

SEED = 5  # of the scenes
WORDINGS = 4  # captions of every scene


class Scenes:
    """The first `count` scenes of a world: "small", "rich" or "wide". Raises UnknownName."""

    has_images = True

    def __init__(self, world: str, count: int) -> None:
        if world not in WORLDS:
            raise UnknownName("world", world, WORLDS)
        self.kind, self.count, self.world = world, count, World(world)

    def __len__(self) -> int:
        return self.count

    def captions(self, i: int) -> list[str]:
        scene = self.world.scene(SEED, i)
        return [caption(scene, np.random.default_rng((SEED, i, k))).text for k in range(WORDINGS)]

    def name(self, i: int) -> str:
        return f"scene {i}"

    def image(self, i: int) -> Image.Image:
        return self.world.draw(self.world.scene(SEED, i))[0]

    @property
    def identity(self) -> str:
        return f"scenes:{self.kind}:{SEED}:{WORDINGS}:{self.count}"
