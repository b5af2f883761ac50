"""Live painting: the latest wish wins, within one step, and nothing is lost or shown twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from PIL import Image

from minikin import Studio, events
from minikin.errors import BadRecipe, UnknownName
from minikin.generation.live import Live
from minikin.models.prompt import with_strengths
from minikin.recipes import Paint
from tests.conftest import equal

STEPS = 5


class Easel:
    """A verb that paints its prompt's length, step by step, and can be held before any step."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.steps: list[str] = []
        self.before_step = lambda recipe, step: None

    def __call__(self, recipe: Paint) -> Iterator[events.Event]:
        if "planted" in recipe.prompt:
            raise RuntimeError("planted")
        if "<nobody>" in recipe.prompt:
            raise UnknownName("concept", "nobody", [])
        self.begun.append(recipe.prompt)
        for i in range(STEPS):
            self.before_step(recipe, i)
            self.steps.append(recipe.prompt)
            yield events.Progress("painting", i + 1, STEPS)
        yield events.Picture(Image.new("L", (1, 1), len(recipe.prompt)), recipe.prompt, recipe.seed)


def shown(live: Live, n: int) -> list:
    out = []
    for one in live:
        out.append(one)
        if len(out) == n:
            live.close()
    return out


def test_paints_every_wish_that_is_waited_for():
    easel = Easel()
    live = Live(easel, Paint(prompt="a"))
    seen = []
    for one in live:
        seen.append(one.wish.recipe.prompt)
        if len(seen) == 3:
            break
        live.change(prompt="a" * (len(seen) + 1))
    assert seen == ["a", "aa", "aaa"]


def test_wishes_that_were_replaced_before_their_turn_are_never_begun():
    easel = Easel()
    live = Live(easel, Paint(prompt=""))
    for text in ("c", "ca", "cat"):
        live.change(prompt=text)
    (one,) = shown(live, 1)
    assert easel.begun == ["cat"] and one.wish.number == 3 and one.image.getpixel((0, 0)) == 3


@pytest.mark.parametrize("at", range(STEPS))
def test_a_wish_is_left_within_one_step(at):
    easel = Easel()
    live = Live(easel, Paint(prompt="old"))
    easel.before_step = lambda recipe, i: live.change(prompt="new") if (recipe.prompt, i) == ("old", at) else 0
    (one,) = shown(live, 1)
    assert one.wish.recipe.prompt == "new"
    assert easel.steps.count("old") == at + 1  # the step in which it came, and no further


def test_a_finished_picture_is_shown_though_a_newer_wish_waits():
    easel = Easel()
    live = Live(easel, Paint(prompt="old"))

    def verb(recipe):
        for event in easel(recipe):
            if isinstance(event, events.Picture) and recipe.prompt == "old":
                live.change(prompt="new")
            yield event

    live._verb = verb
    assert [one.wish.recipe.prompt for one in shown(live, 2)] == ["old", "new"]


def test_close_from_another_thread_ends_waiting():
    live = Live(Easel(), Paint(prompt=""))
    threading.Timer(0.05, live.close).start()
    assert list(live) == []


def test_a_problem_is_shown_and_painting_goes_on():
    live = Live(Easel(), Paint(prompt="<nobody>"))
    seen = []
    for one in live:
        seen.append(one)
        if one.problem:
            live.change(prompt="somebody")
        else:
            live.close()
    assert "nobody" in seen[0].problem and seen[0].image is None and seen[1].image is not None


def test_a_fault_of_ours_does_not_end_the_painting(caplog):
    """It is told in words and logged whole; the next wish is painted."""
    live = Live(Easel(), Paint(prompt="planted"))
    seen = []
    for one in live:
        seen.append(one)
        if one.problem:
            live.change(prompt="somebody")
        else:
            live.close()
    assert "unexpected" in seen[0].problem and "planted" not in seen[0].problem and seen[1].image is not None
    assert "RuntimeError: planted" in caplog.text


def test_a_bad_change_raises_and_leaves_the_wish():
    live = Live(Easel(), Paint(prompt="a cat"))
    with pytest.raises(BadRecipe, match="guidance"):
        live.change(guidance=-1)
    assert shown(live, 1)[0].wish.recipe.prompt == "a cat"


def test_strengths_stay_while_the_prompt_changes():
    live = Live(Easel(), Paint(prompt=""))
    live.change(strengths={"tom": 0.5})
    live.change(prompt="<tom:0.9> at <concept:tom> on <lora:tom:0.3> and \\<tom>, <ann>")
    assert shown(live, 1)[0].wish.recipe.prompt == "<tom:0.5> at <tom:0.5> on <lora:tom:0.3> and \\<tom>, <ann>"


def test_with_strengths_leaves_other_prompts_as_they_are():
    for text in ("a (cat:1.2) [b] \\( <tom", "<lora:x:1> <ann:0.3>", ""):
        assert with_strengths(text, {"tom": 1}) == text


def test_live_equals_painting_and_cancels_the_real_thing():
    studio = Studio.open("tiny")
    with studio.live("a photo of a cat", steps=3, seed=5) as live:
        first = next(iter(live))
        live.change(seed=6)
        second = next(iter(live))
    for one, seed in ((first, 5), (second, 6)):
        assert equal(one.image, studio.paint("a photo of a cat", steps=3, seed=seed)[0])
    assert 0 < first.seconds
