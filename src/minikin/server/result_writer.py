"""Result writer: filters, marks and saves the images of jobs, and records how jobs ended.

Everything that touches the disk is done by one thread, one thing after the other, so that workers go on
generating and a job's end comes after its images.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from minikin import events, files
from minikin.errors import MinikinError, StorageError
from minikin.generation.content_filter import Filtering
from minikin.generation.image import GeneratedImage
from minikin.images import xmp
from minikin.images.encode import Marking
from minikin.recipes import Paint
from minikin.server import image_folder, image_metadata, metrics
from minikin.server.concept_store import ConceptStore
from minikin.server.engine import Engine
from minikin.server.errors import RequestRejected, internal, sentence_of
from minikin.server.image_folder import ImageFolder
from minikin.server.job_store import JobStore, StoredImage
from minikin.server.jobs import Job, new_id
from minikin.server.queue import JobQueue

log = logging.getLogger(__name__)


class ResultWriter:
    """Where workers deliver images, errors and finished jobs.

    results    the folder of images
    marking    how images are marked as generated
    filtering  the content filter every image passes before it is given out; None for none
    image_folder  where images are kept for the person who uses this server; None for nowhere
    """

    def __init__(
        self, engine: Engine, queue: JobQueue, store: JobStore, concept_store: ConceptStore, results: Path,
        marking: Marking, filtering: Filtering | None, image_folder: ImageFolder | None = None,
    ) -> None:  # fmt: skip
        self.engine, self.queue, self.store, self.concept_store = engine, queue, store, concept_store
        self.results, self.marking, self.filtering = results, marking, filtering
        self.image_folder = image_folder
        self.stopped = False  # what is not done by now is in the store, for the next start
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="minikin-results")

    @property
    def previews_allowed(self) -> bool:
        """Whether images may be seen before the content filter has checked them."""
        return not (self.filtering and self.filtering.hides)

    def path(self, image_id: str) -> Path:
        return self.results / f"{image_id}.png"

    def close(self) -> None:
        """Wait for what is under way."""
        self._thread.shutdown()

    def start(self, jobs: list[Job]) -> list[Job]:
        """Record that these jobs start; returns those to work on, without the cancelled ones."""
        begins = [(job, job.begin()) for job in jobs]
        alive = [job for job, first in begins if first is not None]
        fresh = [job for job, first in begins if first]
        if fresh and not self.stopped:
            try:
                self.store.start([job.id for job in fresh])
            except MinikinError as e:
                for job in fresh:
                    self.fail(job, e)
                return [job for job in alive if job not in fresh]
        for job in fresh:
            metrics.WAIT.observe(max(0.0, time.time() - job.created))
        return alive

    def save(self, job: Job, number: int, image: Image.Image) -> None:
        """Save an image of a job; the last one of a batched job completes it."""
        self.submit(self._save, job, number, image)

    def finish(self, job: Job, result: events.Done) -> None:
        """Complete a job that ran alone."""
        self.submit(self._finish, job, result)

    def fail(self, job: Job, error: MinikinError) -> None:
        self.queue.remove(job)
        self.submit(self.end, job, "failed", error)

    def drop(self, job: Job) -> None:
        """End a job that was cancelled while it ran."""
        if not self.stopped:
            self.submit(self.end, job, "cancelled")

    # ---- in the writer's thread ----------------------------------------------------------------

    def submit(self, work: Any, *args: Any) -> None:
        """Do `work(job, ...)` after everything submitted before."""
        with suppress(RuntimeError):  # shut down: the store has the job as it was
            self._thread.submit(self._guarded, work, *args)

    def _guarded(self, work: Any, job: Job, *args: Any) -> None:
        try:
            work(job, *args)
        except MinikinError as e:
            self.queue.remove(job)
            self.end(job, "failed", e)
        except Exception:  # whatever it is: without an end, the caller would wait forever
            log.exception("saving results of job %s", job.id)
            self.queue.remove(job)
            self.end(job, "failed", internal(job.id))

    def _save(self, job: Job, number: int, image: Image.Image) -> None:
        if job.over or job.cancelled.is_set() or number in job.files:  # saved before its engine was lost
            return
        seed = job.seeds[number] if number < len(job.seeds) else None
        facts = self.engine.facts(job.prepared)
        xmp.with_source_type(image, image.info.get(xmp.INFO, facts.get(xmp.KEY, xmp.TRAINED)))
        if self.filtering and job.request.kind != "masks":
            (checked,) = self.filtering([GeneratedImage(image, seed or 0)])
            image = checked.image
            if checked.verdict:
                facts = {**facts, "filter": checked.verdict}
                job.record_verdict(number, seed, checked.verdict)
        info, job.infotexts[number] = image_metadata.image_texts(facts, job.prepared.recipe, image, seed)
        data, id_ = self.marking.encode(image, info=info, compress_level=1), new_id()
        self._write(job, self.path(id_), data, seed)
        sha256 = hashlib.sha256(data).hexdigest()
        job.files[number] = StoredImage(id_, number, seed, sha256, len(data), *image.size)
        if job.prepared.group is not None and len(job.files) == len(job.seeds):
            self.end(job, "completed")
        else:
            job.changed()

    def _write(self, job: Job, path: Path, data: bytes, seed: int | None) -> None:
        kind, recipe = job.request.kind, job.prepared.recipe
        if self.image_folder and isinstance(recipe, Paint):
            self.image_folder.write(path, data, recipe, seed or 0, kind, job.inputs.source)
        else:
            files.atomic_write(path, data)

    def _finish(self, job: Job, done: events.Done) -> None:
        if job.request.kind != "teach":
            self.end(job, "completed")
            return
        from minikin.perfusion import concept_file  # needs PyTorch, as teaching did

        data = concept_file.to_bytes(done.result, int8=getattr(job.prepared.recipe, "int8", None))
        entry = self.concept_store.put(job.request.client, data, check_quota=False)
        if entry.earlier:
            job.notes.append(f"The concept that had this name is now <{entry.earlier}>.")
        if entry.name != done.result.name:
            job.notes.append(
                f"The folder this server was started in has another {done.result.name}.safetensors, which "
                f"<{done.result.name}> means; so this one is <{entry.name}>."
            )
        job.result = {
            "concept": {"name": entry.name, "sha256": entry.sha256, "bytes": len(data)},
            "facts": {k: v for k, v in done.facts.items() if isinstance(v, int | float | str | bool)},
        }
        self.end(job, "completed")

    def end(
        self, job: Job, status: str, error: MinikinError | None = None, *, code: str | None = None,
        message: str | None = None,
    ) -> None:  # fmt: skip
        """Record the end of a job in the store, clean up, and wake its watchers; a second call does nothing."""
        if not job.claim():
            return
        images = job.images if status == "completed" else []
        if error is not None:
            code, message = error.code, sentence_of(error)
        # a concept that could not be stored is taught on from its checkpoint after a restart, a few times
        reopen = (
            job.request.kind == "teach" and not job.request.blocking and isinstance(error, StorageError)
            and job.attempts + 1 < self.queue.limits.attempts
        )  # fmt: skip
        try:
            if reopen:
                message = f"{message} The next start of the server goes on with it; DELETE gives it up."
                error = RequestRejected(message, status=507, code=code or "storage")
                self.store.reopen(job.id, code, message)
            else:
                self._record_end(job, status, images, code, message)
        except MinikinError as e:  # it is in the store as unfinished, and runs again after a restart
            log.exception("the end of job %s was not written", job.id)
            status, error, images, reopen = "failed", e, [], True
        except Exception:  # whatever it is: this end cannot be recorded, at no later attempt either
            log.exception("the end of job %s cannot be recorded", job.id)
            status, error, images, reopen = "failed", internal(job.id), [], False
            job.result = None
            with suppress(Exception):
                self._record_end(job, status, images, error.code, str(error))
        try:
            if status != "completed" or not images:
                self.delete_images(job)
            if not reopen:
                delete_inputs(job)
            # hundreds of ended jobs stay in memory: without their pixels
            job.inputs = replace(job.inputs, images={}, photos=())
            self.concept_store.release(pinned.sha256 for pinned in job.prepared.concepts.values())
        except Exception as e:  # the next sweep finds them
            log.warning("concepts of job %s: %s", job.id, e)
        finally:  # whatever it was: without an end, the caller would wait forever
            job.end(status, error)

    def _record_end(
        self, job: Job, status: str, images: list[StoredImage], code: str | None, message: str | None
    ) -> None:
        self.store.end(job.id, status, images=images, code=code, message=message, result=job.result)
        metrics.JOBS.labels(job.request.kind, status).inc()
        metrics.IMAGES.inc(len(images))

    def abandon(self, job: Job) -> None:
        """Cancel a job in the store that failed here and was to be tried again by the next start."""
        row = self.store.job(job.id)
        if row is not None and row["ended"] is None:
            self.store.end(job.id, "cancelled")
            metrics.JOBS.labels(job.request.kind, "cancelled").inc()
            delete_inputs(job)

    def delete_images(self, job: Job) -> None:
        """Remove the images of a job that was not completed."""
        for image in job.images:
            with suppress(OSError, RequestRejected):  # the audit reports what stays
                image_folder.delete(self.path(image.id), image.sha256)


def delete_inputs(job: Job) -> None:
    """Remove the images and photos that came with a job."""
    if job.inputs.folder is not None:
        shutil.rmtree(job.inputs.folder, ignore_errors=True)
