"""The drawing score is high for a subject's held-out photos, low where only colours or only shapes agree."""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minikin.evaluation.drawing import Drawing, Match, compare, drawing_score
from minikin.tiny import vocabulary as words
from minikin.tiny.sprites import repaint_pattern
from minikin.tiny.world import Look, World

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("my_cat", "my_dog", "my_teapot", "my_robot")


@cache
def references(name: str) -> tuple[Drawing, ...]:
    masks = sorted((EXAMPLES / name / "masks").glob("*.png"))
    photos = [np.asarray(Image.open(EXAMPLES / name / f"{m.stem}.jpg").convert("RGB")) for m in masks]
    return tuple(
        Drawing.from_photo(p, np.asarray(Image.open(m).convert("L")))
        for p, m in zip(photos, masks, strict=True)
    )


def held_out_photos(name: str) -> list[np.ndarray]:
    paths = sorted((EXAMPLES / name / "unseen").glob("*.jpg"))[:3]
    return [np.asarray(Image.open(p).convert("RGB")) for p in paths]


@cache
def world() -> World:
    return World("wide", backdrops=2)


def scene_of(category: str, look: Look, k: int, art: str, code: str | None = None) -> np.ndarray:
    """Image of a thing in a look; `code` is a withheld drawing of an identity."""
    w = world()
    if code is not None:
        w.art.drawings.setdefault((category, art), {})[code] = w.art.identities[art, code]
    scene = w.decide(
        np.random.default_rng((7, k)), layout="single", background=("forest", "snow", "beach")[k % 3],
        category=category, look=look, size="", art=art,
    )  # fmt: skip
    things = tuple(replace(t, code=code or t.code) for t in scene.things)
    scene = replace(scene, things=things, sticker=False, treatment=None)
    return np.asarray(w.draw(scene)[0])


def mean(matches: list[Match]) -> float:
    return statistics.mean(m.score for m in matches)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_held_out_photos_score_high_and_hard_negatives_low(name: str) -> None:
    """Held-out photos of the subject score above .7. The same colours in another drawing, and the same drawing
    in other colours or another pattern, score below .62 and at least .2 below the photos."""
    i = words.IDENTITIES[name]
    photos = mean([drawing_score(p, references(name)) for p in held_out_photos(name)])
    other = "chair" if i.category != "chair" else "cat"
    same_colours = Look(None, i.pattern, i.colours)
    pattern = "stripes" if i.pattern != "stripes" else "checker"
    colours = ((40, 60, 60), (230, 120, 20)) if name != "my_teapot" else ((40, 160, 60), (235, 220, 235))
    cases = {
        "same colours, other drawing": (other, same_colours, "flat", None),
        "same drawing, other colours": (i.category, Look(None, i.pattern, colours), i.art, i.code),
        "same drawing, other pattern": (i.category, Look(None, pattern, i.colours), i.art, i.code),
    }
    assert photos > 0.7, photos
    for case, (category, look, art, code) in cases.items():
        score = mean(
            [drawing_score(scene_of(category, look, k, art, code), references(name)) for k in range(3)]
        )
        assert score < 0.62 and photos - score > 0.2, (case, score, photos)


def test_equal_images_score_one() -> None:
    r = references("my_cat")[0]
    match = compare(r.rgb, r.rgb, r.mask)
    assert match.hist == pytest.approx(1, abs=1e-4)
    assert match.pcc == pytest.approx(1, abs=1e-4)
    assert match.hog == pytest.approx(1, abs=1e-4)


def test_subject_is_located_by_its_mask() -> None:
    """The box is that of the pasted drawing, which has another scale and is mirrored."""
    rgba = world().art.identities["noto", "1f408"]
    i = words.IDENTITIES["my_cat"]
    drawing = Image.fromarray(repaint_pattern(rgba, i.pattern, *i.colours))
    image = Image.new("RGB", (128, 128), (200, 220, 255))
    small = drawing.resize((60, 60)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image.paste(small, (50, 30), small)
    match = drawing_score(np.asarray(image), [Drawing.from_rgba(np.asarray(drawing))])
    box = small.getchannel("A").point(lambda a: 255 * (a > 127)).getbbox()
    expected = (box[0] + 50, box[1] + 30, box[2] + 50, box[3] + 30)
    assert np.abs(np.array(match.box) - expected).max() <= 3, (match.box, expected)
    assert match.score > 0.8


def test_uniform_image_scores_zero_and_empty_mask_is_refused() -> None:
    assert drawing_score(np.full((128, 128, 3), 90, np.uint8), references("my_cat")[:1]).score == 0
    with pytest.raises(ValueError, match="mask is empty"):
        Drawing.from_photo(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), bool))
