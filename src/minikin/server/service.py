"""The service behind all APIs: requests become jobs, jobs become results, each exactly once.

    submit   admission: rejects what cannot be done; an accepted job is in the store before it waits
    cancel   ends a waiting job at once, a running one at its next step
    close    accepts nothing new, finishes what it can, leaves the rest in the store for the next start

After a restart, waiting jobs wait again and running jobs run again from their start (teaching from its
checkpoint): seeds are in the recipe, so the images are the same. Jobs of blocking requests end as cancelled,
since nobody would fetch them. A job that was started three times and never ended fails as `poison`.
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
from minikin.server import decode, image_metadata, job_types, metrics, retention
from minikin.server.admission import Places, Turns, key_of, most_of_key
from minikin.server.audit import CONCEPTS, INPUTS, RESULTS, STORE
from minikin.server.concept_store import ConceptStore, notes_on_unused
from minikin.server.engine import Engine, JobInputs
from minikin.server.errors import RequestRejected, internal, not_found, sentence_of
from minikin.server.image_folder import ImageFolder, is_gone, is_kept
from minikin.server.image_folder import delete as delete_file
from minikin.server.job_store import JobStore, StoredImage
from minikin.server.jobs import Job, JobRequest
from minikin.server.limits import Limits, check_paint, check_teach
from minikin.server.queue import JobQueue
from minikin.server.result_writer import ResultWriter, delete_inputs
from minikin.server.worker import Worker

log = logging.getLogger(__name__)
MAX_ENDED = 512  # ended jobs in memory; older ones are read from the store


class Service:
    """Engines, queue and store of one server.

    folder   private to this server: store, results, concepts, inputs
    engines  one per device, each with a worker
    marking, filtering  see `ResultWriter`
    image_folder  where images are kept for the one person who uses this server; None deletes them in time
    one_library   concepts go into that person's library, where the command line finds them
    """

    def __init__(
        self, engines: list[Engine], folder: Path, limits: Limits | None = None, *,
        marking: Marking = MARKED, filtering: Filtering | None = None, image_folder: Path | None = None,
        one_library: bool = False,
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
        self._folder_lock = files.lock(folder / ".lock", str(folder))
        self._folder_lock.__enter__()
        for place in (folder, self.results, folder / CONCEPTS):
            files.sweep_orphans(place, 0.0)  # no other process writes here
        self.store = JobStore(folder / STORE)
        self.concept_store = ConceptStore(folder / CONCEPTS, self.store, self.limits, one_library=one_library)
        self.engine = engines[0]
        self.queue = JobQueue(self.limits)
        self.streams = Places(self.limits.event_streams, "event streams", "too_many_streams")
        self.decoding = Turns(decode.MAX_CHILDREN, self.limits.decode_wait_s)
        self.live_sessions = Places(self.limits.live_sessions, "live sessions", "too_many_sessions")
        self.writer = ResultWriter(
            self.engine, self.queue, self.store, self.concept_store, self.results, marking, filtering,
            ImageFolder(image_folder) if image_folder else None,
        )  # fmt: skip
        self.workers = [Worker(engine, self.queue, self.writer) for engine in engines]
        self.draining, self._drain_deadline = False, 0.0
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._admission_lock, self._jobs_lock = (
            threading.Lock(),
            threading.Lock(),
        )  # the second is never held while writing to disk

    # ---- life --------------------------------------------------------------------------------

    def start(self) -> None:
        """Resume the jobs of the last run, then start the workers."""
        self._sweep_unknown()
        for row in self.store.unfinished():
            self._resume(row)
        self.concept_store.share()
        self.concept_store.sweep()
        for worker in self.workers:
            worker.start()

    @property
    def ready(self) -> str:
        """ "" when requests can be served, else the reason why not."""
        if self.draining:
            return "draining"
        if not all(w.warm.is_set() for w in self.workers):
            return "warming up"
        if all(w.problem or not w.is_alive() for w in self.workers):
            return "no engine works"
        if len(self.queue.waiting()) >= self.limits.waiting:
            return "the queue is full"
        return ""

    def drain(self) -> None:
        """Accept nothing new; unfinished jobs have `drain_s` from now on."""
        if not self.draining:
            self._drain_deadline = time.monotonic() + self.limits.drain_s
            self.draining = True

    def finish(self, seconds: float | None = None) -> None:
        """Wait until every job has ended, or until the drain deadline; blocks."""
        deadline = self._drain_deadline if seconds is None else time.monotonic() + seconds
        while time.monotonic() < deadline and self._unfinished():
            time.sleep(0.02)

    def close(self, drain_s: float | None = None) -> None:
        """Finish what can be finished in time; the rest stays in the store. Idempotent."""
        if self.writer.stopped:
            return
        self.drain()
        self.finish(drain_s)
        self.writer.stopped = True
        remaining = self._unfinished()
        for job in remaining:
            if job.request.blocking:
                message = "The server is shutting down."
                self.writer.end(job, "cancelled", code="shutting_down", message=message)
            elif job.cancelled.is_set():  # by its client; the next start would run it otherwise
                self.writer.end(job, "cancelled")
            job.cancelled.set()
        self.queue.close()
        for worker in self.workers:
            if worker.is_alive():
                worker.join(timeout=10)
        self.writer.close()
        for job in remaining:
            if job.status != "completed":
                self.writer.delete_images(job)  # the next start generates them again
        with suppress(MinikinError):  # else the next start does
            self.concept_store.sweep()
        self.store.close()
        self._folder_lock.__exit__(None, None, None)

    def sweep(self) -> int:
        """Remove results that are too old or too many (`retention`); returns how many. Requests of that age
        and concepts without an owner are removed with them. A person's own files stay (`image_folder`)."""
        now, rows = time.time(), self.store.oldest_images()
        personal = {row["id"] for row in rows if is_kept(self.writer.path(row["id"]))}
        expired = [id_ for id_ in personal if is_gone(self.writer.path(id_))]
        expired += retention.expired((row for row in rows if row["id"] not in personal), self.limits, now)
        for id_ in list(expired):
            try:
                self.writer.path(id_).unlink(missing_ok=True)
            except OSError as e:  # the next sweep tries again
                log.warning("result %s cannot be removed: %s", id_, e)
                expired.remove(id_)
        if expired:
            self.store.forget(expired)
        self.store.expire(now - self.limits.keep_s)
        with self._jobs_lock:
            for job in [job for job in self._jobs.values() if job.over]:
                if job.ended is not None and now - job.ended > self.limits.keep_s:
                    del self._jobs[job.id]
        self.concept_store.sweep()
        return len(expired)

    # ---- requests ----------------------------------------------------------------------------

    def check_open(self, client: str) -> None:
        """Raise RequestRejected (503 or 429) when a job of this client would not be accepted now."""
        if self.draining:
            raise RequestRejected("The server is shutting down.", status=503, code="draining", retry_s=10)
        self.queue.check(client)

    def submit(
        self, request: JobRequest, values: Mapping[str, Any], concepts: Mapping[str, str] | None = None,
        inputs: JobInputs | None = None,
    ) -> Job:  # fmt: skip
        """Accept a request or raise what is wrong with it; blocks for milliseconds.

        values    the recipe's fields; prompts may name concepts by content
        concepts  contents by name: {"tom": "sha256:..."}
        """
        self.check_open(request.client)
        if request.kind == "teach":
            teaching = [job.request.client for job in self._unfinished() if job.request.kind == "teach"]
            self.concept_store.check_quota(request.client, teaching)
        fields, pinned = self.concept_store.pin(request.client, values, concepts or {})
        recipe = self._recipe(request.kind, fields, inputs)
        prepared = self.engine.prepare(request.kind, recipe, pinned, inputs)
        job = Job(
            request,
            prepared,
            _seeds(recipe),
            inputs or JobInputs(),
            previews_allowed=self.writer.previews_allowed,
        )
        job.notes += prepared.warnings
        if isinstance(recipe, Paint):
            job.notes += self.concept_store.notes_on_words(request.client, recipe.prompt)
            job.notes += notes_on_unused(set(concepts or {}) - set(pinned))
        if inputs is not None:
            job.inputs = replace(inputs, folder=self.inputs / job.id, stop=threading.Event())
        row = {
            "id": job.id, "kind": request.kind, "client": request.client, "dialect": request.dialect,
            "task": request.task, "held": int(request.blocking), "status": "queued",
            "recipe": recipe.model_dump_json(), "concepts": {n: p.sha256 for n, p in pinned.items()},
            "warnings": job.notes, "created": job.created,
        }  # fmt: skip
        try:
            if inputs is not None:
                image_metadata.save_inputs(job.inputs)
            with self.concept_store.files_locked(pinned), self._admission_lock:
                self.queue.check(request.client)
                self._check_input_memory(job)
                self.store.accept(row, job.inputs.parent)
                self._remember(job)
                self.queue.put(job, forced=True)
        except BaseException:
            delete_inputs(job)
            raise
        return job

    def _recipe(self, kind: str, fields: Mapping[str, Any], inputs: JobInputs | None) -> Recipe:
        """The recipe of these fields. Raises MinikinError for what is wrong or beyond the limits."""
        values = {name: value for name, value in fields.items() if value is not None}
        recipe: Recipe = job_types.recipe_model(kind).make(**{"base": self.engine.name, **values})
        if getattr(recipe, "base", self.engine.name) != self.engine.name:
            raise RequestRejected(
                f"This server's base is '{self.engine.name}', not '{getattr(recipe, 'base', '')}'.",
                status=404, code="model_not_found", param="base",
            )  # fmt: skip
        if isinstance(recipe, Paint):
            image = inputs.images.get("image") if inputs else None
            check_paint(recipe, self.limits, self.engine.side, image.size if image else None)
        elif isinstance(recipe, Teach):
            check_teach(recipe, self.limits, self.engine.side)
        return recipe

    def _check_input_memory(self, job: Job) -> None:
        """Raise RequestRejected (429) when its input images and those of other jobs do not fit into memory.

        One key gets at most half of it, except for a single job.
        """
        key, unfinished = key_of(job.request.client), self._unfinished()
        of_key = [other for other in unfinished if key_of(other.request.client) == key]
        most = self.limits.waiting_pixels
        for jobs, limit in ((unfinished, most), (of_key, most_of_key(most, key))):
            pixels = sum(other.inputs.area for other in jobs)
            if pixels and job.inputs.area and pixels + job.inputs.area > limit:
                raise self.queue.rejection(
                    f"the input images of unfinished jobs have {pixels / 1e6:.0f} megapixels already"
                )

    def job(self, client: str, id_: str) -> Job | None:
        """A job of this client that is in memory."""
        job = self._jobs.get(id_)
        return job if job is not None and job.request.client == client else None

    def unfinished(self, client: str) -> list[Job]:
        """This client's jobs that have not ended, oldest first."""
        return [job for job in self._unfinished() if job.request.client == client]

    def running(self) -> list[Job]:
        """Jobs of all clients that have started and not ended."""
        return [job for job in self._unfinished() if job.started is not None]

    def cancel(self, job: Job) -> None:
        """Cancel a job; one that failed and was to be resumed by the next start is not resumed."""
        if job.over:
            self.writer.submit(self.writer.abandon, job)
            return
        job.cancelled.set()
        waited = self.queue.remove(job)
        saving = job.request.kind == "teach" and job.started is not None and not waited  # at its next step
        if not saving:
            self.writer.submit(self.writer.end, job, "cancelled")

    def read(self, client: str, image_id: str) -> bytes:
        """An image's file; raises RequestRejected (404) when it is not there or belongs to another client."""
        valid = len(image_id) == 32 and image_id.isalnum()
        if valid and self.store.image(image_id, client) is not None:
            with suppress(OSError):
                return self.writer.path(image_id).read_bytes()
        raise not_found("image", image_id)

    def delete_image(self, client: str, image_id: str) -> None:
        """Delete an image, its file in a person's folder too. Raises RequestRejected (404, 507)."""
        if (row := self.store.image(image_id, client)) is None:
            raise not_found("image", image_id)
        try:
            delete_file(self.writer.path(image_id), row["sha256"])
        except OSError as e:
            message = f"The image was not deleted: {e.strerror}. Give the server the right to, and try again."
            raise RequestRejected(message, status=507, code="storage") from e
        self.store.forget([image_id])
        if job := self.job(client, row["job"]):
            job.files.pop(row["number"], None)

    def read_file(self, image: StoredImage) -> bytes:
        return self.writer.path(image.id).read_bytes()

    # ---- jobs of the last run ----------------------------------------------------------------

    def _resume(self, row: dict[str, Any]) -> None:
        """Run a job from before the restart again, or end it."""
        request = JobRequest(row["kind"], row["client"], row["dialect"], row["task"])
        error: MinikinError | None = None
        if row["held"]:
            self.store.end(row["id"], "cancelled", code="interrupted", message="The server was restarted.")
            metrics.JOBS.labels(row["kind"], "cancelled").inc()
        elif row["attempts"] >= self.limits.attempts:
            error = RequestRejected(
                f"This job was started {row['attempts']} times, and each time the server ended before it did.",
                status=500, code="poison",
            )  # fmt: skip
        elif row["damaged"]:
            error = RequestRejected(
                "The record of this job is damaged, so it cannot be resumed. Send it again.",
                status=500, code="damaged",
            )  # fmt: skip
        else:
            try:
                recipe = job_types.recipe_model(row["kind"]).make(**row["recipe"])
                job_type = job_types.JOB_TYPES[row["kind"]]
                inputs = image_metadata.load_inputs(
                    self.inputs / row["id"], (*job_type.required, *job_type.optional)
                )
                concepts = self.concept_store.reload(row["concepts"])
                prepared = self.engine.prepare(row["kind"], recipe, concepts, inputs)
                job = Job(
                    request, prepared, _seeds(recipe), inputs, id=row["id"], created=row["created"],
                    previews_allowed=self.writer.previews_allowed,
                )  # fmt: skip
                job.attempts = row["attempts"]
                job.notes += row["warnings"]
                self._remember(job)
                self.queue.put(job, forced=True)
                return
            except MinikinError as e:
                error = e
            except Exception:  # whatever it is: one job must not keep the others from being served
                log.exception("job %s cannot be resumed", row["id"])
                error = internal(row["id"])
        if error is not None:
            self.store.end(row["id"], "failed", code=error.code, message=sentence_of(error))
            metrics.JOBS.labels(row["kind"], "failed").inc()
        shutil.rmtree(self.inputs / row["id"], ignore_errors=True)

    def _unfinished(self) -> list[Job]:
        with self._jobs_lock:
            return [job for job in self._jobs.values() if not job.over]

    def _remember(self, job: Job) -> None:
        with self._jobs_lock:
            self._jobs[job.id] = job
            ended = [id_ for id_, j in self._jobs.items() if j.over]
            for id_ in ended[: max(0, len(ended) - MAX_ENDED)]:
                del self._jobs[id_]

    def _sweep_unknown(self) -> None:
        """Remove files of a killed process that the store does not know."""
        stored_names = {f"{row['id']}.png" for row in self.store.oldest_images()}
        for path in self.results.iterdir():
            if path.name not in stored_names:
                path.unlink(missing_ok=True)
        unfinished = {row["id"] for row in self.store.unfinished()}
        for folder in self.inputs.iterdir():
            if folder.name not in unfinished:
                shutil.rmtree(folder, ignore_errors=True)


def _seeds(recipe: Recipe) -> list[int]:
    if isinstance(recipe, Teach):
        return []
    first, n = getattr(recipe, "seed", 0), getattr(recipe, "n", 1)
    if not isinstance(first, int) or not isinstance(n, int):
        raise BadRecipe("seed and n must be whole numbers.")
    return list(range(first, first + n))
