"""Engines that die, hang or keep silent: who is blamed, who waits for them, what callers see.

Without Ray itself: `test_fleet_replicas.py` kills real ones.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minikin.cluster import engine as remote
from minikin.cluster.engine import RemoteEngine, remote_engines
from minikin.errors import UnknownName
from minikin.recipes import Paint
from minikin.server import worker
from minikin.server.engine import EngineLost, PreparedRequest, Row
from minikin.server.errors import RequestRejected
from minikin.server.jobs import Job, JobRequest
from minikin.server.limits import Limits
from minikin.server.queue import JobQueue
from tests.helpers.clocks import Ticks
from tests.helpers.fake_engine import FakeEngine, digest, read
from tests.helpers.servers import Served, served
from tests.helpers.threads_ray import ThreadsRay


def until(true: Callable[[], Any], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


class Mortal(FakeEngine):
    """An engine that can be lost: from outside, or by painting a deadly prompt. `warm_up` brings another."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dead, self.lives = False, 0
        self.gone = threading.Event()  # for good, while it is set

    def check(self) -> None:
        if self.dead:
            raise EngineLost("It is gone.")

    def max_batch(self, prepared: PreparedRequest) -> int:
        self.check()
        return super().max_batch(prepared)

    def paint(self, rows: Any, on_step: Any) -> Any:
        def step(done: int, preview: Any) -> None:
            self.dead |= any("deadly" in row.prepared.recipe.prompt for row in rows)
            Mortal.check(self)
            on_step(done, preview)

        Mortal.check(self)
        return super().paint(rows, step)

    def warm_up(self) -> None:
        if self.dead:
            time.sleep(0.1)  # opening another takes longer than handing on what it had
        if self.gone.is_set():
            raise EngineLost("There is no other.")
        self.dead, self.lives = False, self.lives + 1
        super().warm_up()


class Unasked(Mortal):
    """The control: one that says that it is gone when it is to paint, and not before. Nothing brings another
    until `released`: the job has met them all by then."""

    released = threading.Event()

    def check(self) -> None:
        pass

    def warm_up(self) -> None:
        if self.dead:
            self.released.wait(20)
        super().warm_up()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: Any) -> None:
    monkeypatch.setattr(worker, "RETRY_S", 0.02)
    monkeypatch.setattr(worker, "IDLE_S", 0.1)
    for name, seconds in {"ADMISSION_S": 10.0, "HEDGE_S": 0.1, "ALIVE_S": 1.0}.items():
        monkeypatch.setattr(remote, name, seconds)


def submit_job(s: Served, prompt: str, **more: Any) -> Job:
    return s.service.submit(JobRequest("paint", "local"), {"prompt": prompt, "seed": 1, **more})


def ended(job: Job, within_s: float = 60.0) -> str:
    assert job.finished.wait(within_s)
    return job.status


def right(s: Served, job: Job) -> bool:
    """Whether each of its images is the one that was asked for."""
    prompt = job.prepared.recipe.model_dump()["prompt"]
    return len(job.images) == len(job.seeds) and all(
        read(Image.open(io.BytesIO(s.service.read_file(item)))) == digest(prompt, "", {}, item.seed or 0)
        for item in job.images
    )


# ---- who is blamed -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Mortal, Unasked])
def test_who_meets_dead_engines_is_not_blamed(tmp_path: Path, monkeypatch: Any, kind: type[Mortal]) -> None:
    """However many were dead before a job came to them. With one that is asked nothing it would be poison."""
    monkeypatch.setattr(worker, "IDLE_S", 60.0)  # nobody finds out before the job does
    engines = [kind() for _ in range(3)]
    with served(engines[0], tmp_path / "s", engines=engines) as s:
        for turn in range(4):
            for engine in engines:
                engine.dead = True
            job = submit_job(s, f"an innocent cat {turn}")
            if kind is Unasked:
                try:
                    assert ended(job) == "failed" and job.error is not None and job.error.code == "poison"
                finally:
                    Unasked.released.set()
                return
            assert ended(job) == "completed" and job.losses == 0 and right(s, job)


def test_who_kills_every_engine_is_poison(tmp_path: Path) -> None:
    """... after its attempts. What waits beside it is painted, and so is what comes then."""
    engines = [Mortal() for _ in range(3)]
    with served(engines[0], tmp_path / "s", engines=engines) as s:
        deadly, *others = [
            submit_job(s, "a deadly cat"),
            *(submit_job(s, f"an innocent cat {k}") for k in range(4)),
        ]
        assert ended(deadly) == "failed" and deadly.error is not None
        assert (deadly.error.code, deadly.losses) == ("poison", 3)
        assert "died 3 times while it worked on this" in str(deadly.error)
        assert [ended(job) for job in others] == ["completed"] * 4 and all(right(s, job) for job in others)
        assert ended(submit_job(s, "a cat")) == "completed"
        until(lambda: sum(engine.lives for engine in engines) == 3 + 3)


