"""The ends of jobs: told when the store has them, begun once, and nothing left of what did not end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minikin.server import ledger, views
from minikin.server.canary import Canary
from minikin.server.jobs import Asked, Job
from minikin.server.service import Service


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    one = Service([Canary(step_s=0.001)], tmp_path / "s")
    one.start()
    yield one
    one.close(drain_s=0)


def until(holds: Any) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


def paint(service: Service, n: int = 1) -> Job:
    return service.submit(Asked("paint", "me"), {"prompt": "a cat", "seed": 1, "n": n})


def test_an_end_is_told_when_the_store_has_it(service: Service, monkeypatch: Any) -> None:
    """While the disk is slow, a finished job still runs: who reads "completed" finds its pictures."""
    real, writing, go = service.store.end, threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> None:
        writing.set()
        assert go.wait(20)
        real(*args, **kwargs)

    monkeypatch.setattr(service.store, "end", slow)
    job = paint(service)
    assert writing.wait(20)
    seen = views.of(service, job)
    assert seen["status"] == "running" and seen["completed"] is None and seen["error"] is None
    go.set()
    assert job.finished.wait(20)
    seen = views.of(service, job)
    assert seen["status"] == "completed" and seen["completed"] >= seen["started"]
    assert service.store.picture(seen["results"][0]["id"], "me")


def test_a_job_is_begun_once(service: Service, monkeypatch: Any) -> None:
    """Whoever takes the second piece of a job, at the same moment or later, adds no attempt."""
    told: list[str] = []
    monkeypatch.setattr(service.store, "start", told.extend)
    service.line.close()  # no worker of the service takes it
    job = paint(service, n=2)
    assert service.finishing.begun([job, job]) == [job, job] and service.finishing.begun([job]) == [job]
    assert told == [job.id]
    job.cancelled.set()
    assert service.finishing.begun([job]) == []


def test_pictures_of_what_did_not_end_do_not_stay(tmp_path: Path, monkeypatch: Any) -> None:
    """A server that must go with one of eight pictures made takes its file along; the next start makes all."""
    folder = tmp_path / "s"
    service = Service([Canary(step_s=0.001)], folder)
    service.start()
    stuck, real = threading.Event(), service.finishing._keep

    def keep(job: Job, number: int, image: Any) -> None:
        if number:
            stuck.wait(0.2)
        else:
            real(job, number, image)

    monkeypatch.setattr(service.finishing, "_keep", keep)
    job = paint(service, n=8)
    until(lambda: job.files)
    assert list((folder / ledger.RESULTS).glob("*.png"))
    service.close(drain_s=0)
    assert not list((folder / ledger.RESULTS).glob("*.png"))
    assert [p for p in ledger.problems(folder) if "never ended" not in p] == []
