"""The service behind all dialects: requests become jobs, jobs become results, each exactly once.

    submit   everything that can be refused is refused here; what is accepted is in the store first
    cancel   a waiting job is gone at once, a running one at its next step
    close    takes nothing new, finishes what it can, leaves the rest in the store for the next start

After a restart, jobs that were waiting wait again, and jobs that were running run again from their
start (teaching from its checkpoint): seeds are in the recipe, so the pictures are the same. Jobs whose
caller held the line end as cancelled, since nobody would fetch them. A job that was begun three times
and never ended is failed as `poison`.
"""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from minikin import events, files
from minikin.concepts import file as concept_file
from minikin.errors import BadRecipe, MinikinError, StorageError
from minikin.recipes import Paint, Recipe, Teach
from minikin.server import kinds, metrics, stamp
from minikin.server.engine import Engine, Given
from minikin.server.faults import Refused, not_found, sentence_of
from minikin.server.jobs import Asked, Job, new_id
from minikin.server.ledger import RESULTS, STORE
from minikin.server.limits import Limits, check_paint
from minikin.server.line import Line
from minikin.server.shelf import Shelf
from minikin.server.store import Store, Stored
from minikin.server.worker import Worker

log = logging.getLogger(__name__)
REMEMBERED = 512  # ended jobs in memory; older ones are read from the store


