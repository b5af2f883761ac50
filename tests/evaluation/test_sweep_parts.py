"""Parts of a sweep: successive halving, choice of operating points, grid, prompts, cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minikin import Concept
from minikin.errors import BadRecipe
from minikin.evaluation.cache import Cache
from minikin.evaluation.intervals import Estimate
from minikin.evaluation.prompts import prompt_templates
from minikin.evaluation.scores import ImageScores, Scores
from minikin.evaluation.sweep.grid import GridPoint, grid, sample
from minikin.evaluation.sweep.points import select
from minikin.evaluation.sweep.search import GridResult, finalists, grid_result, reaching
from minikin.generation.request import resolve
from minikin.models.base import Base
from minikin.recipes import WHOLE, Paint, Sweep
from tests.helpers.sweeps import TOM


def scored(subject_fidelity: float, alignment: float) -> ImageScores:
    return ImageScores(subject_fidelity, None, (alignment, 0.5, 0.4, 0.3))


def test_upper_bound_of_wrong_images_is_wilsons() -> None:
    """4 of 4 images wrong: the bootstrap's interval is [0, 0], Wilson's reaches 0.79."""
    none = grid_result(GridPoint(), range(1), [[scored(0.5, 0.1)] * 4], "r_precision", "planted")
    assert none.prompt_fidelity.value == none.prompt_fidelity.high == 0
    assert none.scores.prompt_fidelity("text_alignment").value == 0.1
    assert none.upper_bounds[1] == pytest.approx(0.79, abs=0.01)  # one prompt
    right = grid_result(GridPoint(), range(1), [[scored(0.5, 0.9)]], "r_precision", "planted")
    assert right.prompt_fidelity.value == 1 and right.scores.held_out is None
    plain = grid_result(GridPoint(), range(1), [[scored(0.5, 0.9)]], "text_alignment", "planted")
    assert plain.prompt_fidelity.value == 0.9 == plain.upper_bounds[1]


def at(x: float, y: float, half: float = 0.0) -> GridResult:
    a, b = Estimate(x, x - half, x + half, 4), Estimate(y, y - half, y + half, 4)
    return GridResult(GridPoint(x, None, y), Scores("", b, b, a, None), "r_precision", (x + half, y + half))


def test_grid_points_that_reach_the_front_go_on() -> None:
    """The default point always goes on; of the others at most a quarter, at least 8."""
    front = [at(0.2, 0.9), at(0.5, 0.8), at(0.8, 0.3)]
    close, far = at(0.45, 0.75, 0.1), at(0.3, 0.3, 0.1)
    remaining = reaching([far, *front, close, at(0.1, 0.1, 0.1)])
    assert remaining == [far, *front, close]  # the first is the default one
    many = [at(0.5, 0.5, 0.3) for _ in range(60)]
    assert len(reaching([far, *many, *front])) == 17  # 16 and the default one
    assert len(reaching([at(0.5, 0.5, 0.3)] * 3 + [at(0.6, 0.6)])) == 4


def test_finalists_of_short_and_long_fronts() -> None:
    """A short front is filled up with its neighbours; a long one is thinned out, both ends kept."""
    few = [at(0.1, 0.1), at(0.9, 0.9), *(at(0.8 - k / 100, 0.8 - k / 100, 0.5) for k in range(20))]
    last = finalists(few)
    assert last[:3] == [few[0], few[1], few[2]] and len(last) == 1 + 8
    long = [at(k / 30, 1 - k / 30) for k in range(31)]
    last = finalists(long)
    assert len(last) <= 12 and long[0] in last and long[30] in last


def test_selection_of_operating_points() -> None:
    ends = select([at(0.9, 0.1), at(0.8, 0.6), at(0.7, 0.75), at(0.3, 0.8), at(0.2, 0.2)])
    assert ends.front == (3, 2, 1, 0)
    assert ends.points == {"faithful": 2, "balanced": 2, "creative": 2}  # the rest is out of the useful span
    three = select([at(0.8, 0.66), at(0.76, 0.78), at(0.5, 0.8)])
    assert three.points == {"faithful": 0, "balanced": 1, "creative": 2}
    apart = select([at(0.9, 0.1), at(0.1, 0.9)])
    assert len(set(apart.points.values())) == 1  # nothing in the useful span: one point, the knee


def test_grid_points_of_equal_effect_are_tried_once(bases: dict[str, Base]) -> None:
    base = bases["sd15"]

    def of(concept: Concept, steps: int, guidance: float, **more: Any) -> tuple[GridPoint, ...]:
        request = resolve(base, Paint(prompt="x", steps=steps, guidance=guidance))
        return grid(Sweep(concept="tom", **more), concept, request)

    many = of(TOM, 25, 4)
    assert len(many) == 5 * 3 * 2 * 4 * 2 and many[0] == GridPoint(1, 0.15, 4)
    assert {s.guidance for s in many} == {4, 6}
    four = of(TOM, 4, 1)  # no guidance: no interval; 10 % of 4 steps is none, 20 and 35 % are one
    assert len(four) == 5 * 3 * 2 and {s.interval for s in four} == {WHOLE}
    assert {s.guidance for s in four} == {1} and {s.concept_start for s in four} == {0, 0.2}
    assert {s.concept_start for s in of(TOM, 1, 1)} == {0} and len(of(TOM, 1, 1)) == 15
    value = replace(TOM, mode="value", word_deltas=())
    assert {s.tau for s in of(value, 4, 1)} == {None} and len(of(value, 4, 1)) == 10
    assert (
        len(of(TOM, 25, 4, strengths="1", taus="0.15", guidances="4", concept_starts="0", intervals="0-1")) == 1
    )
    some = sample(many, 7, seed=1)
    assert len(set(some)) == 7 and some[0] == many[0] and some == sample(many, 7, 1) != sample(many, 7, 2)


def test_few_step_presets_have_one_guidance(bases: dict[str, Base]) -> None:
    request = resolve(bases["sd15"], Paint(prompt="x"))
    turbo = replace(request, preset=replace(request.preset, name="turbo", low=0, high=1))
    with pytest.raises(BadRecipe, match="turbo is made for guidance 0 to 1, not 4"):
        grid(Sweep(concept="tom", guidances="1,4"), TOM, turbo)


def test_prompts_come_from_scenes_or_a_file(tmp_path: Path) -> None:
    usual = prompt_templates(Sweep(concept="tom"), "cat")
    assert len(set(usual)) == 12 and all(t.count("{}") == 1 for t in usual)
    assert not any("teapot" in t for t in prompt_templates(Sweep(concept="tom"), "teapot"))
    file = tmp_path / "prompts.txt"
    file.write_text("# mine\n{} on a boat\n\na painting of {}\nmy {} asleep\n{} in Paris\n")
    assert prompt_templates(Sweep(concept="tom", texts=str(file), prompts=4), "cat")[1] == "a painting of {}"
    with pytest.raises(BadRecipe, match="asks for 5 prompts, but there are 4 prompts in .*prompts.txt"):
        prompt_templates(Sweep(concept="tom", texts=str(file), prompts=5), "cat")
    file.write_text("a cat\n")
    with pytest.raises(BadRecipe, match='the line "a cat" does not'):
        prompt_templates(Sweep(concept="tom", texts=str(file)), "cat")
    with pytest.raises(BadRecipe, match="cannot be read"):
        prompt_templates(Sweep(concept="tom", texts=str(tmp_path / "none.txt")), "cat")
    with pytest.raises(BadRecipe, match="asks for 99 prompts"):
        prompt_templates(Sweep(concept="tom", prompts=99), "cat")


def test_cache_round_trip_skips_damaged_lines(tmp_path: Path) -> None:
    path = tmp_path / "a" / "cache.jsonl"
    scores = (ImageScores(1 / 3, None, (0.1, 2 / 3)), ImageScores(0.5, 1e-17, ()))
    cache = Cache(path)
    cache.put("k", "e", scores)
    cache.put_number("seconds", 0.1)
    with open(path, "ab") as f:
        f.write(b'not json\n{"cell":"x"}\n{"cell": "torn')
    again = Cache(path)
    assert again.get("k", "e") == scores and again.get("k", "other") is None and len(again) == 1
    assert again.number("seconds") == 0.1 and again.number("none") is None
    again.put("l", "e", scores)
    assert len(Cache(path)) == 2
