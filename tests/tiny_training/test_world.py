"""The sticker world: determinism, true captions, held-out scenes, licences of the drawings."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minikin.errors import AssetError
from minikin.tiny import vocabulary as words
from minikin.tiny.captions import Caption, caption, plain_caption
from minikin.tiny.layouts import DRAWING, PERIODS
from minikin.tiny.world import RESOLUTION, Look, Scene, Thing, World, is_held_out

N = 400
RELATIONS = ("pair", "hat", "top", "on", "front", "hold", "in")  # of two things


@pytest.fixture(scope="module", params=["small", "rich", "wide"])
def world(request: pytest.FixtureRequest) -> World:
    return World(request.param, backdrops=2)


def test_same_seed_same_scene(world: World) -> None:
    again = World(world.spec.name, backdrops=2)
    for i in range(20):
        a, b = world.scene(3, i), again.scene(3, i)
        assert a == b
        assert np.array_equal(np.asarray(world.draw(a)[0]), np.asarray(again.draw(b)[0]))
    assert world.scene(3, 0) != world.scene(4, 0)


def test_held_out_combinations_never_train(world: World) -> None:
    train = [world.scene(1, i) for i in range(N)]
    test = [world.scene(1, i, "test") for i in range(N)]
    assert not any(is_held_out(s) for s in train)
    assert all(is_held_out(s) for s in test)
    train_pairs = {(c, s.background) for s in train for c in s.objects if s.layout == "single"}
    test_pairs = {(c, s.background) for s in test for c in s.objects if s.layout == "single"}
    assert not train_pairs & test_pairs


def test_identities_never_train(world: World) -> None:
    """No drawing of an identity, in any colour, is drawn in training."""
    for i in range(N):
        for thing in world.scene(2, i).things:
            assert (thing.art, thing.code) not in words.WITHHELD
            assert thing.identity is None


def true_words(scene: Scene) -> set[str]:
    """Every word that may be said of a scene."""
    text = "a an of in and the with background on plain against style nothing empty scene"
    allowed = {*text.split(), "picture", "white", "border", "sticker", "cute"}  # word: caption
    for phrase in words.GENERIC:
        allowed |= set(phrase.split())
    where = [scene.background[6:]] if scene.is_plain else list(words.BACKGROUNDS[scene.background])
    phrases = [*where, *words.ART_SETS[scene.art].words, *words.TREATMENTS.get(scene.treatment or "", ())]
    phrases += words.SIZES.get(scene.size or "", ())
    relations = {
        "pair": ("next to", "beside", "to the left of", "to the right of", "on the left", "on the right"),
        "hat": ("wearing", "on its head"),  # word: caption
        "top": ("on top of", "sitting on", "standing on"),
        "on": ("on top of", "sitting on", "standing on", "under", "below"),
        "front": ("in front of", "behind"),
        "in": ("in", "inside", "sitting in"),
        "hold": ("holding", "carrying"),
        "count": ("two", "three"),
    }
    phrases += relations.get(scene.layout, ())
    for thing in scene.things:
        c = words.CATEGORIES[thing.category]
        phrases += [c.name, c.plural, *c.synonyms, thing.look.colour or "", *(thing.look.colour_names or ())]
        phrases += words.PATTERNS.get(thing.look.pattern or "", ())
        phrases += ["dark"] if thing.look.colour == "black" else []
    return allowed | {w for p in phrases for w in p.split()}


def test_every_word_of_a_caption_is_true(world: World) -> None:
    for i in range(N):
        scene = world.scene(5, i)
        for k in range(3):
            text = caption(scene, np.random.default_rng((i, k))).text
            extra = set(re.findall(r"[\w'-]+", text)) - true_words(scene)
            assert not extra, (text, extra)
        if scene.count > 1:
            assert {2: "two", 3: "three"}[scene.count] in text


def looks_of(thing: Thing, scene: Scene) -> set[str]:
    """All that may stand between an article or a number and this thing's noun."""
    look = thing.look
    if look.colour:
        allowed = {look.colour} | ({"dark"} if look.colour == "black" else set())
    elif look.pattern:
        two = f"{' and '.join(look.colour_names)} " if look.colour_names else ""
        allowed = {two + adjective for adjective in words.PATTERNS[look.pattern]}
    else:
        allowed = {""}
    sizes = words.SIZES.get(scene.size or "", ())
    return allowed | {f"{size} {s}".strip() for size in sizes for s in allowed}


