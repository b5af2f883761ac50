"""What the tests of fleets share: a cluster of this machine's own, engines that die, files of work."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minikin import events
from minikin.cluster import run_log as manifests
from minikin.cluster.pool import Cluster
from minikin.errors import UnknownName
from tests.helpers.fake_engine import FakeEngine

TWO = Cluster(2, cpus=1, gpus=0)


class Deadly(FakeEngine):
    """A fake engine that notes who paints what, and at a word ends its process, once or always."""

    def __init__(self, notes: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.notes = notes

    def paint(self, rows: Any, on_step: Any) -> Any:
        prompts = [row.prepared.recipe.prompt for row in rows]
        if any("deadly" in p for p in prompts):
            os.kill(os.getpid(), signal.SIGKILL)
        images = super().paint(rows, on_step)
        with open(self.notes / f"{os.getpid()}.txt", "a") as f:
            f.writelines(f"{row.prepared.recipe.prompt}\n" for row in rows)
        return images


def deadly(notes: Path, step_s: float = 0.0) -> Deadly:
    return Deadly(notes, step_s=step_s, errors={"broken": UnknownName("thing", "broken", [])})


def write_prompts(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def ended(work: Iterator[events.Event], each: Callable[[events.Event], Any] | None = None) -> events.Done:
    done = None
    for event in work:
        if each:
            each(event)
        done = event
    assert isinstance(done, events.Done)
    return done


def image_files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.glob("??/*.png")}


def records(out: Path) -> list[dict[str, Any]]:
    return list(manifests.read(out / "manifest.jsonl"))[1:]


def killing(notes: Path, after: int, killed: list[int]) -> Callable[[events.Event], None]:
    """Ends one of the processes that paint with SIGKILL, once so many lines are done."""

    def each(event: events.Event) -> None:
        if isinstance(event, events.Progress) and event.done >= after and not killed:
            pids = [int(p.stem) for p in notes.glob("*.txt") if int(p.stem) != os.getpid()]
            if pids:
                killed.append(pids[0])
                os.kill(pids[0], signal.SIGKILL)

    return each


def write_manifest(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(["photos,name,category,steps,seed", *lines]) + "\n")
    return path


def fake_engine(step_s: float) -> FakeEngine:
    return FakeEngine(step_s=step_s)
