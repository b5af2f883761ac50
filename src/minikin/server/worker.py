"""The worker: one thread for each device, batch after batch.

An error of a batch is an error of one of its rows: the others are painted again without it, each job by
itself. Too little memory halves the batch. A job that nobody wants is left at the next step, unless
others share its batch; they go on undisturbed, and its image is dropped.

When the engine itself is lost (a replica that died), what it had in hand goes back to the front of the line:
another worker paints it from the same seeds at once, while this one waits for its engine's successor. An
engine is asked for a sign of life before it is given anything, and now and then while there is nothing to do:
one that was gone before is nobody's loss, and its successor is there before it is needed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from PIL import Image

from minikin import events
from minikin.errors import MinikinError, OutOfMemory
from minikin.server import metrics
from minikin.server.engine import Engine, EngineLost, Given, Preview, Row
from minikin.server.errors import Refused
from minikin.server.jobs import Job
from minikin.server.queue import Line, Piece

PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0  # between attempts to get another engine
IDLE_S = 5.0  # without work, until the engine is asked whether it is still there

log = logging.getLogger(__name__)


class Desk(Protocol):
    """Where finished work goes; `finishing.Finishing`."""

    def begun(self, jobs: list[Job]) -> list[Job]: ...

    def made(self, job: Job, number: int, image: Image.Image) -> None: ...

    def done(self, job: Job, result: events.Done) -> None: ...

    def failed(self, job: Job, error: MinikinError) -> None: ...

    def dropped(self, job: Job) -> None: ...


class Worker(threading.Thread):
    """Takes batches from the line until it is closed."""

    def __init__(self, engine: Engine, line: Line, desk: Desk) -> None:
        super().__init__(name=f"minikin-worker-{engine.name}", daemon=True)
        self.engine, self.line, self.desk = engine, line, desk
        self.warm = threading.Event()
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            self.engine.warm_up()
        except BaseException as e:
            self.problem = e
            log.exception("The warm-up image failed")
        self.warm.set()
        if isinstance(self.problem, EngineLost):
            self._revive(self.problem)
        while not self.line.closed:
            try:
                batch = self.line.take(IDLE_S, self.engine.room)
                if not batch:
                    self.engine.check()
            except EngineLost as e:
                self._revive(e)
            else:
                self._work(batch)

    def _work(self, batch: list[Piece]) -> None:
        given = {p.job: p.job.given for p in batch}  # an end, by whoever, lets go of the images
        running = set(self.desk.begun(list(dict.fromkeys(p.job for p in batch))))
        batch = [p for p in batch if p.job in running]
        if not batch:
            return
        if batch[0].group is None:
            self._alone(batch[0].job, given[batch[0].job])
        else:
            self._paint(batch)

    def _paint(self, batch: list[Piece]) -> None:
        begun = time.monotonic()
        cost = sum(p.job.prepared.cost for p in batch)
        metrics.BATCH.observe(len(batch))
        try:
            images = self.engine.paint([Row(p.job.prepared, p.seed) for p in batch], self._on_step(batch))
        except events.Cancelled:
            for job in {p.job for p in batch}:
                self.desk.dropped(job)
            return
        except OutOfMemory as e:
            metrics.OOM.inc()
            if len(batch) == 1:
                self.desk.failed(batch[0].job, e)
                return
            half = len(batch) // 2
            self._paint(batch[:half])
            self._paint(batch[half:])
            return
        except EngineLost as e:
            self._lost(batch, begun, e)
            return
        except Exception as e:  # of one row, whatever it is: the others' jobs, and the worker, go on
            self._isolate(batch, e)
            return
        self.line.measured(cost, time.monotonic() - begun)
        metrics.ENGINE.observe(time.monotonic() - begun)
        for piece, image in zip(batch, images, strict=True):
            self.desk.made(piece.job, piece.number, image)

    def _isolate(self, batch: list[Piece], e: Exception) -> None:
        jobs = list(dict.fromkeys(p.job for p in batch))
        if len(jobs) == 1:
            self.desk.failed(jobs[0], _readable(e, jobs[0]))
            return
        for job in jobs:
            self._paint([p for p in batch if p.job is job])

    def _lost(self, pieces: list[Piece], begun: float, why: EngineLost) -> None:
        """Give everything back but what has lost its third engine, and wait for another engine."""
        self.problem = why  # before anybody hears of a job that failed by it
        jobs = list(dict.fromkeys(p.job for p in pieces))
        for job in jobs:
            losses = job.lose(begun)
            log.warning("job %s lost its engine, %d of %d times", job.id, losses, self.line.limits.attempts)
            if losses >= self.line.limits.attempts:
                self.desk.failed(job, _poison(job))
            elif job.cancelled.is_set():
                self.desk.dropped(job)
        self.line.give_back([p for p in pieces if p.job.losses < self.line.limits.attempts])
        metrics.LOST.inc()
        self._revive(why)

    def _revive(self, why: BaseException) -> None:
        self.problem, pause = why, PAUSE_S
        log.warning("%s waits for another engine: %s", self.name, why)
        while not self.line.closed:
            try:
                self.engine.warm_up()
                self.problem = None
                return
            except Exception as e:
                self.problem = e
                log.warning("there is no engine for %s yet: %s", self.name, e)
                self.line.closing.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _on_step(self, batch: list[Piece]) -> Callable[[int, Preview], None]:
        jobs = list(dict.fromkeys(p.job for p in batch))
        before = {job: len(job.files) * job.prepared.steps for job in jobs}
        rows = {job: [k for k, p in enumerate(batch) if p.job is job] for job in jobs}

        def step(done: int, preview: Preview) -> None:
            if all(job.cancelled.is_set() for job in jobs):
                raise events.Cancelled
            for job in jobs:
                own = min(done, job.prepared.steps) * len(rows[job])
                job.step(before[job] + own, preview, rows[job][0], "painting")

        return step

    def _alone(self, job: Job, given: Given) -> None:
        begun = time.monotonic()
        run = self.engine.run(job.asked.kind, job.prepared, given)
        done: events.Done | None = None
        number = 0
        try:
            for event in run:
                if job.cancelled.is_set():
                    break
                if isinstance(event, events.Progress):
                    job.total = event.total
                    job.step(event.done, _looking(event) or job.shown, stage=event.stage)
                elif isinstance(event, events.Note):
                    job.notes.append(event.text)
                elif isinstance(event, events.Picture):
                    if job.asked.kind == "teach":  # samples on the way: shown, not kept
                        job.step(job.done, _showing(event.image))
                    else:
                        self.desk.made(job, number, event.image)
                        number += 1
                elif isinstance(event, events.Done):
                    done = event
        except events.Cancelled:
            pass
        except EngineLost as e:
            self._lost([Piece(job, 0)], begun, e)
            return
        except Exception as e:  # of this job, whatever it is: the worker goes on
            self.desk.failed(job, _readable(e, job))
            return
        finally:
            close: Any = getattr(run, "close", None)
            if close:
                close()
        if done is None:
            self.desk.dropped(job)
        else:
            self.desk.done(job, done)


def _looking(event: events.Progress) -> Preview | None:
    look = event.look
    return (lambda row: look()) if look else None


def _showing(image: Image.Image) -> Preview:
    return lambda row: image


def _poison(job: Job) -> Refused:
    return Refused(
        f"What paints ended {job.losses} times while it worked on this.", status=500, code="poison"
    )  # fmt: skip


def _readable(e: Exception, job: Job) -> MinikinError:
    if isinstance(e, MinikinError):
        return e
    log.exception("job %s failed", job.id, exc_info=e)
    return Refused(f"Internal error. Reference {job.id}.", status=500, code="internal_error")
