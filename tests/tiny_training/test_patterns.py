"""Random patterns: of every kind, within bounds, equal for equal seeds, inside the drawing's outline."""

from __future__ import annotations

import numpy as np
import pytest
from tools.tiny_training.patterns import KINDS, SHARES, paint, repaint, second_colour

from minikin.tiny.world import World


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_two_colours_at_most(kind: str) -> None:
    """The share of the second colour lies in [0, 1] and reaches both ends, except in plain paint."""
    shares = np.stack([second_colour(np.random.default_rng(i), kind, 64, 80, 16) for i in range(20)])
    assert shares.shape == (20, 64, 80)
    assert shares.min() >= 0 and shares.max() <= 1
    assert (shares.max() > 0.95) == (kind != "plain")
    assert shares.min() < 0.05


def test_patterns_depend_on_the_seed_alone() -> None:
    first, again, other = (paint(np.random.default_rng(s), 32, 32) for s in (1, 1, 2))
    assert np.array_equal(first, again) and not np.allclose(first, other)
    assert first.min() >= 0 and first.max() <= 1
    assert sum(SHARES) == pytest.approx(1)


def test_a_repainted_drawing_keeps_its_outline() -> None:
    rgba = next(iter(World("small", backdrops=1).art.drawings["teapot", "f3d"].values()))
    repainted = repaint(np.random.default_rng(3), rgba)
    assert np.abs(repainted[..., 3].astype(int) - rgba[..., 3]).max() <= 1
    assert np.abs(repainted[..., :3].astype(int) - rgba[..., :3]).mean() > 5
