"""Every accepted job ends, whatever goes wrong in recording, writing, batching or at a restart."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minikin.errors import BadRecipe, StorageError
from minikin.recipes import Inpaint, Paint, Refine
from minikin.server import audit
from minikin.server.engine import OnStep, Row
from minikin.server.jobs import Job, JobRequest
from minikin.server.service import Service
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import served

LAST = 2**63 - 1


class Wrong(FakeEngine):
    """Answers a batch that has `few` in a prompt with too few images; others as usual."""

    def paint(self, rows: Sequence[Row], on_step: OnStep) -> list[Image.Image]:
        few = any("few" in getattr(row.prepared.recipe, "prompt", "") for row in rows)
        return super().paint(rows, on_step)[: 0 if few else None]

    def check(self) -> None:
        raise ValueError("planted")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service_ = Service([Wrong()], tmp_path / "s")
    service_.start()
    yield service_
    service_.close(drain_s=0)
    assert audit.problems(tmp_path / "s") == []


def paint(service: Service, prompt: str = "a cat", **values: Any) -> Job:
    return service.submit(JobRequest("paint", "me"), {"prompt": prompt, **values})


def ended(job: Job) -> tuple[str, str]:
    assert job.finished.wait(20)
    return job.status, job.error.code if job.error else ""


@pytest.mark.parametrize("kind", [Paint, Refine, Inpaint])
def test_seeds_beyond_the_range_are_refused(kind: Any) -> None:
    """The seed of the last image counts; the largest seed itself is good for one image."""
    assert kind.make(prompt="a", seed=LAST, n=1).seed == LAST
    assert kind.make(prompt="a", seed=LAST - 3, n=4).n == 4
    with pytest.raises(BadRecipe, match=f"choose a seed up to {LAST - 1}"):
        kind.make(prompt="a", seed=LAST, n=2)
    with pytest.raises(BadRecipe, match="up to"):
        kind.make(prompt="a", seed=LAST - 3, n=5)


def test_seeds_beyond_the_range_are_refused_by_every_api(tmp_path: Path) -> None:
    with served(FakeEngine(), tmp_path / "s") as s, s.client() as c:
        for path, body, status in (
            ("/api/paint", {"prompt": "a", "seed": LAST, "n": 2}, 422),
            ("/v1/images/generations", {"prompt": "a", "seed": LAST, "n": 2}, 400),
            ("/sdapi/v1/txt2img", {"prompt": "a", "seed": LAST, "n_iter": 2}, 422),
        ):  # fmt: skip
            response = c.post(path, json=body)
            assert response.status_code == status and "seed" in response.text, response.text
        job = c.post("/api/paint?wait=true", json={"prompt": "a", "seed": LAST}).json()
        assert job["status"] == "completed" and job["results"][0]["seed"] == LAST


@pytest.mark.parametrize("error", [OverflowError, TypeError, sqlite3.InterfaceError])
def test_an_end_that_cannot_be_recorded_is_a_failure(
    service: Service, monkeypatch: Any, error: type[Exception]
) -> None:
    """Recorded as such: it does not come back after a restart."""
    end = service.store.end

    def refused(id_: str, status: str, **values: Any) -> None:
        if status == "completed":
            raise error("planted")
        end(id_, status, **values)

    monkeypatch.setattr(service.store, "end", refused)
    job = paint(service)
    assert ended(job) == ("failed", "internal_error")
    assert service.store.job(job.id)["code"] == "internal_error" and not service.store.unfinished()  # type: ignore[index]
    assert not list(service.results.iterdir())
    monkeypatch.setattr(service.store, "end", end)
    assert ended(paint(service))[0] == "completed"


def test_no_end_at_all_can_be_recorded(tmp_path: Path, monkeypatch: Any) -> None:
    """Its caller hears of it; after each restart it runs again, three times in all."""
    folder = tmp_path / "s"
    id_ = ""
    for start in range(3):
        service = Service([FakeEngine()], folder)
        monkeypatch.setattr(service.store, "end", lambda *_, **__: 1 // 0)
        service.start()
        job = paint(service) if not start else service.job("me", id_)
        assert job is not None and ended(job) == ("failed", "internal_error")
        id_ = job.id
        service.close(drain_s=0)
    last = Service([FakeEngine()], folder)
    last.start()
    assert last.store.job(id_)["code"] == "poison" and not last.store.unfinished()  # type: ignore[index]
    last.close(drain_s=0)
    assert audit.problems(folder) == []


def test_whatever_goes_wrong_in_a_batch_ends_its_jobs(service: Service, monkeypatch: Any) -> None:
    """Too few images, a start that cannot be recorded, files that cannot be removed: the worker goes on."""
    assert ended(paint(service, "few")) == ("failed", "internal_error")
    with monkeypatch.context() as m:
        m.setattr(service.store, "start", lambda ids: 1 // 0)
        assert ended(paint(service)) == ("failed", "internal_error")
    with monkeypatch.context() as m:
        m.setattr(service.concept_store, "release", lambda contents: 1 // 0)
        assert ended(paint(service))[0] == "completed"
    with monkeypatch.context() as m:
        m.setattr(service.engine, "facts", lambda prepared: 1 // 0)
        assert ended(paint(service, n=2)) == ("failed", "internal_error")
    assert ended(paint(service))[0] == "completed" and service.workers[0].is_alive()


def test_a_check_that_fails_stops_no_worker(monkeypatch: Any, tmp_path: Path) -> None:
    """Whatever an idle engine's check raises: the engine is warmed up again, and the next job is done."""
    monkeypatch.setattr("minikin.server.worker.IDLE_S", 0.01)
    checked = threading.Event()

    class Idle(Wrong):
        def check(self) -> None:
            checked.set()
            super().check()

    service = Service([Idle()], tmp_path / "s")
    service.start()
    assert checked.wait(20) and ended(paint(service))[0] == "completed"
    service.close(drain_s=0)


