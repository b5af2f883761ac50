"""The parts of a sweep: who goes on, which points are chosen, settings, prompts, the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minikin import Concept
from minikin.errors import BadRecipe
from minikin.evaluation.intervals import Measured
from minikin.evaluation.sweep.cache import Cache, Seen
from minikin.evaluation.sweep.points import choose
from minikin.evaluation.sweep.search import Standing, finalists, reaching, standing
from minikin.evaluation.sweep.settings import Setting, drawn, grid, texts
from minikin.generation.plan import plan
from minikin.models.base import Base
from minikin.recipes import WHOLE, Paint, Sweep
from tests.helpers.sweeps import TOM


def seen(likeness: float, right: float) -> Seen:
    return Seen(likeness, None, (right, 0.5, 0.4, 0.3))


def test_wrong_pictures_are_no_certainty() -> None:
    """4 of 4 images wrong: the bootstrap's interval is [0, 0], the reach is Wilson's 0.49."""
    none = standing(Setting(), range(1), [[seen(0.5, 0.1)] * 4], "recognised")
    assert none.recognised.value == none.recognised.high == 0 and none.alignment.value == 0.1
    assert none.reach[1] == pytest.approx(0.79, abs=0.01)  # one prompt
    right = standing(Setting(), range(1), [[seen(0.5, 0.9)]], "recognised")
    assert right.follows.value == 1 and right.held_out is None
    plain = standing(Setting(), range(1), [[seen(0.5, 0.9)]], "alignment")
    assert plain.follows.value == 0.9 == plain.reach[1]


def at(x: float, y: float, half: float = 0.0) -> Standing:
    a, b = Measured(x, x - half, x + half, 4), Measured(y, y - half, y + half, 4)
    return Standing(Setting(x, None, y), a, None, b, b, b, (x + half, y + half))


def test_who_goes_on() -> None:
    """Those on the front or whose intervals reach it; the taught one always; at most a quarter, at least 8."""
    front = [at(0.2, 0.9), at(0.5, 0.8), at(0.8, 0.3)]
    close, far = at(0.45, 0.75, 0.1), at(0.3, 0.3, 0.1)
    kept = reaching([far, *front, close, at(0.1, 0.1, 0.1)])
    assert kept == [far, *front, close]  # the first is the taught one
    many = [at(0.5, 0.5, 0.3) for _ in range(60)]
    assert len(reaching([far, *many, *front])) == 17  # 16 and the taught one
    assert len(reaching([at(0.5, 0.5, 0.3)] * 3 + [at(0.6, 0.6)])) == 4


def test_who_is_painted_anew() -> None:
    """A short front is filled up with its neighbours; a long one is thinned out, both ends kept."""
    few = [at(0.1, 0.1), at(0.9, 0.9), *(at(0.8 - k / 100, 0.8 - k / 100, 0.5) for k in range(20))]
    last = finalists(few)
    assert last[:3] == [few[0], few[1], few[2]] and len(last) == 1 + 8
    long = [at(k / 30, 1 - k / 30) for k in range(31)]
    last = finalists(long)
    assert len(last) <= 12 and long[0] in last and long[30] in last


def test_choosing_points() -> None:
    ends = choose([at(0.9, 0.1), at(0.8, 0.6), at(0.7, 0.75), at(0.3, 0.8), at(0.2, 0.2)])
    assert ends.front == (3, 2, 1, 0)
    assert ends.named == {"faithful": 2, "balanced": 2, "creative": 2}  # the rest is out of the useful span
    three = choose([at(0.8, 0.66), at(0.76, 0.78), at(0.5, 0.8)])
    assert three.named == {"faithful": 0, "balanced": 1, "creative": 2}
    apart = choose([at(0.9, 0.1), at(0.1, 0.9)])
    assert len(set(apart.named.values())) == 1  # nothing in the useful span: one point, the knee


def test_settings_that_come_to_the_same_are_one(bases: dict[str, Base]) -> None:
    base = bases["sd15"]

    def of(concept: Concept, steps: int, guidance: float, **more: Any) -> tuple[Setting, ...]:
        decided = plan(base, Paint(prompt="x", steps=steps, guidance=guidance))
        return grid(Sweep(concept="tom", **more), concept, decided)

    many = of(TOM, 25, 4)
    assert len(many) == 5 * 3 * 2 * 4 * 2 and many[0] == Setting(1, 0.15, 4)
    assert {s.guidance for s in many} == {4, 6}
    four = of(TOM, 4, 1)  # no guidance: no interval; 10 % of 4 steps is none, 20 and 35 % are one
    assert len(four) == 5 * 3 * 2 and {s.interval for s in four} == {WHOLE}
    assert {s.guidance for s in four} == {1} and {s.switch for s in four} == {0, 0.2}
    assert {s.switch for s in of(TOM, 1, 1)} == {0} and len(of(TOM, 1, 1)) == 15
    row = replace(TOM, mode="row", word_deltas=())
    assert {s.tau for s in of(row, 4, 1)} == {None} and len(of(row, 4, 1)) == 10
    assert len(of(TOM, 25, 4, strengths="1", taus="0.15", guidances="4", switches="0", intervals="0-1")) == 1
    some = drawn(many, 7, seed=1)
    assert len(set(some)) == 7 and some[0] == many[0] and some == drawn(many, 7, 1) != drawn(many, 7, 2)


def test_few_step_presets_have_one_guidance(bases: dict[str, Base]) -> None:
    decided = plan(bases["sd15"], Paint(prompt="x"))
    turbo = replace(decided, preset=replace(decided.preset, name="turbo", low=0, high=1))
    with pytest.raises(BadRecipe, match="turbo is made for guidance 0 to 1, not 4"):
        grid(Sweep(concept="tom", guidances="1,4"), TOM, turbo)


def test_prompts_come_from_scenes_or_a_file(tmp_path: Path) -> None:
    usual = texts(Sweep(concept="tom"), "cat")
    assert len(set(usual)) == 12 and all(t.count("{}") == 1 for t in usual)
    assert not any("teapot" in t for t in texts(Sweep(concept="tom"), "teapot"))
    own = tmp_path / "own.txt"
    own.write_text("# mine\n{} on a boat\n\na painting of {}\nmy {} asleep\n{} in Paris\n")
    assert texts(Sweep(concept="tom", texts=str(own), prompts=4), "cat")[1] == "a painting of {}"
    with pytest.raises(BadRecipe, match="asks for 5 prompts, but there are 4 prompts in .*own.txt"):
        texts(Sweep(concept="tom", texts=str(own), prompts=5), "cat")
    own.write_text("a cat\n")
    with pytest.raises(BadRecipe, match='the line "a cat" does not'):
        texts(Sweep(concept="tom", texts=str(own)), "cat")
    with pytest.raises(BadRecipe, match="cannot be read"):
        texts(Sweep(concept="tom", texts=str(tmp_path / "none.txt")), "cat")
    with pytest.raises(BadRecipe, match="asks for 99 prompts"):
        texts(Sweep(concept="tom", prompts=99), "cat")


def test_a_cache_gives_back_what_it_took(tmp_path: Path) -> None:
    path = tmp_path / "a" / "cache.jsonl"
    one = (Seen(1 / 3, None, (0.1, 2 / 3)), Seen(0.5, 1e-17, ()))
    cache = Cache(path)
    cache.put("k", "e", one)
    cache.keep("seconds", 0.1)
    with open(path, "ab") as f:
        f.write(b'not json\n{"key":"x"}\n{"key": "torn')
    again = Cache(path)
    assert again.get("k", "e") == one and again.get("k", "other") is None and len(again) == 1
    assert again.number("seconds") == 0.1 and again.number("none") is None
    again.put("l", "e", one)
    assert len(Cache(path)) == 2
