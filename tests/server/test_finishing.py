"""The ends of jobs: told when the store has them, begun once, and nothing left of what did not end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minikin.errors import StorageError
from minikin.images.photos import Photo
from minikin.perfusion import concept_file
from minikin.recipes import Teach
from minikin.server import audit, image_metadata, serializers
from minikin.server.engine import JobInputs
from minikin.server.errors import RequestRejected
from minikin.server.jobs import Job, JobRequest
from minikin.server.limits import Limits, check_teach
from minikin.server.service import Service
from tests.helpers.fake_engine import FakeEngine


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service_ = Service([FakeEngine(step_s=0.001)], tmp_path / "s")
    service_.start()
    yield service_
    service_.close(drain_s=0)


def until(holds: Any) -> None:
    end = time.monotonic() + 300  # of hanging, not of a busy machine
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


def paint(service: Service, n: int = 1) -> Job:
    return service.submit(JobRequest("paint", "me"), {"prompt": "a cat", "seed": 1, "n": n})


def test_an_end_is_told_when_the_store_has_it(service: Service, monkeypatch: Any) -> None:
    """While the disk is slow, a finished job still runs: who reads "completed" finds its images."""
    real, writing, go = service.store.end, threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> None:
        writing.set()
        assert go.wait(20)
        real(*args, **kwargs)

    monkeypatch.setattr(service.store, "end", slow)
    job = paint(service)
    assert writing.wait(20)
    observed = serializers.job_json(service, job)
    assert observed["status"] == "running" and observed["completed"] is None and observed["error"] is None
    go.set()
    assert job.finished.wait(20)
    observed = serializers.job_json(service, job)
    assert observed["status"] == "completed" and observed["completed"] >= observed["started"]
    assert service.store.image(observed["results"][0]["id"], "me")


def test_a_job_is_begun_once(service: Service, monkeypatch: Any) -> None:
    """Whoever takes the second piece of a job, at the same moment or later, adds no attempt."""
    response: list[str] = []
    monkeypatch.setattr(service.store, "start", response.extend)
    service.queue.close()  # no worker of the service takes it
    job = paint(service, n=2)
    assert service.writer.start([job, job]) == [job, job] and service.writer.start([job]) == [job]
    assert response == [job.id]
    job.cancelled.set()
    assert service.writer.start([job]) == []


def test_images_of_unfinished_jobs_are_deleted(tmp_path: Path, monkeypatch: Any) -> None:
    """A server that must go with one of eight images made takes its file along; the next start makes all."""
    folder = tmp_path / "s"
    service = Service([FakeEngine(step_s=0.001)], folder)
    service.start()
    stuck, real = threading.Event(), service.writer._save

    def keep(job: Job, number: int, image: Any) -> None:
        if number:
            stuck.wait(0.2)
        else:
            real(job, number, image)

    monkeypatch.setattr(service.writer, "_save", keep)
    job = paint(service, n=8)
    until(lambda: job.files)
    assert list((folder / audit.RESULTS).glob("*.png"))
    service.close(drain_s=0)
    assert not list((folder / audit.RESULTS).glob("*.png"))
    assert [p for p in audit.problems(folder) if "never ended" not in p] == []


# ---- what cannot be written ----------------------------------------------------------------------


def sent(kind: str = "refine") -> JobInputs:
    if kind == "teach":
        pixels = np.zeros((64, 64, 3), np.uint8)
        return JobInputs(photos=[Photo(f"{k}.png", pixels, None) for k in range(3)])
    return JobInputs({"image": Image.new("RGB", (64, 64), "red")})


def submit_job(service: Service, kind: str = "refine") -> Job:
    values = {"name": "tom", "category": "cat"} if kind == "teach" else {"prompt": "a cat", "seed": 1}
    return service.submit(JobRequest(kind, "me"), values, None, sent(kind))


def full(*_: Any, **__: Any) -> Any:
    raise StorageError("The disk is full.")


def test_what_was_sent_stays_until_the_end_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    """A job whose end did not reach the store runs again after a restart, with the image that it needs."""
    folder = tmp_path / "s"
    service = Service([FakeEngine()], folder)
    service.start()
    with monkeypatch.context() as m:
        m.setattr(service.store, "end", full)
        job = submit_job(service)
        assert job.finished.wait(20) and job.status == "failed"
    service.close(drain_s=0)
    assert (folder / audit.INPUTS / job.id / "image.png").exists()
    again = Service([FakeEngine()], folder)
    again.start()
    until(lambda: again.job("me", job.id).status == "completed")
    again.close(drain_s=0)
    assert not list((folder / audit.INPUTS).iterdir()) and audit.problems(folder) == []


def test_one_job_does_not_keep_a_server_from_starting(tmp_path: Path, caplog: Any) -> None:
    """Whatever is wrong with it, it ends as failed, and what waits beside it is painted."""

    class Odd(FakeEngine):
        def prepare(self, kind: str, *args: Any, **kwargs: Any) -> Any:
            return {}["planted"] if kind == "refine" else super().prepare(kind, *args, **kwargs)

    folder = tmp_path / "s"
    service = Service([FakeEngine()], folder)
    bad, good = submit_job(service), paint(service)  # never started: both wait
    service.close(drain_s=0)
    again = Service([Odd()], folder)
    again.start()
    until(lambda: again.job("me", good.id).status == "completed")
    row = next(r for r in again.store._rows("SELECT * FROM jobs") if r["id"] == bad.id)
    assert (row["status"], row["code"]) == ("failed", "internal_error") and "KeyError: 'planted'" in caplog.text
    again.close(drain_s=0)
    assert not list((folder / audit.INPUTS).iterdir())


def test_teaching_that_cannot_be_kept_goes_on_later(service: Service, monkeypatch: Any) -> None:
    """The disk is full when hours of teaching are over: its caller is told, photos and checkpoint stay."""
    monkeypatch.setattr(concept_file, "to_bytes", lambda *_, **__: b"")
    monkeypatch.setattr(service.concept_store, "put", full)
    job = submit_job(service, "teach")
    assert job.finished.wait(20) and job.status == "failed" and job.error.code == "storage"
    (row,) = service.store.unfinished()
    assert (row["id"], row["status"], row["attempts"]) == (job.id, "queued", 1) and "DELETE" in row["message"]
    assert serializers.job_json(service, job)["error"]["message"] == row["message"]
    assert len(list((service.inputs / job.id / "photos").glob("*.png"))) == 3
    service.cancel(job)
    until(lambda: not service.store.unfinished())
    until(lambda: not (service.inputs / job.id).exists())
    assert service.store.job(job.id)["status"] == "cancelled"
    monkeypatch.setattr(concept_file, "to_bytes", lambda *_, **__: {}["planted"])  # any other end is one
    job = submit_job(service, "teach")
    assert job.finished.wait(20) and not (service.inputs / job.id).exists()


def test_teaching_that_can_never_be_kept_ends(tmp_path: Path, monkeypatch: Any) -> None:
    """It comes back at the next starts, and at the last of its attempts it ends, and says so."""
    monkeypatch.setattr(concept_file, "to_bytes", lambda *_, **__: b"")
    id_ = ""
    for start in range(Limits().attempts):
        service = Service([FakeEngine(step_s=0.001)], tmp_path / "s")
        monkeypatch.setattr(service.concept_store, "put", full)
        service.start()
        job = service.job("me", id_) if start else submit_job(service, "teach")
        assert job is not None and job.finished.wait(20)
        id_, last = job.id, start == Limits().attempts - 1
        assert job.error.code == "storage" and ("next start" in str(job.error)) is not last
        assert bool(service.store.unfinished()) is not last and (service.inputs / id_).exists() is not last
        service.close(drain_s=0)
    assert audit.problems(tmp_path / "s") == []


def test_ended_jobs_release_their_images(service: Service) -> None:
    """Hundreds of jobs are remembered, and a photo has 3 bytes a pixel."""
    jobs = [submit_job(service, "teach"), submit_job(service)]
    assert all(job.finished.wait(20) for job in jobs)
    assert all(not job.inputs.area and not job.inputs.photos and not job.inputs.images for job in jobs)


def test_images_of_waiting_jobs_fit_into_memory(tmp_path: Path) -> None:
    service = Service([FakeEngine()], tmp_path / "s", limits=Limits(waiting_pixels=3 * 64 * 64 + 1))
    first = submit_job(service, "teach")  # nobody works
    with pytest.raises(RequestRejected, match="input images of unfinished jobs") as e:
        submit_job(service)
    assert e.value.status == 429 and e.value.code == "queue_full" and paint(service).status == "queued"
    assert [folder.name for folder in service.inputs.iterdir()] == [first.id]
    service.cancel(first)
    until(lambda: first.over)
    assert submit_job(service).status == "queued"
    service.close(drain_s=0)


def test_a_cancelled_teaching_does_not_come_back(tmp_path: Path) -> None:
    """It was to end at its next step, and the server went first."""
    service = Service([FakeEngine()], tmp_path / "s")
    job = submit_job(service, "teach")
    service.writer.start([job])
    job.started = time.time()
    service.queue.remove(job)
    service.cancel(job)
    assert job.status == "running", "the end is its worker's"
    service.close(drain_s=0)
    again = Service([FakeEngine()], tmp_path / "s")
    again.start()
    (row,) = again.store._rows("SELECT * FROM jobs")
    assert row["status"] == "cancelled"
    again.close(drain_s=0)


def test_nothing_stays_of_what_could_not_be_kept(service: Service, monkeypatch: Any) -> None:
    """The disk fills up at the second of three photos."""
    whole, saved = image_metadata.save_image, []

    def save(image: Any, path: Path, **how: Any) -> Path:
        saved.append(path)
        return full() if len(saved) == 2 else whole(image, path, **how)

    monkeypatch.setattr(image_metadata, "save_image", save)
    with pytest.raises(StorageError):
        submit_job(service, "teach")
    assert len(saved) == 2 and not list(service.inputs.iterdir()) and not service._unfinished()


def test_a_result_that_cannot_be_removed_stops_no_sweep(service: Service, monkeypatch: Any) -> None:
    """The others go, and it goes by the next one."""
    jobs = [paint(service) for _ in range(3)]
    assert all(job.finished.wait(20) for job in jobs)
    files = [service.writer.path(job.images[0].id) for job in jobs]
    service.limits = replace(service.limits, keep_s=-1.0)
    unlink = Path.unlink

    def held(path: Path, missing_ok: bool = False) -> None:
        if path == files[1]:
            raise PermissionError(13, "planted")
        unlink(path, missing_ok)

    with monkeypatch.context() as m:
        m.setattr(Path, "unlink", held)
        assert service.sweep() == 2
    assert [f.exists() for f in files] == [False, True, False]
    assert service.sweep() == 1 and not files[1].exists()


def test_teaching_has_limits() -> None:
    """Of size, batch and steps; what people teach with passes."""
    usual: dict[str, Any] = {"name": "tom", "category": "cat"}
    check_teach(Teach(**usual), Limits(), 512)
    check_teach(Teach(**usual, size=1024, batch=32, steps=5000), Limits(), 512)
    for more in ({"size": 1025}, {"batch": 33}, {"steps": 5001}, {"max_steps": 5001}):
        with pytest.raises(RequestRejected, match="at most"):
            check_teach(Teach(**usual, **more), Limits(), 512)