@pytest.mark.parametrize("column", ["recipe", "concepts", "warnings"])
def test_a_damaged_record_ends_its_job_alone(tmp_path: Path, column: str) -> None:
    folder = tmp_path / "s"
    service = Service([FakeEngine()], folder)
    bad, good = paint(service), paint(service)  # never started: both wait
    service.close(drain_s=0)
    with sqlite3.connect(folder / audit.STORE) as db:
        db.execute(f"UPDATE jobs SET {column}='{{' WHERE id=?", (bad.id,))
    again = Service([FakeEngine()], folder)
    again.start()
    job = again.job("me", good.id)
    assert job is not None and ended(job)[0] == "completed"
    assert again.store.job(bad.id)["code"] == "damaged"  # type: ignore[index]
    assert len(again.store.jobs("me", 10)) == 2
    again.close(drain_s=0)
    assert audit.problems(folder) == []


def test_jobs_of_an_earlier_version_with_seeds_beyond_the_range_end(tmp_path: Path) -> None:
    """Version 0.1 accepted them, and ran them again after each restart."""
    folder = tmp_path / "s"
    service = Service([FakeEngine()], folder)
    job = paint(service, seed=5, n=2)
    service.close(drain_s=0)
    with sqlite3.connect(folder / audit.STORE) as db:
        db.execute("UPDATE jobs SET recipe=json_set(recipe, '$.seed', ?)", (LAST,))
    again = Service([FakeEngine()], folder)
    again.start()
    row = again.store.job(job.id)
    assert row is not None and (row["status"], row["code"]) == ("failed", "bad_recipe")
    again.close(drain_s=0)
    assert audit.problems(folder) == []


def test_storage_errors_at_the_end_are_told(service: Service, monkeypatch: Any) -> None:
    """As before: the disk may have room at the next start."""

    def full(*_: Any, **__: Any) -> None:
        raise StorageError("full")

    with monkeypatch.context() as m:
        m.setattr(service.store, "end", full)
        job = paint(service)
        assert ended(job) == ("failed", "storage")
    assert [row["id"] for row in service.store.unfinished()] == [job.id]
    service.writer.abandon(job)