def test_engines_that_die_together_are_one_loss(tmp_path: Path) -> None:
    """A node that dies takes three engines along, each with another image of one job in hand."""
    engines = [Mortal() for _ in range(3)]
    with served(engines[0], tmp_path / "s", engines=engines, limits=Limits(batch=1)) as s:
        for engine in engines:
            engine.batches.clear()
            engine.go.clear()
        job = submit_job(s, "an innocent cat", n=3)
        until(lambda: all(engine.batches for engine in engines))
        for engine in engines:
            engine.dead = True
        until(lambda: all(engine.lives == 2 for engine in engines))
        for engine in engines:
            engine.go.set()
        assert ended(job) == "completed" and right(s, job) and job.losses == 1


def test_losses_are_counted_by_attempts() -> None:
    job = waiting("a")
    start_time = time.monotonic()
    assert [job.count_loss(start_time), job.count_loss(start_time), job.count_loss(start_time - 5)] == [1, 1, 1]
    assert job.count_loss(time.monotonic() + 0.001) == 2


def test_an_engine_that_dies_while_nobody_asks_is_replaced(tmp_path: Path) -> None:
    """Otherwise replicas that died at night kept the door closed: nothing came in that could find out."""
    engine = Mortal()
    with served(engine, tmp_path / "s") as s:
        engine.dead = True
        until(lambda: engine.lives == 2 and s.service.ready == "")
        engine.gone.set()
        engine.dead = True
        until(lambda: s.service.ready == "no engine works")
        engine.gone.clear()
        until(lambda: s.service.ready == "")


# ---- who waits for whom --------------------------------------------------------------------------


def waiting(client: str, image_files: int = 1) -> Job:
    prepared = FakeEngine().prepare("paint", Paint(prompt=client), {})
    return Job(JobRequest("paint", client), prepared, list(range(image_files)))


def test_nobody_waits_for_an_answer_about_memory() -> None:
    """A question to another machine that is not answered yet: meanwhile others come, go and are served."""
    line = JobQueue(Limits(batch=4))
    jobs = [waiting(c) for c in "abc"]
    line.put(jobs[0])
    asking, answer, matches = threading.Event(), threading.Event(), []

    def slow(prepared: PreparedRequest) -> int:
        asking.set()
        answer.wait(10)
        return 2

    thread = threading.Thread(target=lambda: matches.extend(line.take(max_batch=slow)))
    thread.start()
    assert asking.wait(5)
    line.put(jobs[1])
    line.put(jobs[2])
    taken = line.take(0, lambda prepared: 1)
    assert [p.job for p in taken] == [jobs[1]] and line.waiting() == [jobs[2]]
    assert thread.is_alive() and not matches, "they waited for the answer"
    answer.set()
    thread.join()
    assert [p.job for p in matches] == [jobs[0], jobs[2]]  # what came meanwhile comes along


def test_a_batch_that_finds_its_engine_dead_is_not_taken() -> None:
    line = JobQueue(Limits(batch=4))
    jobs = [waiting("a", 2), waiting("b")]
    for job in jobs:
        line.put(job)

    def dead(prepared: PreparedRequest) -> int:
        raise EngineLost("It is gone.")

    for _ in range(3):
        with pytest.raises(EngineLost):
            line.take(0, dead)
    assert sorted(p.job.request.client for p in line.take(0)) == ["a", "a", "b"] and line.take(0) == []
    line.put(jobs[0])
    line.close()
    assert line.take(0, dead) == []


# ---- replicas ------------------------------------------------------------------------------------


def fake_engine() -> FakeEngine:
    return FakeEngine(step_s=0.005)


@pytest.fixture
def ray() -> ThreadsRay:
    return ThreadsRay()


def remotes(ray: ThreadsRay, count: int = 3) -> list[RemoteEngine]:
    engines = remote_engines(ray, fake_engine, count, {})
    return [item for item in engines if isinstance(item, RemoteEngine)]


def takes(work: Callable[[], Any], least: float, most: float) -> None:
    """At least so many seconds, and fewer than so many that a busy machine makes longer."""
    start_time = time.monotonic()
    with Ticks() as clock:
        work()
    assert time.monotonic() - start_time > least and clock.seconds < most


