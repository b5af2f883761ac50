"""Workers: one thread per device, which takes batch after batch from the queue.

An error in a batch is an error of one of its jobs: every job of the batch is then tried by itself. Too little
memory halves the batch. A cancelled job ends at the next step, unless other jobs share its batch; they go on
undisturbed, and its image is dropped.

When the engine itself is lost (a replica that died), its batch goes back to the front of the queue: another
worker generates it from the same seeds at once, while this one waits for its engine's successor. An engine is
checked before it is given anything, and every few seconds while there is nothing to do: one that died idle
costs no job anything, and its successor is there before it is needed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from PIL import Image

from minikin import events
from minikin.errors import MinikinError, OutOfMemory
from minikin.server import metrics
from minikin.server.engine import Engine, EngineLost, JobInputs, Preview, Row
from minikin.server.errors import RequestRejected, internal
from minikin.server.jobs import Job
from minikin.server.queue import JobQueue, QueueItem
from minikin.server.result_writer import ResultWriter

RETRY_S, LONGEST_RETRY_S = 0.2, 10.0  # between attempts to get another engine
IDLE_S = 5.0  # without work, until the engine is checked

log = logging.getLogger(__name__)


class Worker(threading.Thread):
    """Takes batches from the queue until it is closed."""

    def __init__(self, engine: Engine, queue: JobQueue, writer: ResultWriter) -> None:
        super().__init__(name=f"minikin-worker-{engine.name}", daemon=True)
        self.engine, self.queue, self.writer = engine, queue, writer
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
        while not self.queue.closed:
            try:
                batch = self.queue.take(IDLE_S, self.engine.max_batch)
                if not batch:
                    self.engine.check()
            except Exception as e:  # EngineLost, or what else is wrong with an engine that has nothing to do
                self._revive(e)
            else:
                self._work(batch)

    def _work(self, batch: list[QueueItem]) -> None:
        """Work on a batch; whatever goes wrong, its jobs end and this thread goes on."""
        try:
            self._work_on(batch)
        except Exception as e:
            for job in dict.fromkeys(item.job for item in batch):
                self.writer.fail(job, _public_error(e, job))

    def _work_on(self, batch: list[QueueItem]) -> None:
        inputs = {item.job: item.job.inputs for item in batch}  # a job that ends, for any reason, drops them
        started = set(self.writer.start(list(dict.fromkeys(item.job for item in batch))))
        batch = [item for item in batch if item.job in started]
        if not batch:
            return
        if batch[0].group is None:
            self._run_alone(batch[0].job, inputs[batch[0].job])
        else:
            self._paint(batch)

    def _paint(self, batch: list[QueueItem]) -> None:
        start = time.monotonic()
        cost = sum(item.job.prepared.cost for item in batch)
        metrics.BATCH.observe(len(batch))
        try:
            images = self.engine.paint([Row(i.job.prepared, i.seed) for i in batch], self._on_step(batch))
        except events.Cancelled:
            for job in {item.job for item in batch}:
                self.writer.drop(job)
            return
        except OutOfMemory as e:
            metrics.OOM.inc()
            if len(batch) == 1:
                self.writer.fail(batch[0].job, e)
                return
            half = len(batch) // 2
            self._paint(batch[:half])
            self._paint(batch[half:])
            return
        except EngineLost as e:
            self._requeue(batch, start, e)
            return
        except Exception as e:  # of one row, whatever it is: the other jobs, and the worker, go on
            self._isolate(batch, e)
            return
        self.queue.record_speed(cost, time.monotonic() - start)
        metrics.ENGINE.observe(time.monotonic() - start)
        for item, image in zip(batch, images, strict=True):
            self.writer.save(item.job, item.number, image)

    def _isolate(self, batch: list[QueueItem], e: Exception) -> None:
        jobs = list(dict.fromkeys(item.job for item in batch))
        if len(jobs) == 1:
            self.writer.fail(jobs[0], _public_error(e, jobs[0]))
            return
        for job in jobs:
            self._paint([item for item in batch if item.job is job])

    def _requeue(self, items: list[QueueItem], start: float, why: EngineLost) -> None:
        """Put everything back but jobs that lost their third engine, and wait for another engine."""
        self.problem = why  # before anybody hears of a job that failed by it
        attempts = self.queue.limits.attempts
        for job in dict.fromkeys(item.job for item in items):
            losses = job.count_loss(start)
            log.warning("job %s lost its engine, %d of %d times", job.id, losses, attempts)
            if losses >= attempts:
                self.writer.fail(job, _poison(job))
            elif job.cancelled.is_set():
                self.writer.drop(job)
        self.queue.give_back([item for item in items if item.job.losses < attempts])
        metrics.LOST.inc()
        self._revive(why)

    def _revive(self, why: BaseException) -> None:
        self.problem, pause = why, RETRY_S
        log.warning("%s waits for another engine: %s", self.name, why)
        while not self.queue.closed:
            try:
                self.engine.warm_up()
                self.problem = None
                return
            except Exception as e:
                self.problem = e
                log.warning("there is no engine for %s yet: %s", self.name, e)
                self.queue.closing.wait(pause)
                pause = min(2 * pause, LONGEST_RETRY_S)

    def _on_step(self, batch: list[QueueItem]) -> Callable[[int, Preview], None]:
        jobs = list(dict.fromkeys(item.job for item in batch))
        before = {job: len(job.files) * job.prepared.steps for job in jobs}
        rows = {job: [k for k, item in enumerate(batch) if item.job is job] for job in jobs}

        def step(done: int, preview: Preview) -> None:
            if all(job.cancelled.is_set() for job in jobs):
                raise events.Cancelled
            for job in jobs:
                steps = min(done, job.prepared.steps) * len(rows[job])
                job.step(before[job] + steps, preview, rows[job][0], "painting")

        return step

    def _run_alone(self, job: Job, inputs: JobInputs) -> None:
        start = time.monotonic()
        run: Any = None
        done: events.Done | None = None
        number = 0
        try:
            run = self.engine.run(job.request.kind, job.prepared, inputs)
            for event in run:
                if job.cancelled.is_set():
                    break
                if isinstance(event, events.Progress):
                    job.total = event.total
                    job.step(event.done, _preview_of(event) or job.current_preview, stage=event.stage)
                elif isinstance(event, events.Note):
                    if event.text not in job.notes:
                        job.notes.append(event.text)
                elif isinstance(event, events.ImageReady):
                    if job.request.kind == "teach":  # a sample on the way: shown, not saved
                        if event.subject_fidelity is not None:
                            score = round(event.subject_fidelity, 3)
                            job.samples.append({"step": job.done, "subject_fidelity": score})
                        job.step(job.done, _constant(event.image))
                    else:
                        self.writer.save(job, number, event.image)
                        number += 1
                elif isinstance(event, events.Done):
                    done = event
        except events.Cancelled:
            pass
        except EngineLost as e:
            self._requeue([QueueItem(job, 0)], start, e)
            return
        except Exception as e:  # of this job, whatever it is: the worker goes on
            self.writer.fail(job, _public_error(e, job))
            return
        finally:
            close: Any = getattr(run, "close", None)
            if close:
                close()
        if done is None:
            self.writer.drop(job)
        else:
            self.writer.finish(job, done)


def _preview_of(event: events.Progress) -> Preview | None:
    look = event.preview
    return (lambda row: look()) if look else None


def _constant(image: Image.Image) -> Preview:
    return lambda row: image


def _poison(job: Job) -> RequestRejected:
    message = f"The engine died {job.losses} times while it worked on this job."
    return RequestRejected(message, status=500, code="poison")


def _public_error(e: Exception, job: Job) -> MinikinError:
    if isinstance(e, MinikinError):
        return e
    log.exception("job %s failed", job.id, exc_info=e)
    return internal(job.id)
