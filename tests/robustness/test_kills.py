"""Everything that works for long survives kill -9 at any moment: 20 kills here, 300 in `make soak`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minikin import files
from tests.helpers.killed import PLANTED, WORKS
from tests.helpers.kills import Kills, torn

EACH = 4  # of five works: 20


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKS)
def test_kill_9_at_random_moments(name: str, tmp_path: Path) -> None:
    """Never a torn file, at most one interval lost, and the end is that of a run that nobody killed."""
    kills = Kills(WORKS[name], tmp_path, seed=7)
    assert kills.run(EACH) == []
    assert kills.killed == EACH


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", WORKS)
def test_three_hundred_kills(name: str, seed: int, tmp_path: Path) -> None:
    """3 x 5 x 20: fewer than one in a hundred goes wrong, with 95 % confidence."""
    kills = Kills(WORKS[name], tmp_path, seed=100 + seed)
    assert kills.run(20) == []


@pytest.mark.parametrize(
    ("name", "words"), [("in place", "torn"), ("forgetful", "result is another"), ("seldom", "steps were lost")]
)
def test_the_harness_finds_planted_bugs(name: str, words: str, tmp_path: Path) -> None:
    """The positive control: a file written in place, a resumption with other numbers, too few saves."""
    wrong = Kills(PLANTED[name], tmp_path, seed=1).run(12)
    assert any(words in w for w in wrong), wrong


def test_what_is_left_behind_is_seen(tmp_path: Path) -> None:
    """A fresh temporary file of the killed goes, whatever its age; one that a process still holds does not."""
    below = tmp_path / "out"
    below.mkdir()
    (tmp_path / ".minikin-0123456789abcdef").write_bytes(b"half")
    (below / ".minikin-fedcba9876543210").write_bytes(b"half")
    kills = Kills(WORKS["teach"], tmp_path)
    kills._sweep(tmp_path)
    assert kills.problems == [] and not list(tmp_path.rglob(".minikin-*"))
    handle, held = files._new_file(below)
    try:
        kills._sweep(tmp_path)
    finally:
        os.close(handle)
    assert kills.problems == [f"{held.name} was left behind"]


def test_torn_files_are_seen(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x10\x00")
    (tmp_path / "b.json").write_text('{"a":')
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "d.jsonl").write_text('{"a"\n{}\n')
    (tmp_path / "e.jsonl").write_text('{}\n{"a')  # a torn last line is a log's own matter
    (tmp_path / ".minikin-0123456789abcdef").write_bytes(b"half")
    assert sorted(t.split()[0] for t in torn(tmp_path)) == ["a.safetensors", "b.json", "c.png", "d.jsonl"]
