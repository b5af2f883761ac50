"""Hard negatives: images of one subject in different scenes, and of similar subjects.

An *identity* is one drawing in one look. Identities come in blocks of four of one category, each in two
scenes: A; the drawing of A in another look (half of the time in the same two colours, as my_cat and
my_cat2 of the examples); another drawing in A's look; and another drawing in another look. To separate
them an encoder must use drawing, pattern and colours, not the background.

Drawings of all categories and styles of the art pack are used, whatever the world, since more drawings
train a better encoder. Training never uses the drawings of the personal identities (the pack withholds
them) and every seventh drawing by a hash (split "test"), in the styles that scenes of the small world
never show.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from tools.tiny_training.job import storing

from minikin.errors import AssetError
from minikin.files import atomic_folder
from minikin.tiny import vocabulary as words
from minikin.tiny.encoders.fields import places, truth
from minikin.tiny.sprites import ArtPack, repaint
from minikin.tiny.world import Look, Rng, Scene, Split, World, any_rgb, pick

IDENTITIES, VIEWS = 4, 2  # of a block
BLOCK = IDENTITIES * VIEWS  # images
DISTINCT = 25.0  # smallest mean difference of two looks of a drawing, of 255
RESERVED_ART = ("noto", "twe")
IMAGES, MASKS = "pictures.npy", "masks.npy"  # word: files of builds since 0.1
LAYOUTS = (("single", 0.72), ("hat", 0.14), ("pair", 0.14))


@dataclass(frozen=True)
class Drawing:
    category: str
    art: str
    code: str


@dataclass(frozen=True)
class View:
    """One image of an identity: scene, subject of the scene, and number of the identity."""

    scene: Scene
    subject: int  # index into scene.things
    identity: int  # within the block, 0..3


def is_reserved(drawing: Drawing) -> bool:
    """True when this drawing is held out for testing."""
    name = f"likeness|{drawing.art}|{drawing.code}"  # word: hashed, so it decides which drawings are held out
    return drawing.art in RESERVED_ART and zlib.crc32(name.encode()) % 7 == 0


def drawings(pack: ArtPack, split: Split) -> dict[str, list[Drawing]]:
    """The drawings of a split, by category."""
    out: dict[str, list[Drawing]] = {}
    for (category, art), codes in sorted(pack.drawings.items()):
        for code in sorted(codes):
            d = Drawing(category, art, code)
            if is_reserved(d) == (split == "test"):
                out.setdefault(category, []).append(d)
    return out


def block(world: World, seed: int, index: int, split: Split = "train") -> tuple[View, ...]:
    """Block `index` of a seed: eight views of four identities, by identity."""
    rng = np.random.default_rng((seed, index, split == "test", 77))
    every = drawings(world.art, split)
    categories = [c for c in world.spec.objects if c in every]
    category = pick(rng, categories if categories and rng.random() < 0.6 else sorted(every))
    a, c, d = (every[category][int(k)] for k in rng.integers(len(every[category]), size=3))
    look = _look(rng, world.spec)
    looks = [look, _other(rng, world, a, look), look, _look(rng, world.spec)]
    if c == a:  # one drawing only: it has to be another look
        looks[2] = _other(rng, world, a, *looks[:2])
    looks[3] = _other(rng, world, d, *(k for k, x in zip(looks[:3], (a, a, c), strict=True) if x == d))
    return tuple(
        _view(world, rng, what, how, who)
        for who, (what, how) in enumerate(zip((a, a, c, d), looks, strict=True))
        for _ in range(VIEWS)
    )


def _look(rng: Rng, spec: words.WorldSpec) -> Look:
    """A random look, mostly a two-colour pattern, as personal things have."""
    roll = rng.random()
    if roll < 0.15:
        return Look()
    if roll < 0.35:
        return Look(colour=pick(rng, spec.colours))
    return Look(None, pick(rng, tuple(words.PATTERNS)), (any_rgb(rng), any_rgb(rng)))


def _other(rng: Rng, world: World, drawing: Drawing, *taken: Look) -> Look:
    """A look that differs visibly on this drawing from all `taken` looks."""
    rgba = world.art.drawings[drawing.category, drawing.art][drawing.code]
    for _ in range(50):
        base = taken[0] if taken else None
        if base and base.pattern and rng.random() < 0.5:  # the same colours in another pattern
            look = replace(base, pattern=pick(rng, tuple(words.PATTERNS)))
        else:
            look = _look(rng, world.spec)
        if all(_difference(rgba, look, t) > DISTINCT for t in taken):
            return look
    return Look(None, "checker", (any_rgb(rng), any_rgb(rng)))


def _difference(rgba: np.ndarray, first: Look, second: Look) -> float:
    if first == second:
        return 0.0
    a, b = (repaint(rgba, k)[..., :3].astype(np.int16) for k in (first, second))
    return float(np.abs(a - b)[rgba[..., 3] > 127].mean())


def _view(world: World, rng: Rng, drawing: Drawing, look: Look, who: int) -> View:
    layout = str(rng.choice([n for n, _ in LAYOUTS], p=[share for _, share in LAYOUTS]))
    if words.CATEGORIES[drawing.category].kind == "hat" and layout == "hat":
        layout = "single"
    with _only(world.art, drawing):
        scene = world.decide(rng, layout=layout, category=drawing.category, look=look, art=drawing.art)
    # _Plan gives the look to the subject alone and may have swapped a pair
    subject = next(i for i, t in enumerate(scene.things) if t.category == drawing.category)
    return View(replace(scene, treatment=None), subject, who)


@contextmanager
def _only(pack: ArtPack, drawing: Drawing) -> Iterator[None]:
    """Context in which the pack has one drawing of this category and style."""
    key = (drawing.category, drawing.art)
    every = pack.drawings[key]
    pack.extent(drawing.art, drawing.code)  # measured over all drawings, once
    pack.drawings[key] = {drawing.code: every[drawing.code]}
    try:
        yield
    finally:
        pack.drawings[key] = every


@dataclass(frozen=True)
class HardNegatives:
    """Rendered blocks of N images.

    images      (N, 128, 128, 3) uint8, memory-mapped
    masks       (N, 128, 16) of the subjects as packed bits, memory-mapped
    identity    (N,) numbers of the identities over all blocks
    needs_mask  (N,) True where the image shows a second thing
    labels      by field (N,) or (N, answers), and "places" (N, 2)
    """

    images: np.ndarray
    masks: np.ndarray
    identity: np.ndarray
    needs_mask: np.ndarray
    labels: dict[str, np.ndarray]

    @classmethod
    def draw(
        cls, folder: Path, world: World, blocks: int, seed: int, split: Split = "train", pack: str = ""
    ) -> HardNegatives:
        """Read the blocks from a folder in `folder`; they are rendered atomically at the first use.

        pack  fingerprint of the art pack, so that another pack gets another folder
        Raises StorageError, or AssetError for a damaged file.
        """
        name = "lookalikes"  # word: folder of builds since 0.1
        parts = (name, world.spec.name, split, seed, blocks, *([pack] if pack else []))
        path = folder / "-".join(map(str, parts))
        if not path.exists():
            with atomic_folder(path) as fresh, storing(path):
                _write(fresh, world, blocks, seed, split)
        try:
            with np.load(path / "labels.npz", allow_pickle=False) as z:
                labels = {name: z[name] for name in z.files}
            images, masks = (np.load(path / file, mmap_mode="r") for file in (IMAGES, MASKS))
        except (OSError, ValueError, EOFError, BadZipFile) as e:
            raise AssetError(f"{path} cannot be read ({e}). Delete the folder; it is drawn anew.") from e
        return cls(images, masks, labels.pop("identity"), labels.pop("needs_mask"), labels)

    def mask(self, at: np.ndarray) -> np.ndarray:
        """Boolean masks (len(at), 128, 128) of the subjects."""
        return np.unpackbits(self.masks[at], axis=-1).astype(bool)


def _write(path: Path, world: World, blocks: int, seed: int, split: Split) -> None:
    n = blocks * BLOCK
    mapped = np.lib.format.open_memmap
    images = mapped(path / IMAGES, mode="w+", dtype=np.uint8, shape=(n, 128, 128, 3))
    masks = mapped(path / MASKS, mode="w+", dtype=np.uint8, shape=(n, 128, 16))
    rows: list[dict[str, np.ndarray]] = []
    for b in range(blocks):
        for k, view in enumerate(block(world, seed, b, split)):
            image, scene_masks = world.draw(view.scene)
            i = b * BLOCK + k
            images[i] = np.asarray(image)
            masks[i] = np.packbits(scene_masks[view.subject], axis=-1)
            rows.append(
                {
                    "identity": np.array(b * IDENTITIES + view.identity),
                    "places": places(view.scene, world.spec),
                    "needs_mask": np.array(view.scene.layout == "pair"),
                    **truth(view.scene, world.spec),
                }
            )
    images.flush()
    masks.flush()
    labels: dict[str, Any] = {name: np.stack([r[name] for r in rows]) for name in rows[0]}
    np.savez(path / "labels.npz", **labels)
