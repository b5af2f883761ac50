"""Evaluation of tiny models: prompts, rules for a correct image, intervals, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tools.tiny_training import evaluate
from tools.tiny_training.evaluation.model import Model, psnr
from tools.tiny_training.evaluation.prompts import (
    RICH_SHARES,
    PromptSpec,
    ThingSpec,
    of_each,
    prompt_of,
    prompts,
)
from tools.tiny_training.evaluation.report import by_category, shares
from tools.tiny_training.evaluation.rules import Answers, score, score_all

from minikin.errors import BadModelFile
from minikin.evaluation import intervals
from minikin.tiny import vocabulary as words
from minikin.tiny.encoders import weights
from minikin.tiny.encoders.classifier import Classifier
from minikin.tiny.world import Look, World, is_held_out, reserved

NEEDS_WEIGHTS = pytest.mark.skipif(
    not weights.embedded("classifier").exists(), reason="the classifier's weights are not in this checkout yet"
)


@pytest.fixture(scope="module")
def world() -> World:
    return World("small", backdrops=8)


@pytest.fixture(scope="module")
def specs(world: World) -> list[PromptSpec]:
    return prompts(world, 120, 11)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(device="cpu")


# ---- prompts ---------------------------------------------------------------------------------


def test_prompts_are_held_out_and_in_their_shares(specs: list[PromptSpec]) -> None:
    assert len(specs) == 120
    assert all(is_held_out(a.scene) for a in specs)
    layouts = [a.layout for a in specs]
    counts = {k: layouts.count(k) for k in set(layouts)}
    assert counts == {"single": 60, "pair": 36, "hat": 12, "count": 12}


def test_prompts_of_the_rich_world_have_every_layout() -> None:
    layouts = [a.layout for a in prompts(World("rich", backdrops=1), 60, 11)]
    assert {k: layouts.count(k) for k in set(layouts)} == {k: round(60 * share) for k, share in RICH_SHARES}


def test_prompt_spec_holds_only_what_the_words_say(specs: list[PromptSpec]) -> None:
    for a in specs:
        words_of = a.prompt
        assert a.has_sides == (" left" in words_of or " right" in words_of)
        names_art = any(w in words_of for s in words.ART_SETS.values() for w in s.words)
        assert (a.art is not None) == names_art
        for t in a.things:
            assert t.colour is None or t.colour in words_of
            assert all(p in words_of for p in t.paints)
    assert any(a.background is None for a in specs) and any(a.background for a in specs)


def test_sides_follow_the_scene(world: World) -> None:
    """ "a dog to the left of a cat" asks for the dog first, however the scene lists its things."""
    rng = np.random.default_rng(2)
    for _ in range(40):
        scene = world.decide(rng, layout="pair")
        a = prompt_of(scene, 0)
        left = min(scene.things, key=lambda t: t.centre_x)
        assert a.things[0].category == left.category


# ---- rules -----------------------------------------------------------------------------------

PAIR = PromptSpec(
    "a dog to the left of a cat in the snow",
    None,
    "pair",  # type: ignore[arg-type]
    (ThingSpec("dog"), ThingSpec("cat")),
    "snow",
    None,
    None,
    None,
    True,
)
ANSWERS = Answers("snow", "f3d", "normal", "2", "pair", ("dog", "cat"), "as drawn", "as drawn", frozenset())


def test_a_pair_and_its_sides() -> None:
    assert score(PAIR, ANSWERS) == {"background": True, "both": True, "relation": True}
    swapped = replace(ANSWERS, objects=("cat", "dog"))
    assert score(PAIR, swapped) == {"background": True, "both": True, "relation": False}
    twice = replace(ANSWERS, objects=("dog", "dog"), background="beach")
    assert score(PAIR, twice) == {"background": False, "both": False, "relation": False}
    assert "relation" not in score(replace(PAIR, has_sides=False), ANSWERS)


def test_three_things_in_any_order() -> None:
    things = (ThingSpec("dog"), ThingSpec("cat"), ThingSpec("car"))
    three = replace(PAIR, layout="trio", things=things, has_sides=False, background=None)
    assert score(three, replace(ANSWERS, objects=("car", "dog", "cat"))) == {"three": True}
    assert score(three, replace(ANSWERS, objects=("dog", "dog", "cat"))) == {"three": False}


def test_interaction_needs_its_layout_and_its_order() -> None:
    on = replace(PAIR, layout="on", has_sides=False, background=None)
    assert score(on, replace(ANSWERS, layout="on")) == {"interaction": True}
    assert score(on, ANSWERS) == {"interaction": False}
    assert score(on, replace(ANSWERS, layout="on", objects=("cat", "dog"))) == {"interaction": False}


def test_colours_and_patterns() -> None:
    def single(thing: ThingSpec) -> PromptSpec:
        return replace(PAIR, layout="single", things=(thing,), has_sides=False, background=None)

    red = replace(ANSWERS, objects=("cat", "none"), colour="red", pattern="as drawn")
    striped = replace(red, colour="pattern", pattern="stripes", paints=frozenset({"red", "blue"}))
    assert score(single(ThingSpec("cat", colour="red")), red) == {"object": True, "colour": True}
    assert score(single(ThingSpec("cat", colour="blue")), red) == {"object": True, "colour": False}
    both = single(ThingSpec("cat", pattern="stripes", paints=("red", "blue")))
    assert score(both, striped) == {"object": True, "colour": True, "pattern": True}
    other = replace(striped, paints=frozenset({"red", "green"}))
    assert score(both, other) == {"object": True, "colour": False, "pattern": True}
    assert score(both, red) == {"object": True, "colour": False, "pattern": False}
    free = single(ThingSpec("cat", pattern="dots"))
    assert score(free, striped) == {"object": True, "pattern": False}


def test_count_needs_the_right_category() -> None:
    three = replace(PAIR, layout="count", things=(ThingSpec("cat"),), count=3, has_sides=False, background=None)
    answers = replace(ANSWERS, objects=("cat", "none"), count="3")
    assert score(three, answers) == {"count": True}
    assert score(three, replace(answers, count="2")) == {"count": False}
    assert score(three, replace(answers, objects=("dog", "none"))) == {"count": False}


@NEEDS_WEIGHTS
def test_upper_bound_is_high_and_shuffled_prompts_fail(world: World, specs: list[PromptSpec]) -> None:
    """Scenes the world draws for the prompts are right; the same scenes for the next prompts are not."""
    predictions = Classifier.open().predict(np.stack([np.asarray(world.draw(a.scene)[0]) for a in specs]))
    right = shares(score_all(specs, predictions))
    assert right["object"].value >= 0.90 and right["background"].value >= 0.93 and right["both"].value >= 0.80
    moved = shares(score_all([*specs[1:], specs[0]], predictions))
    assert moved["object"].value < 0.3 and moved["background"].value < 0.4
    table = by_category(specs, score_all(specs, predictions))
    assert sum(m.n for m in table.values()) == 60


# ---- intervals -------------------------------------------------------------------------------


def test_wilson_interval() -> None:
    """Against published values: 9 of 10 gives [0.596, 0.982], 0 of 10 gives [0, 0.278]."""
    m = intervals.wilson_share(9, 10)
    assert (m.value, m.low, m.high) == (0.9, pytest.approx(0.5958, abs=1e-3), pytest.approx(0.9821, abs=1e-3))
    assert intervals.wilson_share(0, 10).low == 0 and intervals.wilson_share(0, 10).high == pytest.approx(
        0.2775, abs=1e-3
    )
    assert intervals.wilson_share(0, 0).n == 0


def test_intervals_have_their_coverage() -> None:
    """Of 400 samples of 60 throws at 0.85, about 95 % of the intervals hold 0.85 (4 se: 90.6 to 99.4)."""
    rng = np.random.default_rng(0)
    throws = rng.random((400, 60)) < 0.85
    results = [intervals.wilson_share(int(t.sum()), 60) for t in throws]
    assert 0.906 <= np.mean([m.low <= 0.85 <= m.high for m in results]) <= 0.994
    values = rng.normal(3, 1, (100, 80))
    means = [intervals.bootstrap_mean(v) for v in values]
    assert 0.85 <= np.mean([m.low <= 3 <= m.high for m in means])


def test_psnr() -> None:
    a = np.full((2, 4, 4, 3), 100, np.uint8)
    b = a.copy()
    b[1] += 10
    assert psnr(a, b)[1] == pytest.approx(20 * np.log10(25.5))
    assert psnr(a, b)[0] > 100


# ---- the model and the command ---------------------------------------------------------------


def test_image_does_not_depend_on_its_batch(model: Model) -> None:
    """bfloat16 rounds a little differently by batch: less than 2 of 255 on average."""
    texts = ["a cat on the beach", "a dog", "a red car in the snow"]
    single = np.concatenate(list(model.draw(texts, steps=2, guidance=4.0, seed=3, batch=1)))
    all_ = np.concatenate(list(model.draw(texts, steps=2, guidance=4.0, seed=3)))
    assert np.abs(single.astype(int) - all_).mean() < 2
    other = next(model.draw(texts, steps=2, guidance=4.0, seed=4))
    assert np.abs(other.astype(int) - all_).mean() > 10


def test_v_loss_is_repeatable_and_needs_the_right_words(model: Model, world: World) -> None:
    """The same every time; with captions of other scenes it rises."""
    scenes = [world.scene(21, i, "test") for i in range(10)]
    images = np.stack([np.asarray(world.draw(s)[0]) for s in scenes])
    texts = [prompt_of(s, 0).prompt for s in scenes]
    first, second = model.v_loss(images, texts, 0), model.v_loss(images, texts, 0)
    assert np.array_equal(first.each, second.each) and first.each.mean() == pytest.approx(
        np.mean(first.quarters)
    )
    assert model.v_loss(images, texts[1:] + texts[:1], 0).each.mean() > first.each.mean() + 0.01


@NEEDS_WEIGHTS
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, grid = tmp_path / "e.json", tmp_path / "e.png"
    code = evaluate.main(
        ["--images", "4", "--steps", "2", "--json", str(out), "--grid", str(grid), "--device", "cpu"]
    )
    assert code == 0
    report = json.loads(out.read_text())
    assert report["settings"] == {
        "pictures": 4,  # word: JSON key
        "each": 0,
        "steps": 2,
        "guidance": 3.0,
        "seed": 0,
        "world": "small",
    }
    assert set(report["drawn"]) == set(report["ceiling"]) and report["captions"] == [None, None]
    assert grid.read_bytes().startswith(b"\x89PNG")
    assert "held-out scenes" in capsys.readouterr().out


def test_of_each_has_every_category_equally_often(world: World) -> None:
    """Held out wherever something is reserved; three kinds have nothing reserved and are asked, too."""
    specs = of_each(world, 3, 7001)
    kinds = [a.scene.objects[0] for a in specs]
    assert {k: kinds.count(k) for k in kinds} == dict.fromkeys(world.spec.objects, 3)
    never_held_out = {k for k in world.spec.objects if not reserved(world.spec, k)}
    assert never_held_out == {"cat", "penguin", "teapot"}
    assert {a.scene.objects[0] for a in specs if not is_held_out(a.scene)} == never_held_out
    assert all(a.layout == "single" for a in specs)
    assert len({a.prompt for a in specs}) > 40


def test_bad_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--images", "0"]) == 2
    assert "--images 0" in capsys.readouterr().err
    assert evaluate.main(["--model", str(tmp_path)]) == 3
    assert "no model_index.json" in capsys.readouterr().err
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(BadModelFile, match="could not be opened"):
        Model(tmp_path)


def test_colour_word_is_in_the_prompt_spec(world: World) -> None:
    scene = world.decide(np.random.default_rng(0), layout="single", category="cat", look=Look(colour="red"))
    assert prompt_of(scene, 0).things == (ThingSpec("cat", colour="red"),)
