"""Colour fidelity separates the identities of the sticker world."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from benchmarks import colour_fidelity

from minikin.tiny import vocabulary as words
from minikin.tiny.world import World


@pytest.fixture(scope="module")
def descriptors() -> dict[str, list[np.ndarray]]:
    """Six images of every identity on different backgrounds, with true masks."""
    world = World("small", backdrops=4)
    out: dict[str, list[np.ndarray]] = {}
    for name in words.IDENTITIES:
        out[name] = []
        for k in range(6):
            scene = world.decide(np.random.default_rng((5, k)), layout="single", identity=name)
            image, masks = world.draw(scene)
            out[name].append(colour_fidelity.descriptor(np.asarray(image), masks[0]))
    return out


def auc(higher: list[float], lower: list[float]) -> float:
    a, b = np.array(higher)[:, None], np.array(lower)[None]
    return float((a > b).mean())


def test_identities_are_separated(descriptors: dict[str, list[np.ndarray]]) -> None:
    """The same thing on two backgrounds against two different things: AUC >= 0.99."""
    same = [
        colour_fidelity.similarity(a, b) for d in descriptors.values() for a, b in itertools.combinations(d, 2)
    ]
    other = [
        colour_fidelity.similarity(a, b)
        for first, second in itertools.combinations(descriptors.values(), 2)
        for a in first
        for b in second
    ]
    assert auc(same, other) >= 0.99


def test_stripes_are_separated_from_dots(descriptors: dict[str, list[np.ndarray]]) -> None:
    """my_cat and my_cat2 differ in pattern alone (same drawing, same two colours)."""
    first, second = descriptors["my_cat"], descriptors["my_cat2"]
    same = [colour_fidelity.similarity(a, b) for d in (first, second) for a, b in itertools.combinations(d, 2)]
    cross = [colour_fidelity.similarity(a, b) for a in first for b in second]
    assert auc(same, cross) >= 0.99


def test_similarity_bounds() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
    full, empty = np.ones((32, 32)), np.zeros((32, 32))
    d = colour_fidelity.descriptor(a, full)
    assert colour_fidelity.similarity(d, d) == pytest.approx(1.0)
    assert colour_fidelity.descriptor(a, empty).sum() == 0
    assert colour_fidelity.similarity(d, colour_fidelity.descriptor(a, empty)) == 0
