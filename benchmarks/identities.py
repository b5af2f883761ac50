"""Is it this very thing? The world's classifier as an oracle of identities.

It never saw the identities; it is shown some drawings of each, as a person would be, and compares
by its own space of likeness (not the judge's, so that what is tuned on one is checked by the
other). An image shows an identity when that one is the nearest of all known, noise among them, and nearer
than a threshold, which is set where other things of the same category are told from it best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minikin.errors import UnknownName
from minikin.evaluation.intervals import Measured, share
from minikin.tiny import vocabulary as words
from minikin.tiny.encoders.classifier import Classifier
from minikin.tiny.world import RESOLUTION, Scene, World

Side = Literal["left", "right", "all"]
Change = Callable[[np.ndarray], np.ndarray]  # images (n, 128, 128, 3) uint8 to the same

VIEWS = 16  # drawings of each thing, for learning, for the threshold, and for measuring
LEARN, TUNE, MEASURE = 501, 502, 503  # the streams they come from
GRAINS = (1, 4, 16)  # px of noise
SIDES: tuple[Side, ...] = ("all", "left", "right")
OVERLAP = 8  # px that a half reaches beyond the middle
TEMPERATURES = np.geomspace(0.01, 1, 25)


@dataclass(frozen=True)
class Views:
    """Images (rows, VIEWS, 128, 128, 3), a row for each identity, and where to look in them."""

    pictures: np.ndarray
    sides: tuple[tuple[Side, ...], ...]

    def vectors(self, classifier: Classifier) -> Tensor:
        """(names, VIEWS, d)"""
        masks = [half(s) for row in self.sides for s in row]
        flat = self.pictures.reshape(-1, *self.pictures.shape[2:])
        vectors = classifier.likeness(flat, masks)
        return vectors.view(*self.pictures.shape[:2], -1)


def own_views(world: World, names: Sequence[str], seed: int, change: Change | None = None) -> Views:
    """The identities themselves, alone and in pairs by turns."""

    def scene(k: int, i: int, name: str) -> Scene:
        rng = np.random.default_rng((seed, k, i))
        return world.decide(rng, layout="pair" if i % 2 else "single", identity=name)

    return _drawn(world, [[scene(_number(n), i, n) for i in range(VIEWS)] for n in names], change)


def other_views(world: World, names: Sequence[str], seed: int, change: Change | None = None) -> Views:
    """Other things of the identities' categories, alone."""

    def scene(k: int, i: int, name: str) -> Scene:
        rng = np.random.default_rng((seed, k, i, 1))
        return world.decide(rng, layout="single", category=words.IDENTITIES[name].category)

    return _drawn(world, [[scene(_number(n), i, n) for i in range(VIEWS)] for n in names], change)


def noise_views(seed: int) -> Views:
    """Noise of every grain, for every side."""
    rng = np.random.default_rng((seed, 2))
    pictures = [[noise(rng, GRAINS[i % len(GRAINS)]) for i in range(VIEWS)] for _ in SIDES]
    return Views(np.array(pictures), tuple((side,) * VIEWS for side in SIDES))


def noise(rng: np.random.Generator, grain: int) -> np.ndarray:
    """An image (128, 128, 3) uint8 of random squares of `grain` px."""
    n = RESOLUTION // grain
    return rng.integers(256, size=(n, n, 3), dtype=np.uint8).repeat(grain, 0).repeat(grain, 1)