def in_the_order_said(scene: Scene, scene_caption: Caption) -> tuple[Thing, ...]:
    """The things as these words must name them, by where they are in the image."""
    things, nouns = scene.things, scene_caption.nouns
    text = scene_caption.text[nouns[0][2] : nouns[-1][1]] if nouns else ""  # between the nouns
    if scene.layout in ("pair", "trio"):
        return tuple(sorted(things, key=lambda t: t.centre_x, reverse="to the right of" in text))
    if scene.layout in ("top", "on"):  # the one above is named first
        return tuple(sorted(things, key=lambda t: t.bottom, reverse=" under " in text or " below " in text))
    if scene.layout == "front":  # the one in front is lower
        return tuple(sorted(things, key=lambda t: t.bottom, reverse=" behind " not in text))
    if scene.layout == "in":  # the inner one ends higher
        return tuple(sorted(things, key=lambda t: t.bottom))
    if scene.layout == "hold":  # who holds is the larger one
        return tuple(sorted(things, key=lambda t: -t.size))
    if scene.layout == "hat":
        return tuple(sorted(things, key=lambda t: words.CATEGORIES[t.category].kind == "hat"))
    return things[:1]


def false_of(scene: Scene, scene_caption: Caption) -> str:
    """What a caption says wrongly: whose look, or who does what to whom; "" when all is true."""
    expected = in_the_order_said(scene, scene_caption)
    if [n for n, *_ in scene_caption.nouns] != [t.category for t in expected]:
        return "order"
    for thing, (_, start, _) in zip(expected, scene_caption.nouns, strict=True):
        before = re.split(r"(?:^|\s)(?:an?|two|three)\s", scene_caption.text[:start])[-1].strip()
        if before not in looks_of(thing, scene):
            return f"'{before}' of {thing}"
    return ""


def test_every_look_and_relation_is_true_of_its_thing(world: World) -> None:
    """'A red cat and a blue dog' is false over a blue cat and a red dog, and so is who is on top of whom.

    Control: captions of the same scene with two looks or two things exchanged are false.
    """
    checked = dict.fromkeys(("look", *RELATIONS), 0)
    for i in range(1500):
        scene = world.scene(8, i)
        scene_caption = caption(scene, np.random.default_rng(i))
        assert not false_of(scene, scene_caption), (scene_caption.text, false_of(scene, scene_caption))
        if scene.layout not in RELATIONS:
            continue
        a, b = scene.things
        if looks_of(a, scene).isdisjoint(looks_of(b, scene)):
            exchanged = replace(a, look=b.look), replace(b, look=a.look)
            assert false_of(replace(scene, things=exchanged), scene_caption)
            checked["look"] += 1
        places = {"centre_x": b.centre_x, "bottom": b.bottom, "size": b.size}
        back = {"centre_x": a.centre_x, "bottom": a.bottom, "size": a.size}
        if scene.layout != "hat":  # a hat is named as a hat in either order
            assert false_of(replace(scene, things=(replace(a, **places), replace(b, **back))), scene_caption)
        checked[scene.layout] += 1
    there = dict(world.spec.layouts)
    assert checked["look"] > 50 and all(checked[r] > 20 for r in RELATIONS if r in there), checked


def test_left_and_right_are_true(world: World) -> None:
    """Two things are named from left to right, but where the words say the opposite."""
    counts = {True: 0, False: 0}
    for i in range(2000):
        scene = world.scene(6, i)
        if scene.layout != "pair":
            continue
        left, right = (t.category for t in sorted(scene.things, key=lambda t: t.centre_x))
        c = caption(scene, np.random.default_rng(i))
        order = [n for n, *_ in c.nouns]
        backwards = "to the right of" in c.text
        assert order == ([right, left] if backwards else [left, right])
        counts[backwards] += 1
    assert counts[True] > 10 and counts[False] > 100


def test_noun_spans_point_at_the_nouns(world: World) -> None:
    for i in range(100):
        scene = world.scene(7, i)
        c = caption(scene, np.random.default_rng(i))
        for category, start, end in c.nouns:
            spec = words.CATEGORIES[category]
            assert c.text[start:end] in (spec.name, spec.plural, *spec.synonyms)
            assert category in scene.objects


def test_masks_cover_their_things(world: World) -> None:
    """Removing a thing from the scene changes pixels inside its mask, and few outside (shadow, rim)."""
    from dataclasses import replace

    for i in range(30):
        scene = replace(world.scene(8, i), sticker=False, treatment=None)
        if scene.layout != "single":
            continue
        image, masks = world.draw(scene)
        bare, _ = world.draw(replace(scene, things=()))
        changed = (np.asarray(image, int) != np.asarray(bare, int)).any(-1)
        assert masks[0].shape == (RESOLUTION, RESOLUTION)
        assert changed[masks[0]].mean() > 0.85
        assert image.size == (RESOLUTION, RESOLUTION)


def test_plain_captions_name_what_and_where(world: World) -> None:
    for i in range(50):
        scene = world.scene(9, i)
        text = plain_caption(scene)
        assert all(c in text or words.CATEGORIES[c].plural in text for c in scene.objects)


