"""A job while it lives: what it is, how far it is, who watches.

States: queued -> running -> completed, failed or cancelled. A job ends once; whoever comes second to end
it is told so and does nothing.
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
from minikin.server.engine import Given, Prepared, Preview
from minikin.server.job_store import Stored


def new_id() -> str:
    """128 random bits: nobody guesses another's."""
    return secrets.token_hex(16)


def verdict_of(result: dict[str, Any] | None, number: int) -> dict[str, Any] | None:
    """A job keeps what the content filter found in its result, by the image's number."""
    found: dict[str, Any] | None = (result or {}).get("filter", {}).get(str(number))
    return found


@dataclass(frozen=True)
class Asked:
    """Who asked for what, and how.

    client   whose job it is; nobody else sees it
    dialect  native, openai or a1111
    task     a name the client gave it (A1111's force_task_id)
    held     whether the caller waits for the answer: after a restart nobody would fetch it
    """

    kind: str
    client: str
    dialect: str = "native"
    task: str = ""
    held: bool = False


@dataclass(eq=False)
class Job:
    """One job. The worker's thread writes its progress; `watch` wakes the event loop."""

    asked: Asked
    prepared: Prepared
    seeds: list[int]
    given: Given = field(default_factory=Given)
    id: str = field(default_factory=new_id)
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    status: str = "queued"
    done: int = 0  # steps of all its images
    stage: str = ""
    total: int = 0
    attempts: int = 0
    losses: int = 0  # times that engines were lost while they had it in hand; then it shares no batch any more
    lost_at: float = -math.inf  # the last time, by time.monotonic
    error: MinikinError | None = None
    result: dict[str, Any] | None = None
    files: dict[int, Stored] = field(default_factory=dict)
    infotexts: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    version: int = 0
    may_show: bool = True  # whether it may be seen while it is painted

    def __post_init__(self) -> None:
        self.cancelled = threading.Event()
        self.finished = threading.Event()
        self._preview: Preview | None = None
        self._row = 0
        self._watchers: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._lock = threading.Lock()
        self._claimed = False  # somebody ends it, and nobody is told before the store has it
        self.total = self.total or len(self.seeds) * self.prepared.steps

    @property
    def pictures(self) -> list[Stored]:
        """What is finished, in the order of the seeds."""
        return [self.files[k] for k in sorted(self.files)]

    def verdict(self, number: int) -> dict[str, Any] | None:
        """What the content filter found of an image; None for nothing."""
        return verdict_of(self.result, number)

    @property
    def over(self) -> bool:
        return self.finished.is_set()

    @property
    def cost_left(self) -> float:
        share = 1 - self.done / self.total if self.total else 1.0
        return self.prepared.cost * max(1, len(self.seeds)) * max(0.0, share)

    # ---- the worker's side -------------------------------------------------------------------

    def begin(self) -> bool | None:
        """From queued to running: True when this call did it, False when another had; None when it is over."""
        with self._lock:
            if self._claimed or self.cancelled.is_set():
                return None
            first = self.started is None
            if first:
                self.status, self.started = "running", time.time()
        self.changed()
        return first

    def lose(self, begun: float) -> int:
        """An engine was lost that had some of it in hand since `begun` (time.monotonic); all losses so far.

        Engines that were lost together, each with another of its images, count once: what had begun before
        the last loss was not yet another attempt.
        """
        with self._lock:
            if begun > self.lost_at:
                self.losses, self.lost_at = self.losses + 1, time.monotonic()
            return self.losses

    def judged(self, number: int, seed: int | None, verdict: dict[str, Any]) -> None:
        """The content filter found something in an image: for programs, and in words."""
        found = (self.result or {}).get("filter", {})
        self.result = {**(self.result or {}), "filter": {**found, str(number): verdict}}
        self.notes.append(f"The image of seed {seed} was {verdict['action']} by the content filter.")

    def step(self, done: int, preview: Preview | None = None, row: int = 0, stage: str = "") -> None:
        """So many steps of its stage are done; never fewer than were told before."""
        another = bool(stage) and stage != self.stage
        self.done = done if another else max(self.done, done)
        self._preview, self._row, self.stage = preview, row, stage or self.stage
        self.changed()

    def claim(self) -> bool:
        """Take the right to end this job; False when somebody else has taken it."""
        with self._lock:
            mine, self._claimed = not self._claimed, True
            return mine

    def end(self, status: str, error: MinikinError | None) -> None:
        """After the store knows: tell the end, and wake everybody who waits."""
        with self._lock:
            self.error, self.ended = error, time.time()
            self.status = status  # last: who reads it meanwhile finds the reason, too
        self._preview = None
        self.finished.set()
        self.changed()

    @property
    def shown(self) -> Preview | None:
        """What shows it now: stays until something else does."""
        return self._preview

    # ---- the watchers' side ------------------------------------------------------------------

    def preview(self) -> Any:
        """The image as it is now; None when there is none to show, or none may be shown."""
        if not self.may_show:
            return None
        show, row = self._preview, self._row
        try:
            return show(row) if show else None
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
    """Hears of a job's changes on the event loop: `async with job.watch() as w: await w.next(5)`."""

    def __init__(self, job: Job) -> None:
        self.job = job

    async def __aenter__(self) -> Watch:
        self._mine = (asyncio.get_running_loop(), asyncio.Event())
        self.job._watchers.add(self._mine)
        return self

    async def __aexit__(self, *_: Any) -> None:
        self.job._watchers.discard(self._mine)

    async def next(self, timeout_s: float) -> bool:
        """Wait for a change; False when there was none in time. A job that is over is always a change."""
        if self.job.over:
            return True
        event = self._mine[1]
        try:
            await asyncio.wait_for(event.wait(), timeout_s)
        except TimeoutError:
            return False
        event.clear()
        return True
