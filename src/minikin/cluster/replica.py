"""The Ray actor of a replica: an engine, called by the gateway from another process.

Several calls run at once in threads of one process: a batch, questions for its progress, admissions. Every
call carries everything it needs, so that any other replica can answer it, too.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from PIL import Image

from minikin import events
from minikin.perfusion.concept import Concept
from minikin.recipes import Recipe
from minikin.server.engine import Concepts, Engine, JobInputs, PinnedConcept, PreparedRequest, Preview, Row

MAX_CACHED = 512  # concepts, and as many prepared requests, in memory
THREADS = 16  # calls at once; the engine generates one batch at a time

SentConcepts = Mapping[str, tuple[str, Any]]  # concepts by name: SHA-256, and Ray's reference to the content


class RemoteRequest(NamedTuple):
    """A request as it is sent to a replica: plain data, checked by the gateway."""

    kind: str
    recipe: Recipe
    concepts: SentConcepts

    @property
    def key(self) -> tuple[str, str, tuple[tuple[str, str], ...]]:
        contents = tuple((name, sha) for name, (sha, _) in self.concepts.items())
        return self.kind, self.recipe.model_dump_json(), contents


@dataclass
class RunningTask:
    """A batch or job that runs, or was cancelled before it started."""

    cancelled: threading.Event
    stop: threading.Event
    done: int = 0
    preview: Preview | None = None


class Replica:
    """The actor behind an `engine.RemoteEngine`."""

    def __init__(self, open_engine: Callable[[], Engine]) -> None:
        self.engine = open_engine()
        self._tasks: dict[str, RunningTask] = {}
        self._concepts: OrderedDict[str, Concept] = OrderedDict()
        self._prepared: OrderedDict[Any, PreparedRequest] = OrderedDict()
        self._lock = threading.Lock()

    def ping(self) -> dict[str, Any]:
        return {"name": self.engine.name, "side": self.engine.side, "pid": os.getpid()}

    def describe(self) -> dict[str, Any]:
        return self.engine.describe()

    def warm_up(self) -> None:
        self.engine.warm_up()

    def max_batch(self, prepared: PreparedRequest) -> int:
        return self.engine.max_batch(prepared)

    # ---- admission ---------------------------------------------------------------------------

    def prepare(self, request: RemoteRequest, inputs: JobInputs | None) -> PreparedRequest:
        """As the engine's; `plan` is the record for the images' metadata, and concepts are not sent back."""
        prepared = self._ready(request, inputs)
        return replace(prepared, concepts={}, plan=self.engine.facts(prepared))

    def _ready(self, request: RemoteRequest, inputs: JobInputs | None = None) -> PreparedRequest:
        key = request.key
        with self._lock:
            prepared = self._prepared.get(key)
        if prepared is None or inputs is not None:
            prepared = self.engine.prepare(request.kind, request.recipe, self._pinned(request.concepts), inputs)
            with self._lock:
                _keep(self._prepared, key, prepared)
        return prepared

    def _pinned(self, sent: SentConcepts) -> Concepts:
        pinned = {}
        for name, (sha, ref) in sent.items():
            with self._lock:
                concept = self._concepts.get(sha)
            if concept is None:
                import ray

                concept = ray.get(ref)
                with self._lock:
                    _keep(self._concepts, sha, concept)
            pinned[name] = PinnedConcept(sha, concept if concept.name == name else concept.renamed(name))
        return pinned

    # ---- work --------------------------------------------------------------------------------

    def paint(self, task_id: str, rows: Sequence[tuple[RemoteRequest, int]]) -> list[Image.Image] | None:
        """One image per row; None when it was cancelled."""
        task = self._task(task_id)

        def step(done: int, preview: Preview) -> None:
            task.done, task.preview = done, preview
            if task.cancelled.is_set():
                raise events.Cancelled

        try:
            return self.engine.paint([Row(self._ready(request), seed) for request, seed in rows], step)
        except events.Cancelled:
            return None
        finally:
            self._tasks.pop(task_id, None)

    def run(self, task_id: str, request: RemoteRequest, inputs: JobInputs) -> Iterator[events.Event]:
        """Events of a job that runs alone."""
        task = self._task(task_id)
        inputs_with_stop = replace(inputs, stop=task.stop)
        work = self.engine.run(request.kind, self._ready(request, inputs_with_stop), inputs_with_stop)
        try:
            for event in work:
                if task.cancelled.is_set():
                    return
                if isinstance(event, events.Progress):  # the gateway calls `preview` for it
                    task.preview = _preview_of(event)
                    event = replace(event, preview=None)
                yield event
        finally:
            close: Any = getattr(work, "close", None)
            if close:
                close()
            self._tasks.pop(task_id, None)

    def steps_done(self, task_id: str) -> int:
        """Steps done so far."""
        task = self._tasks.get(task_id)
        return task.done if task else 0

    def preview(self, task_id: str, row: int) -> Image.Image | None:
        task = self._tasks.get(task_id)
        return task.preview(row) if task and task.preview else None

    def cancel(self, task_id: str) -> None:
        self._task(task_id).cancelled.set()

    def stop(self, task_id: str) -> None:
        self._task(task_id).stop.set()

    def _task(self, task_id: str) -> RunningTask:
        """The task with this id; a cancellation that arrives before the work creates it."""
        return self._tasks.setdefault(task_id, RunningTask(threading.Event(), threading.Event()))


def _preview_of(event: events.Progress) -> Preview | None:
    preview = event.preview
    return (lambda row: preview()) if preview else None


def _keep(cache: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    cache[key] = value
    cache.move_to_end(key)
    while len(cache) > MAX_CACHED:
        cache.popitem(last=False)