class Service:
    """One server's work: its engines, its line, its store.

    folder   private to this server: store, results, concepts, inputs
    engines  one for each device; a worker each
    """

    def __init__(self, engines: list[Engine], folder: Path, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.folder = folder
        self.results, self.inputs = folder / RESULTS, folder / "inputs"
        try:
            for place in (folder, self.results, self.inputs, folder / "concepts"):
                place.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_mode & 0o022:
                raise StorageError(f"{folder} can be written by other users. Close it: chmod go-w {folder}.")
        except OSError as e:
            raise StorageError(f"{folder} cannot be used for jobs and results: {e.strerror}.") from e
        for place in (folder, self.results, folder / "concepts"):
            files.sweep_orphans(place)
        self._held_folder = files.lock(folder / ".lock", str(folder))
        self._held_folder.__enter__()
        self.store = Store(folder / STORE)
        self.shelf = Shelf(folder / "concepts", self.store, self.limits)
        self.engine = engines[0]
        self.line = Line(self.limits)
        self.workers = [Worker(engine, self.line, self) for engine in engines]
        self.draining = False
        self._stopped = False
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._door = threading.Lock()
        self._finish_in = ThreadPoolExecutor(1, thread_name_prefix="minikin-finish")

    # ---- life --------------------------------------------------------------------------------

    def start(self) -> None:
        """Take up the jobs of before, then work."""
        self._sweep_unknown()
        for row in self.store.unfinished():
            self._again(row)
        for worker in self.workers:
            worker.start()

    @property
    def ready(self) -> str:
        """ "" when requests can be served, else why not."""
        if self.draining:
            return "draining"
        if not all(w.warm.is_set() for w in self.workers):
            return "warming up"
        if any(w.problem or not w.is_alive() for w in self.workers):
            return "a worker is not well"
        if len(self.line.waiting()) >= self.limits.waiting:
            return "the queue is full"
        return ""

    def drain(self) -> None:
        """Take nothing new."""
        self.draining = True

    def close(self, drain_s: float | None = None) -> None:
        """Finish what can be finished in time; the rest stays in the store. Idempotent."""
        if self._stopped:
            return
        self.drain()
        until = time.monotonic() + (self.limits.drain_s if drain_s is None else drain_s)
        while time.monotonic() < until and self._live():
            time.sleep(0.02)
        self._stopped = True
        for job in self._live():
            if job.asked.held:
                self._finish(job, "cancelled", code="shutting_down", message="The server is shutting down.")
            job.cancelled.set()
        self.line.close()
        for worker in self.workers:
            if worker.is_alive():
                worker.join(timeout=10)
        self._finish_in.shutdown()
        self.store.close()
        self._held_folder.__exit__(None, None, None)

    def sweep(self) -> int:
        """Remove results that are too old, or the oldest of too many; how many."""
        now, kept, gone = time.time(), 0, []
        for row in reversed(self.store.oldest_pictures()):
            kept += row["bytes"]
            if now - row["made"] > self.limits.keep_s or kept > self.limits.keep_bytes:
                gone.append(row["id"])
        for id_ in gone:
            self._file(id_).unlink(missing_ok=True)
        if gone:
            self.store.forget(gone)
        return len(gone)

    # ---- requests ----------------------------------------------------------------------------

    def submit(
        self, asked: Asked, values: Mapping[str, Any], concepts: Mapping[str, str] | None = None,
        given: Given | None = None,
    ) -> Job:  # fmt: skip
        """Accept a request or raise what is wrong with it; blocks for milliseconds.

        values    the recipe's fields; prompts may name concepts by content
        concepts  contents by name: {"tom": "sha256:..."}
        """
        if self.draining:
            raise Refused("The server is shutting down.", status=503, code="draining", retry_s=10)
        self.line.check(asked.client)
        model = kinds.ready(asked.kind)
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
        prepared = self.engine.prepare(asked.kind, recipe, pinned, given)
        job = Job(asked, prepared, _seeds(recipe), given or Given())
        job.notes += prepared.warnings
        if given is not None:
            job.given = replace(given, folder=self.inputs / job.id, stop=threading.Event())
            stamp.keep_inputs(job.given)
        row = {
            "id": job.id, "kind": asked.kind, "client": asked.client, "dialect": asked.dialect,
            "task": asked.task, "held": int(asked.held), "status": "queued", "recipe": recipe.model_dump_json(),
            "concepts": {n: p.sha256 for n, p in pinned.items()}, "warnings": job.notes, "created": job.created,
        }  # fmt: skip
        try:
            with self._door:
                self.line.check(asked.client)
                self.store.accept(row)
                self._remember(job)
                self.line.put(job, forced=True)
        except BaseException:
            self._forget_inputs(job)
            raise
        return job

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
        """Nobody wants it any more."""
        job.cancelled.set()
        self.line.remove(job)
        if job.asked.kind != "teach" or job.started is None:  # its checkpoint is written at the next step
            self._later(self._finish, job, "cancelled")

    def read(self, client: str, picture: str) -> bytes:
        """A picture's file; raises Refused, 404, for what is not there or not this client's."""
        found = self.store.picture(picture, client) if len(picture) == 32 and picture.isalnum() else None
        if found is None:
            raise not_found("picture", picture)
        with suppress(OSError):
            return self._file(picture).read_bytes()
        raise not_found("picture", picture)

    def bytes_of(self, picture: Stored) -> bytes:
        return self._file(picture.id).read_bytes()

    # ---- the worker's desk -------------------------------------------------------------------

    def begun(self, jobs: list[Job]) -> list[Job]:
        new = [job for job in jobs if job.started is None]
        wanted = [job for job in jobs if job.begin()]
        begun = [job for job in new if job in wanted]
        if begun and not self._stopped:
            try:
                self.store.start([job.id for job in begun])
            except MinikinError as e:
                for job in begun:
                    self.failed(job, e)
                return [job for job in wanted if job not in begun]
        for job in begun:
            metrics.WAIT.observe(max(0.0, time.time() - job.created))
        return wanted

    def made(self, job: Job, number: int, image: Image.Image) -> None:
        self._later(self._keep, job, number, image)

    def done(self, job: Job, result: events.Done) -> None:
        self._later(self._done, job, result)

    def failed(self, job: Job, error: MinikinError) -> None:
        self.line.remove(job)
        self._later(self._finish, job, "failed", error)

    def dropped(self, job: Job) -> None:
        if not self._stopped:
            self._later(self._finish, job, "cancelled")

    # ---- finishing, one thing after the other ------------------------------------------------

    def _later(self, work: Any, *args: Any) -> None:
        with suppress(RuntimeError):  # shut down: the store has the job as it was
            self._finish_in.submit(self._guarded, work, *args)

    def _guarded(self, work: Any, job: Job, *args: Any) -> None:
        try:
            work(job, *args)
        except MinikinError as e:
            self.line.remove(job)
            self._finish(job, "failed", e)
        except Exception:
            log.exception("finishing job %s", job.id)
            self.line.remove(job)
            self._finish(
                job,
                "failed",
                Refused(f"Internal error. Reference {job.id}.", status=500, code="internal_error"),
            )

    def _keep(self, job: Job, number: int, image: Image.Image) -> None:
        if job.over or job.cancelled.is_set():
            return
        seed = job.seeds[number] if number < len(job.seeds) else None
        info, job.infotexts[number] = stamp.inside(
            self.engine.facts(job.prepared), job.prepared.recipe, image, seed
        )
        buffer = io.BytesIO()
        image.save(buffer, "PNG", pnginfo=info, compress_level=1)
        data, id_ = buffer.getvalue(), new_id()
        files.atomic_write(self._file(id_), data)
        sha = hashlib.sha256(data).hexdigest()
        job.files[number] = Stored(id_, number, seed, sha, len(data), *image.size)
        metrics.PICTURES.inc()
        if job.prepared.group is not None and len(job.files) == len(job.seeds):
            self._finish(job, "completed")
        else:
            job.changed()

    def _done(self, job: Job, done: events.Done) -> None:
        if job.asked.kind != "teach":
            self._finish(job, "completed")
            return
        concept = done.result
        data = concept_file.to_bytes(concept, int8=getattr(job.prepared.recipe, "int8", None))
        entry = self.shelf.put(job.asked.client, data)
        job.result = {
            "concept": {"name": entry.name, "sha256": entry.sha256, "bytes": len(data)},
            "facts": {k: v for k, v in done.facts.items() if isinstance(v, int | float | str | bool)},
        }
        self._finish(job, "completed")

    def _finish(
        self, job: Job, status: str, error: MinikinError | None = None, *, code: str | None = None,
        message: str | None = None,
    ) -> None:  # fmt: skip
        if not job.claim(status):
            return
        job.error = error
        pictures = job.pictures if status == "completed" else []
        if error is not None:
            code, message = error.code, sentence_of(error)
        try:
            self.store.end(job.id, status, pictures=pictures, code=code, message=message, result=job.result)
        except MinikinError as e:  # it is in the store as unfinished, and runs again after a restart
            log.exception("the end of job %s was not written", job.id)
            job.status, job.error = "failed", e
            pictures = []
        if status != "completed" or not pictures:
            for one in job.pictures:
                self._file(one.id).unlink(missing_ok=True)
        self._forget_inputs(job)
        metrics.JOBS.labels(job.asked.kind, job.status).inc()
        job.end()

    # ---- the rest ----------------------------------------------------------------------------

    def _again(self, row: dict[str, Any]) -> None:
        """A job of before the restart: run it again, or end it."""
        asked = Asked(row["kind"], row["client"], row["dialect"], row["task"])
        why: MinikinError | None = None
        if row["held"]:
            self.store.end(row["id"], "cancelled", code="interrupted", message="The server was restarted.")
        elif row["attempts"] >= self.limits.attempts:
            why = Refused(
                f"This job was begun {row['attempts']} times, and each time the server ended before it did.",
                status=500, code="poison",
            )  # fmt: skip
        else:
            try:
                recipe = kinds.ready(row["kind"]).make(**row["recipe"])
                one = kinds.KINDS[row["kind"]]
                given = stamp.inputs(self.inputs / row["id"], (*one.takes, *one.may))
                concepts = self.shelf.again(row["concepts"])
                prepared = self.engine.prepare(row["kind"], recipe, concepts, given)
                job = Job(asked, prepared, _seeds(recipe), given, id=row["id"], created=row["created"])
                job.attempts = row["attempts"]
                job.notes += row["warnings"]
                self._remember(job)
                self.line.put(job, forced=True)
                return
            except MinikinError as e:
                why = e
        if why is not None:
            self.store.end(row["id"], "failed", code=why.code, message=sentence_of(why))
        shutil.rmtree(self.inputs / row["id"], ignore_errors=True)

    def _live(self) -> list[Job]:
        with self._door:
            return [job for job in self._jobs.values() if not job.over]

    def _remember(self, job: Job) -> None:
        self._jobs[job.id] = job
        ended = [id_ for id_, one in self._jobs.items() if one.over]
        for id_ in ended[: max(0, len(ended) - REMEMBERED)]:
            del self._jobs[id_]

    def _forget_inputs(self, job: Job) -> None:
        if job.given.folder is not None:
            shutil.rmtree(job.given.folder, ignore_errors=True)

    def _sweep_unknown(self) -> None:
        """Files that a killed process wrote and nobody knows of."""
        known = {row["id"] for row in self.store.oldest_pictures()}
        for path in self.results.glob("*.png"):
            if path.stem not in known:
                path.unlink(missing_ok=True)

    def _file(self, picture: str) -> Path:
        return self.results / f"{picture}.png"


def _seeds(recipe: Recipe) -> list[int]:
    if isinstance(recipe, Teach):
        return []
    first, n = getattr(recipe, "seed", 0), getattr(recipe, "n", 1)
    if not isinstance(first, int) or not isinstance(n, int):
        raise BadRecipe("seed and n must be whole numbers.")
    return list(range(first, first + n))