def test_contents_of_the_small_world() -> None:
    s = words.SMALL
    assert len(s.objects) >= 16
    assert len(s.backgrounds) >= 8
    assert len(s.plain) >= 4
    assert len(s.art) == 2
    assert {"pair", "hat"} <= {name for name, _ in s.layouts}
    assert abs(sum(share for _, share in s.layouts) - 1) < 1e-9
    assert len(words.IDENTITIES) >= 8


def test_contents_of_the_rich_world() -> None:
    s, small = words.RICH, words.SMALL
    assert s.objects == small.objects
    assert set(s.backgrounds) > set(small.backgrounds) and len(s.backgrounds) >= 12
    assert set(s.art) == set(words.ART_SETS) and set(s.colours) > set(small.colours)
    assert {*RELATIONS, "trio"} - {name for name, _ in s.layouts} == {"top"}
    assert abs(sum(share for _, share in s.layouts) - 1) < 1e-9


def test_small_world_is_the_one_of_the_shipped_weights() -> None:
    """Its scenes and captions stay what they are: weights, encoders and published numbers rest on them."""
    small, digest, means = World("small", backdrops=1), hashlib.sha256(), []
    for split in ("train", "test"):
        for i in range(60):
            scene = small.scene(1, i, split)  # type: ignore[arg-type]
            digest.update(caption(scene, np.random.default_rng((1, i))).text.encode())
            for t in scene.things:
                digest.update(
                    f"{t.art} {t.code} {t.look.rgb} {t.centre_x:.3f} {t.bottom:.3f} {t.size:.3f}".encode()
                )
            means.append(np.asarray(small.draw(scene)[0]).mean())
    assert digest.hexdigest()[:16] == "9b374031fc18e627"
    assert np.mean(means) == pytest.approx(157.77, abs=0.2)


def test_periods_of_patterns_are_wide_enough_for_latents() -> None:
    """In the rich world at least 17 px, at every size of the thing."""
    rich = World("rich", backdrops=1)
    for i in range(N):
        for thing in rich.scene(11, i).things:
            if thing.look.pattern:
                assert PERIODS[thing.look.pattern] * thing.look.scale * thing.size / DRAWING > 17


def test_things_of_a_pair_are_large() -> None:
    rich = World("rich", backdrops=1)
    pairs = [s for i in range(N) if (s := rich.scene(12, i)).layout == "pair"]
    assert pairs and min(t.size for s in pairs for t in s.things) >= 56


def test_drawings_of_a_category_are_equally_frequent() -> None:
    """In the rich world, no drawing of a category is in twice as many scenes of one thing as another."""
    rich, counter = World("rich", backdrops=1), Counter[tuple[str, str, str]]()
    rng = np.random.default_rng(3)
    for k in range(1200):
        category = ("cat", "chair", "robot")[k % 3]
        (thing,) = rich.decide(rng, layout="single", category=category).things
        counter[category, thing.art, thing.code] += 1
    for category in ("cat", "chair", "robot"):
        counts = [n for (c, _, _), n in counter.items() if c == category]
        assert len(counts) == sum(len(rich.art.drawings.get((category, a), ())) for a in rich.spec.art) >= 3
        assert max(counts) < 2 * min(counts)


def test_subject_and_look_are_in_every_layout() -> None:
    """The given category is one of the things of every relation, with the given look."""
    rich, rng, look = World("rich", backdrops=1), np.random.default_rng(4), Look(colour="red")
    for layout in ("pair", "trio", "hat", "on", "front", "hold", "in"):
        for _ in range(10):
            things = rich.decide(rng, layout=layout, category="cat", look=look).things
            assert [t.look for t in things if t.category == "cat"] == [look]


def test_every_art_set_is_credited() -> None:
    import minikin.tiny

    text = (Path(minikin.tiny.__file__).parent / "art" / "LICENSES.md").read_text()
    for a in words.ART_SETS.values():
        assert a.package in text
        assert a.licence in text
    assert "CC-BY 4.0" in text
    assert "Copyright (c) Microsoft" in text


@pytest.mark.parametrize("damage", ["missing", "noise", "truncated", "other arrays"])
def test_damaged_art_pack(tmp_path: Path, damage: str) -> None:
    import minikin.tiny

    good = (Path(minikin.tiny.__file__).parent / "art" / "sprites.npz").read_bytes()
    path = tmp_path / "sprites.npz"
    if damage == "noise":
        path.write_bytes(bytes(1000))
    elif damage == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif damage == "other arrays":
        np.savez(path, a=np.zeros(3))
    with pytest.raises(AssetError, match="The art pack"):
        World("small", art=path)
