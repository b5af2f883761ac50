"""Identity recognition on tiny's world, by the vectors of its classifier.

The classifier was not trained on the identities; it gets some drawings of each as references and compares in
its own subject space, which is independent of the dual encoder's: what is tuned on one is checked by the other.
An image shows an identity when that one is the nearest of all references, noise among them, and nearer than a
threshold, which best separates it from other things of the same category.
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
from minikin.evaluation.intervals import Estimate, wilson_share
from minikin.tiny import vocabulary as words
from minikin.tiny.encoders.classifier import Classifier
from minikin.tiny.world import RESOLUTION, Scene, World

Side = Literal["left", "right", "all"]
Change = Callable[[np.ndarray], np.ndarray]  # images (n, 128, 128, 3) uint8 to the same

VIEWS = 16  # drawings of each thing, for references, for the threshold, and for the rates
LEARN, TUNE, MEASURE = 501, 502, 503  # their random streams
GRAINS = (1, 4, 16)  # px of noise
SIDES: tuple[Side, ...] = ("all", "left", "right")
OVERLAP = 8  # px that a half reaches beyond the middle
TEMPERATURES = np.geomspace(0.01, 1, 25)


@dataclass(frozen=True)
class Views:
    """Images (rows, VIEWS, 128, 128, 3), a row for each identity, and the side of the identity in each."""

    images: np.ndarray
    sides: tuple[tuple[Side, ...], ...]

    def vectors(self, classifier: Classifier) -> Tensor:
        """(names, VIEWS, d)"""
        masks = [half(s) for row in self.sides for s in row]
        flat = self.images.reshape(-1, *self.images.shape[2:])
        vectors = classifier.encode_subjects(flat, masks)
        return vectors.view(*self.images.shape[:2], -1)


def identity_views(world: World, names: Sequence[str], seed: int, change: Change | None = None) -> Views:
    """Drawings of the identities, alternately alone and in pairs."""

    def scene(k: int, i: int, name: str) -> Scene:
        rng = np.random.default_rng((seed, k, i))
        return world.decide(rng, layout="pair" if i % 2 else "single", identity=name)

    return _draw(world, [[scene(_number(n), i, n) for i in range(VIEWS)] for n in names], change)


def other_views(world: World, names: Sequence[str], seed: int, change: Change | None = None) -> Views:
    """Other things of the identities' categories, alone."""

    def scene(k: int, i: int, name: str) -> Scene:
        rng = np.random.default_rng((seed, k, i, 1))
        return world.decide(rng, layout="single", category=words.IDENTITIES[name].category)

    return _draw(world, [[scene(_number(n), i, n) for i in range(VIEWS)] for n in names], change)


def noise_views(seed: int) -> Views:
    """Noise of every grain, for every side."""
    rng = np.random.default_rng((seed, 2))
    images = [[noise(rng, GRAINS[i % len(GRAINS)]) for i in range(VIEWS)] for _ in SIDES]
    return Views(np.array(images), tuple((side,) * VIEWS for side in SIDES))


def noise(rng: np.random.Generator, grain: int) -> np.ndarray:
    """An image (128, 128, 3) uint8 of random squares of `grain` px."""
    n = RESOLUTION // grain
    return rng.integers(256, size=(n, n, 3), dtype=np.uint8).repeat(grain, 0).repeat(grain, 1)