class Identities:
    """What each identity looks like to the classifier, and how sure is sure enough.

    references  (names + noise, d) unit vectors, the names' first
    threshold   least cosine
    temperature of `confidence`: the one under which held-out drawings are least surprising
    found, mistaken  on drawings kept apart: identities that were recognised; other things taken for one
    """

    def __init__(
        self, classifier: Classifier, names: tuple[str, ...], references: Tensor, threshold: float,
        temperature: float, found: Measured, mistaken: Measured,
    ) -> None:  # fmt: skip
        self.classifier, self.names, self.references = classifier, names, references
        self.threshold, self.temperature = threshold, temperature
        self.found, self.mistaken = found, mistaken

    @classmethod
    def learn(
        cls, world: World, classifier: Classifier, names: Sequence[str],
        change: Change | None = None,
    ) -> Identities:  # fmt: skip
        """Draw the identities, compare, and measure on drawings kept apart. Raises UnknownName."""
        for name in names:
            if name not in words.IDENTITIES:
                raise UnknownName("identity", name, words.IDENTITIES)
        vectors = own_views(world, names, LEARN, change).vectors(classifier)
        # a network's answer to noise is arbitrary, but much the same for all noise; the embedded one's lies at
        # a cosine of .7 to one of the examples, so noise has references of its own
        nothing = noise_views(LEARN).vectors(classifier).flatten(0, 1)
        references = torch.cat([F.normalize(vectors.mean(1), dim=-1), nothing])

        def cosines(seed: int) -> list[Tensor]:  # (names, VIEWS, references): of the identities, of others
            both = own_views(world, names, seed, change), other_views(world, names, seed, change)
            return [v.vectors(classifier) @ references.T for v in both]

        own, others = cosines(TUNE)
        threshold = _threshold(own, others)
        places = torch.arange(len(names)).repeat_interleave(VIEWS)
        found, mistaken = (_is_own(c.flatten(0, 1), places, threshold) for c in cosines(MEASURE))
        return cls(
            classifier, tuple(names), references, threshold, _temperature(own),
            share(int(found.sum()), len(found)), share(int(mistaken.sum()), len(mistaken)),
        )  # fmt: skip

    def recognise(self, pictures: np.ndarray, names: Sequence[str], sides: Sequence[Side]) -> np.ndarray:
        """Whether each image (n, 128, 128, 3) shows the identity named for it, in that half; (n,) bool."""
        cosines = self._cosines(pictures, sides)
        return _is_own(cosines, torch.tensor(self._places(names)), self.threshold).numpy()

    def confidence(self, pictures: np.ndarray, names: Sequence[str], sides: Sequence[Side]) -> np.ndarray:
        """The probability (n,) of the named identity among all known, and noise: what CCD compares."""
        p = (self._cosines(pictures, sides) / self.temperature).softmax(-1)
        return p[torch.arange(len(p)), self._places(names)].numpy()

    def _cosines(self, pictures: np.ndarray, sides: Sequence[Side]) -> Tensor:
        return self.classifier.likeness(pictures, [half(s) for s in sides]) @ self.references.T

    def _places(self, names: Sequence[str]) -> list[int]:
        for name in names:
            if name not in self.names:
                raise UnknownName("identity", name, self.names)
        return [self.names.index(n) for n in names]


def half(side: Side) -> np.ndarray | None:
    """The mask of one half of an image, a little more than half; None for all of it."""
    if side == "all":
        return None
    mask = np.zeros((RESOLUTION, RESOLUTION), bool)
    middle = RESOLUTION // 2
    mask[:, slice(0, middle + OVERLAP) if side == "left" else slice(middle - OVERLAP, None)] = True
    return mask


def _is_own(cosines: Tensor, places: Tensor, threshold: float) -> Tensor:
    own = cosines[torch.arange(len(cosines)), places]
    return (own >= threshold) & (cosines.argmax(-1) == places)


def _drawn(world: World, scenes: Sequence[Sequence[Scene]], change: Change | None) -> Views:
    flat = np.stack([np.asarray(world.draw(s)[0]) for row in scenes for s in row])
    pictures = (change(flat) if change else flat).reshape(len(scenes), VIEWS, *flat.shape[1:])
    return Views(pictures, tuple(tuple(_side(s) for s in row) for row in scenes))


def _side(scene: Scene) -> Side:
    if scene.layout == "single":
        return "all"
    return "left" if next(t.centre_x for t in scene.things if t.identity) < RESOLUTION / 2 else "right"


def _number(name: str) -> int:
    return list(words.IDENTITIES).index(name)


def _threshold(own: Tensor, others: Tensor) -> float:
    """The cosine that tells an identity from others of its category best: largest true less false share.

    Halfway between two measured cosines, so that rounding decides nothing.
    """
    each = np.arange(len(own))
    same, other = (x.numpy()[each, :, each].ravel() for x in (own, others))
    levels = np.unique(np.concatenate([[-1], same, other]))
    cuts = (levels[:-1] + levels[1:]) / 2
    gain = (same >= cuts[:, None]).mean(1) - (other >= cuts[:, None]).mean(1)
    best = np.flatnonzero(gain == gain.max())
    return float(cuts[best[len(best) // 2]])


def _temperature(own: Tensor) -> float:
    n = own.shape[0]
    truth = torch.arange(n).repeat_interleave(own.shape[1])
    losses = [float(F.cross_entropy(own.flatten(0, 1) / t, truth)) for t in TEMPERATURES]
    return float(TEMPERATURES[int(np.argmin(losses))])
