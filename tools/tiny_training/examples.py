"""Example concepts: photos of the personal identities that training never sees.

    python -m tools.tiny_training.examples examples/

The folder NAME/ of an identity has five photos, their captions, masks/, category.txt, and in unseen/
five more photos, which are not used for teaching.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from minikin.tiny import vocabulary as words
from minikin.tiny.world import World

TRAIN_BACKGROUNDS = ("meadow", "room", "plain_white", "beach", "city")
TEST_BACKGROUNDS = ("forest", "snow", "plain_blue", "desert", "night")
QUALITY = 92  # of the JPEGs


def write(folder: Path, names: tuple[str, ...] = tuple(words.IDENTITIES)) -> None:
    """Write the example folders of these identities."""
    world = World("small", backdrops=8)
    for k, name in enumerate(names):
        identity_folder = folder / name
        (identity_folder / "masks").mkdir(parents=True, exist_ok=True)
        (identity_folder / "unseen").mkdir(exist_ok=True)
        (identity_folder / "category.txt").write_text(words.IDENTITIES[name].category + "\n")
        for i, background in enumerate((*TRAIN_BACKGROUNDS, *TEST_BACKGROUNDS)):
            rng = np.random.default_rng((31, k, i))
            scene = world.decide(rng, layout="single", background=background, identity=name)
            image, masks = world.draw(scene)
            if background in TRAIN_BACKGROUNDS:
                image.save(identity_folder / f"{i:02d}.jpg", quality=QUALITY)
                Image.fromarray(masks[0]).save(identity_folder / "masks" / f"{i:02d}.png", optimize=True)
                (identity_folder / f"{i:02d}.txt").write_text(f"a photo of {{}} {_place(background)}\n")
            else:
                image.save(identity_folder / "unseen" / f"{i:02d}.jpg", quality=QUALITY)


def _place(background: str) -> str:
    if background.startswith("plain_"):
        return f"on a {background[6:]} background"
    return words.BACKGROUNDS[background][0]


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "examples"))