class Identities:
    """Reference vectors of identities, with threshold and temperature.

    references           (names + noise, d) unit vectors, the names' first
    threshold            least cosine
    temperature          of `confidence`: with the lowest cross-entropy on held-out drawings
    true_positive_rate   share of held-out drawings of identities that are recognised
    false_positive_rate  share of held-out drawings of other things that are taken for the identity
    """

    def __init__(
        self, classifier: Classifier, names: tuple[str, ...], references: Tensor, threshold: float,
        temperature: float, true_positive_rate: Estimate, false_positive_rate: Estimate,
    ) -> None:  # fmt: skip
        self.classifier, self.names, self.references = classifier, names, references
        self.threshold, self.temperature = threshold, temperature
        self.true_positive_rate, self.false_positive_rate = true_positive_rate, false_positive_rate

    @classmethod
    def learn(
        cls, world: World, classifier: Classifier, names: Sequence[str],
        change: Change | None = None,
    ) -> Identities:  # fmt: skip
        """Draw the identities, choose threshold and temperature, and measure the rates on other drawings.

        Raises UnknownName.
        """
        for name in names:
            if name not in words.IDENTITIES:
                raise UnknownName("identity", name, words.IDENTITIES)
        vectors = identity_views(world, names, LEARN, change).vectors(classifier)
        # a network's answer to noise is arbitrary, but much the same for all noise; the embedded one's lies at
        # a cosine of .7 to one of the examples, so noise has references of its own
        noise_vectors = noise_views(LEARN).vectors(classifier).flatten(0, 1)
        references = torch.cat([F.normalize(vectors.mean(1), dim=-1), noise_vectors])

        def cosines(seed: int) -> list[Tensor]:  # (names, VIEWS, references): of the identities, of others
            both = identity_views(world, names, seed, change), other_views(world, names, seed, change)
            return [v.vectors(classifier) @ references.T for v in both]

        same, others = cosines(TUNE)
        threshold = _threshold(same, others)
        places = torch.arange(len(names)).repeat_interleave(VIEWS)
        true, false = (_is_identity(c.flatten(0, 1), places, threshold) for c in cosines(MEASURE))
        return cls(
            classifier, tuple(names), references, threshold, _temperature(same),
            wilson_share(int(true.sum()), len(true)), wilson_share(int(false.sum()), len(false)),
        )  # fmt: skip

    def recognise(self, images: np.ndarray, names: Sequence[str], sides: Sequence[Side]) -> np.ndarray:
        """Whether each image (n, 128, 128, 3) shows the identity named for it, in that half; (n,) bool."""
        cosines = self._cosines(images, sides)
        return _is_identity(cosines, torch.tensor(self._places(names)), self.threshold).numpy()

    def confidence(self, images: np.ndarray, names: Sequence[str], sides: Sequence[Side]) -> np.ndarray:
        """Probability (n,) of the named identity among all references: the confidence that CCD compares."""
        p = (self._cosines(images, sides) / self.temperature).softmax(-1)
        return p[torch.arange(len(p)), self._places(names)].numpy()

    def _cosines(self, images: np.ndarray, sides: Sequence[Side]) -> Tensor:
        return self.classifier.encode_subjects(images, [half(s) for s in sides]) @ self.references.T

    def _places(self, names: Sequence[str]) -> list[int]:
        for name in names:
            if name not in self.names:
                raise UnknownName("identity", name, self.names)
        return [self.names.index(n) for n in names]


def half(side: Side) -> np.ndarray | None:
    """Mask of a little more than one half of an image; None for all of it."""
    if side == "all":
        return None
    mask = np.zeros((RESOLUTION, RESOLUTION), bool)
    middle = RESOLUTION // 2
    mask[:, slice(0, middle + OVERLAP) if side == "left" else slice(middle - OVERLAP, None)] = True
    return mask


def _is_identity(cosines: Tensor, places: Tensor, threshold: float) -> Tensor:
    cosine = cosines[torch.arange(len(cosines)), places]
    return (cosine >= threshold) & (cosines.argmax(-1) == places)


def _draw(world: World, scenes: Sequence[Sequence[Scene]], change: Change | None) -> Views:
    flat = np.stack([np.asarray(world.draw(s)[0]) for row in scenes for s in row])
    images = (change(flat) if change else flat).reshape(len(scenes), VIEWS, *flat.shape[1:])
    return Views(images, tuple(tuple(_side(s) for s in row) for row in scenes))


def _side(scene: Scene) -> Side:
    if scene.layout == "single":
        return "all"
    return "left" if next(t.centre_x for t in scene.things if t.identity) < RESOLUTION / 2 else "right"


def _number(name: str) -> int:
    return list(words.IDENTITIES).index(name)


def _threshold(same: Tensor, others: Tensor) -> float:
    """The cosine with the largest difference of true and false positive rate, over things of one category.

    It is halfway between two measured cosines, so that rounding decides nothing.
    """
    each = np.arange(len(same))
    true, false = (x.numpy()[each, :, each].ravel() for x in (same, others))
    levels = np.unique(np.concatenate([[-1], true, false]))
    cuts = (levels[:-1] + levels[1:]) / 2
    gain = (true >= cuts[:, None]).mean(1) - (false >= cuts[:, None]).mean(1)
    best = np.flatnonzero(gain == gain.max())
    return float(cuts[best[len(best) // 2]])


def _temperature(same: Tensor) -> float:
    n = same.shape[0]
    truth = torch.arange(n).repeat_interleave(same.shape[1])
    losses = [float(F.cross_entropy(same.flatten(0, 1) / t, truth)) for t in TEMPERATURES]
    return float(TEMPERATURES[int(np.argmin(losses))])
