"""A job in memory: its request, its progress, and those who watch it.

States: queued -> running -> completed, failed or cancelled. A job ends once: the second attempt to end it
does nothing.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from minikin.errors import MinikinError
from minikin.events import Pace
from minikin.server.engine import JobInputs, PreparedRequest, Preview
from minikin.server.job_store import StoredImage


def new_id() -> str:
    """128 random bits: nobody guesses another's."""
    return secrets.token_hex(16)


def stored_verdict(result: dict[str, Any] | None, number: int) -> dict[str, Any] | None:
    """The content filter's verdict on an image, which a job's result holds by the image's number."""
    verdict: dict[str, Any] | None = (result or {}).get("filter", {}).get(str(number))
    return verdict


@dataclass(frozen=True)
class JobRequest:
    """Which client sent which type of job through which API.

    kind      a name in `job_types.JOB_TYPES`
    client    the owner; no other client sees the job
    dialect   native, openai or a1111
    task      a name the client gave it (A1111's force_task_id)
    blocking  whether the HTTP request waits for the result: after a restart nobody would fetch it
    """

    kind: str
    client: str
    dialect: str = "native"
    task: str = ""
    blocking: bool = False


@dataclass(eq=False)
class Job:
    """One job. The worker's thread writes its progress; watchers on the event loop are woken."""

    request: JobRequest
    prepared: PreparedRequest
    seeds: list[int]
    inputs: JobInputs = field(default_factory=JobInputs)
    id: str = field(default_factory=new_id)
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    status: str = "queued"
    done: int = 0  # steps of all its images
    stage: str = ""
    total: int = 0
    attempts: int = 0  # how often earlier runs of the server started it
    losses: int = 0  # engines lost while they worked on it; after the first it shares no batch
    lost_at: float = -math.inf  # time.monotonic of the last loss
    error: MinikinError | None = None
    result: dict[str, Any] | None = None
    files: dict[int, StoredImage] = field(default_factory=dict)
    infotexts: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)  # of teaching: step and subject fidelity
    version: int = 0
    previews_allowed: bool = True  # before the content filter has seen the image

    def __post_init__(self) -> None:
        self.cancelled = threading.Event()
        self.finished = threading.Event()
        self._preview: Preview | None = None
        self._row = 0
        self._watchers: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._lock = threading.Lock()
        self.pace = Pace()
        self._claimed = False  # a thread is ending it; watchers hear of that when the store has it
        self.total = self.total or len(self.seeds) * self.prepared.steps

    @property
    def images(self) -> list[StoredImage]:
        """The finished images, in the order of the seeds."""
        return [self.files[k] for k in sorted(self.files)]

    def verdict(self, number: int) -> dict[str, Any] | None:
        """The content filter's verdict on an image; None where it had no objection."""
        return stored_verdict(self.result, number)

    @property
    def over(self) -> bool:
        return self.finished.is_set()

    @property
    def cost_left(self) -> float:
        share = 1 - self.done / self.total if self.total else 1.0
        return self.prepared.cost * max(1, len(self.seeds)) * max(0.0, share)

    # ---- the worker's side -------------------------------------------------------------------

    def begin(self) -> bool | None:
        """Start the job: True when this call did, False when it runs already; None when it is over."""
        with self._lock:
            if self._claimed or self.cancelled.is_set():
                return None
            first = self.started is None
            if first:
                self.status, self.started, self.pace = "running", time.time(), Pace()
        self.changed()
        return first

    def count_loss(self, start: float) -> int:
        """Count an engine lost that worked on this job since `start` (time.monotonic); returns all losses.

        Engines lost together, each with another image of the job, count once: work that started before the
        last loss was no further attempt.
        """
        with self._lock:
            if start > self.lost_at:
                self.losses, self.lost_at = self.losses + 1, time.monotonic()
            return self.losses

    def record_verdict(self, number: int, seed: int | None, verdict: dict[str, Any]) -> None:
        """Put the content filter's verdict on an image into the result and, as a sentence, into the notes."""
        verdicts = (self.result or {}).get("filter", {})
        self.result = {**(self.result or {}), "filter": {**verdicts, str(number): verdict}}
        self.notes.append(f"The image of seed {seed} was {verdict['action']} by the content filter.")

    def step(self, done: int, preview: Preview | None = None, row: int = 0, stage: str = "") -> None:
        """Report the steps done in this stage; the number never goes back within a stage."""
        new_stage = bool(stage) and stage != self.stage
        self.done = done if new_stage else max(self.done, done)
        self.pace.update(stage or self.stage, self.done, self.total)
        self._preview, self._row, self.stage = preview, row, stage or self.stage
        self.changed()

    def claim(self) -> bool:
        """Take the right to end this job; False when another thread has taken it."""
        with self._lock:
            first, self._claimed = not self._claimed, True
            return first

    def end(self, status: str, error: MinikinError | None) -> None:
        """Publish the end, which the store has by now, and wake all watchers."""
        with self._lock:
            self.error, self.ended = error, time.time()
            self.status = status  # last: a reader that sees it sees the error, too
        self._preview = None
        self.finished.set()
        self.changed()

    @property
    def current_preview(self) -> Preview | None:
        """The latest preview; stays until there is another."""
        return self._preview

    # ---- the watchers' side ------------------------------------------------------------------

    def preview(self) -> Any:
        """The current state of the image; None when there is none, or none may be shown."""
        if not self.previews_allowed:
            return None
        preview, row = self._preview, self._row
        try:
            return preview(row) if preview else None
        except (RuntimeError, IndexError):  # the batch went on meanwhile
            return None

    def changed(self) -> None:
        self.version += 1
        for loop, event in tuple(self._watchers):
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # that loop is closed
                self._watchers.discard((loop, event))

    def watch(self) -> Watch:
        return Watch(self)


class Watch:
    """Waits for a job's changes on the event loop: `async with job.watch() as w: await w.next(5)`."""

    def __init__(self, job: Job) -> None:
        self.job = job

    async def __aenter__(self) -> Watch:
        self._entry = (asyncio.get_running_loop(), asyncio.Event())
        self.job._watchers.add(self._entry)
        return self

    async def __aexit__(self, *_: Any) -> None:
        self.job._watchers.discard(self._entry)

    async def next(self, timeout_s: float) -> bool:
        """Wait for a change; False when there was none in time. A job that is over is always a change."""
        if self.job.over:
            return True
        event = self._entry[1]
        try:
            await asyncio.wait_for(event.wait(), timeout_s)
        except TimeoutError:
            return False
        event.clear()
        return True
