"""What is printed: notes in their own words, and how long work will take."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from minikin import events
from minikin.cli import display
from minikin.events import Done, Event, Pace, Progress, duration


@pytest.mark.parametrize("text", ["'[/x]' is not the name of a LoRA.", "cat[final].png was.", "[red]a[/]"])
def test_words_in_brackets_are_words(text: str, capsys: Any) -> None:
    display.warn(text)
    display.note(text)
    assert capsys.readouterr().err.splitlines() == [text, text]


class Clock:
    """A clock that is set, in place of the machine's."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: Any) -> Clock:
    clock = Clock()
    for module in (events, display):
        monkeypatch.setattr(module, "time", clock)
    return clock


def slow(clock: Clock, seconds: float, first: int = 1, steps: int = 300) -> Iterator[Event]:
    """A training of which every step takes so long."""
    for step in range(first, first + 4):
        clock.now += seconds
        yield Progress("teaching", step, steps)
    yield Done(None, {})


def test_steps_of_a_minute_have_an_estimate_at_once(clock: Clock, capsys: Any) -> None:
    display.run(slow(clock, 60), label="<pot>: ")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "<pot>: teaching 1/300  about 4 h 59 min left"
    assert lines[3] == "<pot>: teaching 4/300  about 4 h 56 min left"


def test_on_a_terminal_too(clock: Clock, monkeypatch: Any) -> None:
    out = io.StringIO()
    monkeypatch.setattr(display, "err", Console(file=out, force_terminal=True, width=120))
    display.run(slow(clock, 60))
    assert "4 h 56 min left" in out.getvalue()


def test_a_resumed_run_is_not_timed_by_its_first_report(clock: Clock) -> None:
    pace = Pace()
    clock.now += 60
    pace.update("teaching", 150, 300)
    assert pace.left_s() is None
    clock.now += 60
    pace.update("teaching", 151, 300)
    assert pace.left_s() == pytest.approx(149 * 60)
    clock.now += 30
    assert pace.left_s() == pytest.approx(149 * 60 - 30), "it goes on between reports"


def test_another_stage_is_timed_anew(clock: Clock) -> None:
    pace = Pace()
    for step in (1, 2):
        clock.now += 1
        pace.update("finding the subject", step, 2)
    clock.now += 60
    pace.update("teaching", 1, 10)
    assert pace.left_s() == pytest.approx(9 * 60)


def test_durations() -> None:
    assert [duration(s) for s in (4.4, 99, 100, 3600, 17_900)] == [
        "4 s",
        "99 s",
        "2 min",
        "60 min",
        "4 h 58 min",
    ]


def test_the_demo_names_concept_and_phase(clock: Clock, tmp_path: Path, capsys: Any) -> None:
    from minikin.cli import demo

    class Concept:
        def save(self, path: Path) -> Path:
            path.write_bytes(b"")
            return path

    class Studio:
        def teaching(self, *_: Any) -> Iterator[Event]:
            for event in slow(clock, 20):
                yield Done(Concept(), {}) if isinstance(event, Done) else event

    demo._teach(Studio(), "my_teapot", "teapot", tmp_path, False, "1 of 2")  # type: ignore[arg-type]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Teaching <my_teapot>, concept 1 of 2, from")
    assert lines[1].startswith("<my_teapot>: teaching 1/300  about 1 h 40 min left")
