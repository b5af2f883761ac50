"""Live generation: the newest request wins, within one step, and no result is lost or given out twice."""

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


class FakeGenerator:
    """Makes an image of its prompt's length, step by step, and can be held before any step."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.steps: list[str] = []
        self.before_step = lambda recipe, step: None

    def __call__(self, recipe: Paint) -> Iterator[events.Event]:
        if "planted" in recipe.prompt:
            raise RuntimeError("planted")
        if "<nobody>" in recipe.prompt:
            raise UnknownName("concept", "nobody", [])
        self.started.append(recipe.prompt)
        for i in range(STEPS):
            self.before_step(recipe, i)
            self.steps.append(recipe.prompt)
            yield events.Progress("painting", i + 1, STEPS)
        yield events.ImageReady(Image.new("L", (1, 1), len(recipe.prompt)), recipe.prompt, recipe.seed)


def results(live: Live, n: int) -> list:
    out = []
    for result in live:
        out.append(result)
        if len(out) == n:
            live.close()
    return out


def test_every_request_that_is_waited_for_is_generated():
    generator = FakeGenerator()
    live = Live(generator, Paint(prompt="a"))
    prompts = []
    for result in live:
        prompts.append(result.request.recipe.prompt)
        if len(prompts) == 3:
            break
        live.change(prompt="a" * (len(prompts) + 1))
    assert prompts == ["a", "aa", "aaa"]


def test_requests_replaced_before_their_turn_are_never_started():
    generator = FakeGenerator()
    live = Live(generator, Paint(prompt=""))
    for text in ("c", "ca", "cat"):
        live.change(prompt=text)
    (result,) = results(live, 1)
    assert generator.started == ["cat"] and result.request.number == 3 and result.image.getpixel((0, 0)) == 3


@pytest.mark.parametrize("at", range(STEPS))
def test_a_replaced_request_is_abandoned_within_one_step(at):
    generator = FakeGenerator()
    live = Live(generator, Paint(prompt="old"))
    generator.before_step = lambda recipe, i: (
        live.change(prompt="new") if (recipe.prompt, i) == ("old", at) else 0
    )
    (result,) = results(live, 1)
    assert result.request.recipe.prompt == "new"
    assert generator.steps.count("old") == at + 1  # the step in which it came, and no further


def test_a_finished_image_is_given_out_though_a_newer_request_waits():
    generator = FakeGenerator()
    live = Live(generator, Paint(prompt="old"))

    def generate(recipe):
        for event in generator(recipe):
            if isinstance(event, events.ImageReady) and recipe.prompt == "old":
                live.change(prompt="new")
            yield event

    live._generate = generate
    assert [result.request.recipe.prompt for result in results(live, 2)] == ["old", "new"]


def test_close_from_another_thread_ends_waiting():
    live = Live(FakeGenerator(), Paint(prompt=""))
    threading.Timer(0.05, live.close).start()
    assert list(live) == []


def test_a_problem_is_given_out_and_generation_goes_on():
    live = Live(FakeGenerator(), Paint(prompt="<nobody>"))
    all_results = []
    for result in live:
        all_results.append(result)
        if result.problem:
            live.change(prompt="somebody")
        else:
            live.close()
    assert (
        "nobody" in all_results[0].problem and all_results[0].image is None and all_results[1].image is not None
    )


def test_an_internal_error_does_not_end_the_session(caplog):
    """The client gets a sentence, the log the traceback; the next request is generated."""
    live = Live(FakeGenerator(), Paint(prompt="planted"))
    all_results = []
    for result in live:
        all_results.append(result)
        if result.problem:
            live.change(prompt="somebody")
        else:
            live.close()
    assert (
        "unexpected" in all_results[0].problem
        and "planted" not in all_results[0].problem
        and all_results[1].image is not None
    )
    assert "RuntimeError: planted" in caplog.text


def test_a_bad_change_raises_and_leaves_the_request():
    live = Live(FakeGenerator(), Paint(prompt="a cat"))
    with pytest.raises(BadRecipe, match="guidance"):
        live.change(guidance=-1)
    assert results(live, 1)[0].request.recipe.prompt == "a cat"


def test_strengths_stay_while_the_prompt_changes():
    live = Live(FakeGenerator(), Paint(prompt=""))
    live.change(strengths={"tom": 0.5})
    live.change(prompt="<tom:0.9> at <concept:tom> on <lora:tom:0.3> and \\<tom>, <ann>")
    assert (
        results(live, 1)[0].request.recipe.prompt
        == "<tom:0.5> at <tom:0.5> on <lora:tom:0.3> and \\<tom>, <ann>"
    )


def test_with_strengths_leaves_other_prompts_as_they_are():
    for text in ("a (cat:1.2) [b] \\( <tom", "<lora:x:1> <ann:0.3>", ""):
        assert with_strengths(text, {"tom": 1}) == text


def test_live_equals_painting_and_cancels_the_real_thing():
    studio = Studio.open("tiny")
    with studio.live("a photo of a cat", steps=3, seed=5) as live:
        first = next(iter(live))
        live.change(seed=6)
        second = next(iter(live))
    for result, seed in ((first, 5), (second, 6)):
        assert equal(result.image, studio.paint("a photo of a cat", steps=3, seed=seed)[0])
    assert 0 < first.seconds
