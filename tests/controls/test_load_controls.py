"""The positive controls of L3, L5 and L9 (docs/robustness.md): a server with a planted bug, seconds of the load
that the row is about (tests/helpers/overload.py), and the complaint that must come of it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from minikin.server import app
from minikin.server.limits import Limits
from minikin.server.queue import JobQueue
from minikin.server.service import Service
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.loads import Outcome, Tally
from tests.helpers.overload import Equals, Leaving, Overload, beside, equals, overload, told_to_end
from tests.helpers.planted import first_come_first_served
from tests.helpers.servers import served

pytestmark = [pytest.mark.controls, pytest.mark.usefixtures("quick_disk")]
Patch = pytest.MonkeyPatch


def about(words: str, wrong: list[str]) -> bool:
    return any(words in item for item in wrong)


# ---- L3 ----------------------------------------------------------------------------------------


def runs(n: int, seconds: float, status: int = 200, first: float = 0.0, wrong: str = "") -> list[Outcome]:
    """So many answers, ten a second."""
    return [Outcome(first + k / 10, seconds, status, int(status == 200), wrong) for k in range(n)]


def overloaded(**other: list[Outcome]) -> Overload:
    """Numbers as they should be, 10 images a second, but for these."""
    good = {
        "calm": runs(20, 0.4),
        "many": runs(100, 0.1) + runs(100, 0.1, 429),
        "after": runs(100, 0.5),
    }
    calm, many, after = (Tally(item) for item in {**good, **other}.values())
    return Overload(10.0, calm, many, after, start=0.0, seconds=10.0, recovery_s=5.0)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"many": runs(100, 9.0) + runs(100, 0.1, 429)}, "goodput"),
        ({"many": runs(100, 0.1) + runs(95, 0.1, 429) + runs(5, 0.4, 429)}, "told to come back after 0.40 s"),
        ({"many": runs(100, 0.1) + runs(10, 0.1, 429)}, "too many were let in"),
        ({"many": runs(100, 0.1) + runs(99, 0.1, 429) + runs(1, 1, 500)}, "overload: answers of status"),
        ({"many": runs(99, 0.1) + runs(100, 0.1, 429) + runs(1, 0.1, wrong="another's")}, "load: another's"),
        ({"calm": runs(19, 0.4) + runs(1, 0.1, 429)}, "calm: answers of status [429]"),
        ({"after": runs(60, 0.5) + runs(40, 0.9, first=6.0)}, "afterwards 0.90 s, before 0.40 s"),
    ],
)  # fmt: skip
def test_l3_each_bar_is_looked_at(other: dict[str, list[Outcome]], words: str) -> None:
    """By numbers alone: each complaint when its own are bad, none of any other, none when all are good."""
    assert overloaded().wrong() == []
    (item,) = overloaded(**other).wrong()
    assert words in item


def test_l3_no_end_of_the_line_is_found(tmp_path: Path, monkeypatch: Patch) -> None:
    """Everybody is let in, and waits."""
    monkeypatch.setattr(JobQueue, "_check", lambda self, client: None)
    with served(FakeEngine(step_s=0.0125, batch_size=2), tmp_path / "s", limits=Limits(waiting=8)) as s:
        measured = overload(s.url, seconds=0.8, callers=6, full_s=0.5, calm_s=0.3, after_s=0.2, recovery_s=0.1)
    assert about("too many were let in", measured.wrong()), measured


# ---- L5 ----------------------------------------------------------------------------------------


def test_l5_first_come_first_served_is_found(tmp_path: Path, monkeypatch: Patch) -> None:
    """Who asks now and then stands behind all that the other one has asked for."""
    first_come_first_served(monkeypatch)
    with served(
        FakeEngine(step_s=0.02, batch_size=1), tmp_path / "s", limits=Limits(waiting_per_client=50)
    ) as s:
        measured = beside(s.url, 0.08, light="B", pause=0.2, first=2, times=2, hogs=40)
    assert measured.beside.outcomes and about("others waited", measured.wrong()), measured


def test_l5_one_client_after_the_other_is_found(tmp_path: Path, monkeypatch: Patch) -> None:
    """Whose turn it was has it again as long as something of his waits."""

    def first(self: JobQueue) -> Any:
        return next((line.popleft() for line in self._by_client.values() if line), None)

    monkeypatch.setattr(JobQueue, "_first", first)
    with served(FakeEngine(step_s=0.02, batch_size=1), tmp_path / "s") as s:
        measured = equals(s.url, 3, "ABCD", 6)
    assert about("unequal", measured.wrong()), measured.shares
    assert Equals(dict.fromkeys("ABCD", 7), Tally()).wrong() == []


# ---- L9 ----------------------------------------------------------------------------------------


def left(folder: Path, step_s: float = 0.025) -> Leaving:
    """Of a server that is told to end with eight callers in hand; by its own handler of signals."""
    with served(FakeEngine(step_s=step_s), folder) as s:
        return told_to_end(s.url, lambda: s.server.handle_exit(signal.SIGTERM, None), 8)


def test_l9_dropping_what_is_in_hand_is_found(tmp_path: Path, monkeypatch: Patch) -> None:
    """A server that ends at once."""
    listening = app.listening
    at_once = {"timeout_graceful_shutdown": 0.2}
    monkeypatch.setattr(app, "listening", lambda *a, **k: listening(*a, **{**k, **at_once}))
    monkeypatch.setattr(Service, "finish", lambda self, seconds=None: None)
    wrong = left(tmp_path / "s").wrong()
    assert about("not all had their images", wrong), wrong


def test_l9_going_on_as_if_nothing_were_is_found(tmp_path: Path, monkeypatch: Patch) -> None:
    """New ones are taken, and /readyz calls for more of them."""
    monkeypatch.setattr(Service, "check_open", lambda self, client: self.queue.check(client))
    monkeypatch.setattr(Service, "ready", property(lambda self: ""))
    wrong = left(tmp_path / "s", 0.06).wrong()
    assert about("new ones were not told when to come back", wrong) and about("/readyz: {200}", wrong), wrong