def test_the_door_asks_the_next_one(ray: ThreadsRay, monkeypatch: Any) -> None:
    """Whoever is dead, hangs or is slow: a request hears of whoever answers, or 503 in time."""
    engines = remotes(ray)
    recipe = Paint(prompt="a cat")

    def prepare() -> None:
        assert engines[0].prepare("paint", recipe, {}).steps == 4

    ray.actors[0].die()
    takes(lambda: [prepare() for _ in range(6)], 0, 3)
    assert engines[0].is_dead
    ray.actors[1].hung.set()
    takes(lambda: [prepare() for _ in range(6)], 0, 5)
    assert not engines[1].is_dead
    ray.actors[2].slow_s = 0.3  # longer than the next is waited for: its answer counts all the same
    takes(prepare, 0.25, 3)
    with pytest.raises(UnknownName, match="'unknown'"):
        engines[0].prepare("paint", Paint(prompt="a cat", preset="unknown"), {})
    ray.actors[2].hung.set()
    monkeypatch.setattr(remote, "ADMISSION_S", 0.6)

    def refused() -> None:
        with pytest.raises(RequestRejected, match="No replica answers now") as e:
            prepare()
        assert (e.value.status, e.value.code, e.value.retry_s) == (503, "no_replica", 10)

    takes(refused, 0.5, 3)
    for actor in ray.actors:
        actor.die()
    takes(refused, 0.5, 3)
    monkeypatch.setattr(remote, "ADMISSION_S", 10.0)
    timer = threading.Timer(0.3, engines[2].warm_up)

    def awaited() -> None:
        timer.start()
        prepare()

    takes(awaited, 0.2, 9)


def test_a_replica_that_hangs_is_replaced(ray: ThreadsRay) -> None:
    """It is asked before it is given anything; silence ends it. What it answers late is not its successor's."""
    (engine,) = remotes(ray, 1)
    prepared = engine.prepare("paint", Paint(prompt="a cat"), {})
    assert engine.max_batch(prepared) == 8
    engine.check()
    old = engine.actor
    old.hung.set()
    late, _ = engine.submit("ping")
    for ask in (lambda: engine.max_batch(prepared), engine.check):
        with pytest.raises(EngineLost, match=r"did not answer within 1 s|is dead"):
            ask()
    assert engine.is_dead
    engine.warm_up()
    assert engine.actor is not old and old.dead.is_set() and not engine.is_dead
    with pytest.raises(EngineLost):
        engine.result(late, old)
    assert not engine.is_dead
    (image,) = engine.paint([Row(prepared, 3)], lambda done, preview: None)
    assert read(image) == digest("a cat", "", {}, 3)


def test_a_successor_that_does_not_open_is_tried_again(ray: ThreadsRay) -> None:
    (engine,) = remotes(ray, 1)
    ray.fall()
    for _ in range(2):
        with pytest.raises(EngineLost):
            engine.check()
        with pytest.raises(EngineLost):
            engine.warm_up()
        assert engine.is_dead
    assert all(actor.dead.is_set() for actor in ray.actors)
    ray.down = False
    engine.warm_up()
    assert not engine.is_dead


def test_the_head_is_gone(ray: ThreadsRay, tmp_path: Path, monkeypatch: Any) -> None:
    """R10: the gateway says 503 and when to come again, keeps what it has accepted, and another cluster paints
    it: from the same seeds, each once."""
    engines = remotes(ray, 2)
    with (
        served(engines[0], tmp_path / "s", engines=engines, limits=Limits(drain_s=0.1), drained=False) as s,
        s.client() as c,
    ):
        holds = [actor._made.result().engine.go for actor in ray.actors]
        for hold in holds:
            hold.clear()
        held = [waiting_there(s, k) for k in range(6)]
        ray.fall()
        for hold in holds:
            hold.set()
        monkeypatch.setattr(remote, "ADMISSION_S", 0.6)
        response = c.post("/api/paint", json={"prompt": "a cat"})
        assert response.status_code == 503 and response.json()["error"]["code"] == "no_replica"
        assert 1 <= int(response.headers["Retry-After"]) <= 60
        ready = c.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "no engine works")
        assert c.get("/livez").status_code == 200
        assert {c.get(f"/api/jobs/{job.id}").json()["status"] for job in held} <= {"queued", "running"}
    other = remotes(ThreadsRay(), 2)
    with served(other[0], tmp_path / "s", engines=other) as s:
        for job in held:
            again = s.service._jobs[job.id]
            assert ended(again) == "completed" and right(s, again)


def waiting_there(s: Served, k: int) -> Job:
    """A job that the server has accepted."""
    return submit_job(s, f"a cat {k}", n=2)
