"""What becomes of jobs: images looked at, marked and kept, ends written; see `worker.Desk`.

Everything that takes the disk is done by one thread, one thing after the other, so that workers go on painting
and a job's end comes after its images.
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
from minikin.images import xmp
from minikin.images.encode import Marking
from minikin.server import image_metadata, metrics
from minikin.server.concept_store import Shelf
from minikin.server.engine import Engine
from minikin.server.errors import Refused, sentence_of
from minikin.server.job_store import Store, Stored
from minikin.server.jobs import Job, new_id
from minikin.server.queue import Line

log = logging.getLogger(__name__)


class Finishing:
    """The workers' desk.

    results    the folder of images
    marking    how they are marked
    filtering  what looks at every image before it is given out; None for nobody
    """

    def __init__(
        self, engine: Engine, line: Line, store: Store, shelf: Shelf, results: Path, marking: Marking,
        filtering: Filtering | None,
    ) -> None:  # fmt: skip
        self.engine, self.line, self.store, self.shelf = engine, line, store, shelf
        self.results, self.marking, self.filtering = results, marking, filtering
        self.stopped = False  # what is not done by now is in the store, for the next start
        self._one = ThreadPoolExecutor(1, thread_name_prefix="minikin-finish")

    @property
    def may_show(self) -> bool:
        """Whether images may be seen before the filter has looked at them."""
        return not (self.filtering and self.filtering.hides)

    def file(self, picture: str) -> Path:
        return self.results / f"{picture}.png"

    def close(self) -> None:
        """Wait for what is under way."""
        self._one.shutdown()

    def begun(self, jobs: list[Job]) -> list[Job]:
        found = [(job, job.begin()) for job in jobs]
        wanted = [job for job, first in found if first is not None]
        begun = [job for job, first in found if first]
        if begun and not self.stopped:
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
        self.later(self._keep, job, number, image)

    def done(self, job: Job, result: events.Done) -> None:
        self.later(self._done, job, result)

    def failed(self, job: Job, error: MinikinError) -> None:
        self.line.remove(job)
        self.later(self.end, job, "failed", error)

    def dropped(self, job: Job) -> None:
        if not self.stopped:
            self.later(self.end, job, "cancelled")

    # ---- one thing after the other -----------------------------------------------------------

    def later(self, work: Any, *args: Any) -> None:
        with suppress(RuntimeError):  # shut down: the store has the job as it was
            self._one.submit(self._guarded, work, *args)

    def _guarded(self, work: Any, job: Job, *args: Any) -> None:
        try:
            work(job, *args)
        except MinikinError as e:
            self.line.remove(job)
            self.end(job, "failed", e)
        except Exception:  # whatever it is: without an end, its caller would wait forever
            log.exception("finishing job %s", job.id)
            self.line.remove(job)
            self.end(
                job,
                "failed",
                Refused(f"Internal error. Reference {job.id}.", status=500, code="internal_error"),
            )

    def _keep(self, job: Job, number: int, image: Image.Image) -> None:
        if job.over or job.cancelled.is_set() or number in job.files:  # or made by an engine that was lost then
            return
        seed = job.seeds[number] if number < len(job.seeds) else None
        facts = self.engine.facts(job.prepared)
        xmp.made(image, image.info.get(xmp.INFO, facts.get(xmp.KEY, xmp.TRAINED)))
        if self.filtering and job.asked.kind != "masks":
            from minikin.generation.sampler import Painted  # needs PyTorch, as every filter does

            (one,) = self.filtering([Painted(image, seed or 0)])
            image = one.image
            if one.verdict:
                facts = {**facts, "filter": one.verdict}
                job.judged(number, seed, one.verdict)
        info, job.infotexts[number] = image_metadata.inside(facts, job.prepared.recipe, image, seed)
        data, id_ = self.marking.encode(image, info=info, compress_level=1), new_id()
        files.atomic_write(self.file(id_), data)
        sha = hashlib.sha256(data).hexdigest()
        job.files[number] = Stored(id_, number, seed, sha, len(data), *image.size)
        if job.prepared.group is not None and len(job.files) == len(job.seeds):
            self.end(job, "completed")
        else:
            job.changed()

    def _done(self, job: Job, done: events.Done) -> None:
        if job.asked.kind != "teach":
            self.end(job, "completed")
            return
        from minikin.perfusion import concept_file  # needs PyTorch, as teaching did

        data = concept_file.to_bytes(done.result, int8=getattr(job.prepared.recipe, "int8", None))
        entry = self.shelf.put(job.asked.client, data, taught=True)
        job.result = {
            "concept": {"name": entry.name, "sha256": entry.sha256, "bytes": len(data)},
            "facts": {k: v for k, v in done.facts.items() if isinstance(v, int | float | str | bool)},
        }
        self.end(job, "completed")

    def end(
        self, job: Job, status: str, error: MinikinError | None = None, *, code: str | None = None,
        message: str | None = None,
    ) -> None:  # fmt: skip
        if not job.claim():
            return
        pictures = job.pictures if status == "completed" else []
        if error is not None:
            code, message = error.code, sentence_of(error)
        # what was taught and could not be stored goes on from its checkpoint after a restart
        again = job.asked.kind == "teach" and not job.asked.held and isinstance(error, StorageError)
        try:
            if again:
                message = f"{message} The next start of the server goes on with it; DELETE gives it up."
                error = Refused(message, status=507, code=code or "storage")
                self.store.reopen(job.id, code, message)
            else:
                self.store.end(job.id, status, pictures=pictures, code=code, message=message, result=job.result)
                metrics.JOBS.labels(job.asked.kind, status).inc()
                metrics.PICTURES.inc(len(pictures))
        except MinikinError as e:  # it is in the store as unfinished, and runs again after a restart
            log.exception("the end of job %s was not written", job.id)
            status, error, pictures, again = "failed", e, [], True
        try:
            if status != "completed" or not pictures:
                self.forget_pictures(job)
            if not again:
                forget_inputs(job)
            # its pixels: hundreds of ended jobs are remembered
            job.given = replace(job.given, pictures={}, many={})
            self.shelf.release(one.sha256 for one in job.prepared.concepts.values())
        except MinikinError as e:  # the next sweep finds them
            log.warning("concepts of job %s: %s", job.id, e)
        finally:  # whatever it was: without an end, its caller would wait forever
            job.end(status, error)

    def give_up(self, job: Job) -> None:
        """End a job in the store that is over here and was left open there."""
        row = self.store.job(job.id)
        if row is not None and row["ended"] is None:
            self.store.end(job.id, "cancelled")
            metrics.JOBS.labels(job.asked.kind, "cancelled").inc()
            forget_inputs(job)

    def forget_pictures(self, job: Job) -> None:
        """Remove what was painted for a job that has not ended well."""
        for one in job.pictures:
            with suppress(OSError):  # the ledger tells of what stays
                self.file(one.id).unlink(missing_ok=True)


def forget_inputs(job: Job) -> None:
    """Remove what the caller sent with a job."""
    if job.given.folder is not None:
        shutil.rmtree(job.given.folder, ignore_errors=True)
