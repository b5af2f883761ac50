"""The service behind all dialects: requests become jobs, jobs become results, each exactly once.

    submit   everything that can be refused is refused here; what is accepted is in the store first
    cancel   a waiting job is gone at once, a running one at its next step
    close    takes nothing new, finishes what it can, leaves the rest in the store for the next start

After a restart, jobs that were waiting wait again, and jobs that were running run again from their
start (teaching from its checkpoint): seeds are in the recipe, so the images are the same. Jobs whose
caller held the line end as cancelled, since nobody would fetch them. A job that was begun three times
and never ended is failed as `poison`.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from minikin import files
from minikin.errors import BadRecipe, MinikinError, StorageError
from minikin.generation.content_filter import Filtering
from minikin.images.encode import MARKED, Marking
from minikin.recipes import Paint, Recipe, Teach
from minikin.server import image_metadata, job_types, metrics
from minikin.server.audit import CONCEPTS, INPUTS, RESULTS, STORE
from minikin.server.concept_store import Shelf
from minikin.server.engine import Engine, Given
from minikin.server.errors import Refused, not_found, sentence_of
from minikin.server.job_store import Store, Stored
from minikin.server.jobs import Asked, Job
from minikin.server.limits import Limits, check_paint, check_teach
from minikin.server.queue import Line
from minikin.server.result_writer import Finishing, forget_inputs
from minikin.server.worker import Worker

log = logging.getLogger(__name__)
REMEMBERED = 512  # ended jobs in memory; older ones are read from the store


class Service:
    """One server's work: its engines, its line, its store.

    folder   private to this server: store, results, concepts, inputs
    engines  one for each device; a worker each
    marking, filtering  see `Finishing`
    """

    def __init__(
        self, engines: list[Engine], folder: Path, limits: Limits | None = None, *,
        marking: Marking = MARKED, filtering: Filtering | None = None,
    ) -> None:  # fmt: skip
        self.limits = limits or Limits()
        self.marking, self.filtering = marking, filtering
        self.folder = folder
        self.results, self.inputs = folder / RESULTS, folder / INPUTS
        try:
            for place in (folder, self.results, self.inputs, folder / CONCEPTS):
                place.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_mode & 0o022:
                raise StorageError(f"{folder} can be written by other users. Close it: chmod go-w {folder}.")
        except OSError as e:
            raise StorageError(f"{folder} cannot be used for jobs and results: {e.strerror}.") from e
        self._held_folder = files.lock(folder / ".lock", str(folder))
        self._held_folder.__enter__()
        for place in (folder, self.results, folder / CONCEPTS):
            files.sweep_orphans(place, 0.0)  # nobody else writes here
        self.store = Store(folder / STORE)
        self.shelf = Shelf(folder / CONCEPTS, self.store, self.limits)
        self.engine = engines[0]
        self.line = Line(self.limits)
        self.finishing = Finishing(
            self.engine, self.line, self.store, self.shelf, self.results, marking, filtering
        )
        self.workers = [Worker(engine, self.line, self.finishing) for engine in engines]
        self.draining, self._drained_by = False, 0.0
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._door, self._listing = threading.Lock(), threading.Lock()  # the second never waits for the disk

    # ---- life --------------------------------------------------------------------------------

    def start(self) -> None:
        """Take up the jobs of before, then work."""
        self._sweep_unknown()
        for row in self.store.unfinished():
            self._again(row)
        self.shelf.sweep()
        for worker in self.workers:
            worker.start()

    @property
    def ready(self) -> str:
        """ "" when requests can be served, else why not."""
        if self.draining:
            return "draining"
        if not all(w.warm.is_set() for w in self.workers):
            return "warming up"
        if all(w.problem or not w.is_alive() for w in self.workers):
            return "a worker is not well"
        if len(self.line.waiting()) >= self.limits.waiting:
            return "the queue is full"
        return ""

    def drain(self) -> None:
        """Take nothing new; from now on what is in hand has `drain_s` to be finished."""
        if not self.draining:
            self._drained_by = time.monotonic() + self.limits.drain_s
            self.draining = True

    def finish(self, seconds: float | None = None) -> None:
        """Wait until nothing is in hand, or the time of draining is over; blocks."""
        until = self._drained_by if seconds is None else time.monotonic() + seconds
        while time.monotonic() < until and self._live():
            time.sleep(0.02)

    def close(self, drain_s: float | None = None) -> None:
        """Finish what can be finished in time; the rest stays in the store. Idempotent."""
        if self.finishing.stopped:
            return
        self.drain()
        self.finish(drain_s)
        self.finishing.stopped = True
        left = self._live()
        for job in left:
            if job.asked.held:
                said = "The server is shutting down."
                self.finishing.end(job, "cancelled", code="shutting_down", message=said)
            elif job.cancelled.is_set():  # by its caller; it would come back otherwise
                self.finishing.end(job, "cancelled")
            job.cancelled.set()
        self.line.close()
        for worker in self.workers:
            if worker.is_alive():
                worker.join(timeout=10)
        self.finishing.close()
        for job in left:
            if job.status != "completed":
                self.finishing.forget_pictures(job)  # they are painted again by the next start
        with suppress(MinikinError):  # else the next start does
            self.shelf.sweep()
        self.store.close()
        self._held_folder.__exit__(None, None, None)

    def sweep(self) -> int:
        """Remove results that are too old, or the oldest of too many; how many. With them go the requests that
        are as old, and concepts that nobody has any more."""
        now, kept, gone = time.time(), 0, []
        for row in reversed(self.store.oldest_pictures()):
            kept += row["bytes"]
            if now - row["made"] > self.limits.keep_s or kept > self.limits.keep_bytes:
                gone.append(row["id"])
        for id_ in list(gone):
            try:
                self.finishing.file(id_).unlink(missing_ok=True)
            except OSError as e:  # the next sweep tries again
                log.warning("result %s cannot be removed: %s", id_, e)
                gone.remove(id_)
        if gone:
            self.store.forget(gone)
        self.store.expire(now - self.limits.keep_s)
        with self._listing:
            for job in [job for job in self._jobs.values() if job.over]:
                if job.ended is not None and now - job.ended > self.limits.keep_s:
                    del self._jobs[job.id]
        self.shelf.sweep()
        return len(gone)

    # ---- requests ----------------------------------------------------------------------------

    def check_open(self, client: str) -> None:
        """Raise Refused when no job of this client would be taken now: 503 or 429, with when to come back."""
        if self.draining:
            raise Refused("The server is shutting down.", status=503, code="draining", retry_s=10)
        self.line.check(client)

    def submit(
        self, asked: Asked, values: Mapping[str, Any], concepts: Mapping[str, str] | None = None,
        given: Given | None = None,
    ) -> Job:  # fmt: skip
        """Accept a request or raise what is wrong with it; blocks for milliseconds.

        values    the recipe's fields; prompts may name concepts by content
        concepts  contents by name: {"tom": "sha256:..."}
        """
        self.check_open(asked.client)
        model = job_types.ready(asked.kind)
        if asked.kind == "teach":
            self.shelf.check_room(
                asked.client, sum(job.asked.kind == "teach" for job in self.live(asked.client))
            )
        told, pinned = self.shelf.pin(asked.client, values, concepts or {})
        recipe: Recipe = model.make(
            **{"base": self.engine.name, **{k: v for k, v in told.items() if v is not None}}
        )
        if getattr(recipe, "base", self.engine.name) != self.engine.name:
            raise Refused(
                f"This server paints with base '{self.engine.name}', not '{getattr(recipe, 'base', '')}'.",
                status=404, code="model_not_found", param="base",
            )  # fmt: skip
        if isinstance(recipe, Paint):
            picture = given.pictures.get("picture") if given else None
            check_paint(recipe, self.limits, self.engine.side, picture.size if picture else None)
        elif isinstance(recipe, Teach):
            check_teach(recipe, self.limits, self.engine.side)
        prepared = self.engine.prepare(asked.kind, recipe, pinned, given)
        job = Job(asked, prepared, _seeds(recipe), given or Given(), may_show=self.finishing.may_show)
        job.notes += prepared.warnings
        if given is not None:
            job.given = replace(given, folder=self.inputs / job.id, stop=threading.Event())
        row = {
            "id": job.id, "kind": asked.kind, "client": asked.client, "dialect": asked.dialect,
            "task": asked.task, "held": int(asked.held), "status": "queued", "recipe": recipe.model_dump_json(),
            "concepts": {n: p.sha256 for n, p in pinned.items()}, "warnings": job.notes, "created": job.created,
        }  # fmt: skip
        try:
            if given is not None:
                image_metadata.keep_inputs(job.given)
            with self.shelf.standing(pinned), self._door:
                self.line.check(asked.client)
                self._check_area(job)
                self.store.accept(row)
                self._remember(job)
                self.line.put(job, forced=True)
        except BaseException:
            forget_inputs(job)
            raise
        return job

    def _check_area(self, job: Job) -> None:
        """Raise Refused, 429, for images that do not fit into memory beside those of what waits."""
        held = sum(one.given.area for one in self._live())
        if held and held + job.given.area > self.limits.waiting_pixels:
            raise self.line.full(f"the images of what waits have {held / 1e6:.0f} megapixels already")

    def job(self, client: str, id_: str) -> Job | None:
        """A job of this client that is in memory."""
        job = self._jobs.get(id_)
        return job if job is not None and job.asked.client == client else None

    def live(self, client: str) -> list[Job]:
        """This client's jobs that have not ended, the oldest first."""
        return [job for job in self._live() if job.asked.client == client]

    def running(self) -> list[Job]:
        """Everybody's jobs that are begun and have not ended."""
        return [job for job in self._live() if job.started is not None]

    def cancel(self, job: Job) -> None:
        """Nobody wants it any more; one that failed and was to go on after a restart does not."""
        if job.over:
            self.finishing.later(self.finishing.give_up, job)
            return
        job.cancelled.set()
        waited = self.line.remove(job)
        saving = job.asked.kind == "teach" and job.started is not None and not waited  # at its next step
        if not saving:
            self.finishing.later(self.finishing.end, job, "cancelled")

    def read(self, client: str, picture: str) -> bytes:
        """An image's file; raises Refused, 404, for what is not there or not this client's."""
        found = self.store.picture(picture, client) if len(picture) == 32 and picture.isalnum() else None
        if found is None:
            raise not_found("picture", picture)
        with suppress(OSError):
            return self.finishing.file(picture).read_bytes()
        raise not_found("picture", picture)

    def bytes_of(self, picture: Stored) -> bytes:
        return self.finishing.file(picture.id).read_bytes()

    # ---- the rest ----------------------------------------------------------------------------

    def _again(self, row: dict[str, Any]) -> None:
        """A job of before the restart: run it again, or end it."""
        asked = Asked(row["kind"], row["client"], row["dialect"], row["task"])
        why: MinikinError | None = None
        if row["held"]:
            self.store.end(row["id"], "cancelled", code="interrupted", message="The server was restarted.")
            metrics.JOBS.labels(row["kind"], "cancelled").inc()
        elif row["attempts"] >= self.limits.attempts:
            why = Refused(
                f"This job was begun {row['attempts']} times, and each time the server ended before it did.",
                status=500, code="poison",
            )  # fmt: skip
        else:
            try:
                recipe = job_types.ready(row["kind"]).make(**row["recipe"])
                one = job_types.KINDS[row["kind"]]
                given = image_metadata.inputs(self.inputs / row["id"], (*one.takes, *one.may))
                concepts = self.shelf.again(row["concepts"])
                prepared = self.engine.prepare(row["kind"], recipe, concepts, given)
                job = Job(
                    asked, prepared, _seeds(recipe), given, id=row["id"], created=row["created"],
                    may_show=self.finishing.may_show,
                )  # fmt: skip
                job.attempts = row["attempts"]
                job.notes += row["warnings"]
                self._remember(job)
                self.line.put(job, forced=True)
                return
            except MinikinError as e:
                why = e
            except Exception:  # whatever it is: one job does not keep the others from being served
                log.exception("job %s cannot be begun again", row["id"])
                why = Refused(f"Internal error. Reference {row['id']}.", status=500, code="internal_error")
        if why is not None:
            self.store.end(row["id"], "failed", code=why.code, message=sentence_of(why))
            metrics.JOBS.labels(row["kind"], "failed").inc()
        shutil.rmtree(self.inputs / row["id"], ignore_errors=True)

    def _live(self) -> list[Job]:
        with self._listing:
            return [job for job in self._jobs.values() if not job.over]

    def _remember(self, job: Job) -> None:
        with self._listing:
            self._jobs[job.id] = job
            ended = [id_ for id_, one in self._jobs.items() if one.over]
            for id_ in ended[: max(0, len(ended) - REMEMBERED)]:
                del self._jobs[id_]

    def _sweep_unknown(self) -> None:
        """Files that a killed process wrote and nobody knows of, or did not come to remove."""
        known = {f"{row['id']}.png" for row in self.store.oldest_pictures()}
        for path in self.results.iterdir():
            if path.name not in known:
                path.unlink(missing_ok=True)
        wanted = {row["id"] for row in self.store.unfinished()}
        for folder in self.inputs.iterdir():
            if folder.name not in wanted:
                shutil.rmtree(folder, ignore_errors=True)


def _seeds(recipe: Recipe) -> list[int]:
    if isinstance(recipe, Teach):
        return []
    first, n = getattr(recipe, "seed", 0), getattr(recipe, "n", 1)
    if not isinstance(first, int) or not isinstance(n, int):
        raise BadRecipe("seed and n must be whole numbers.")
    return list(range(first, first + n))
