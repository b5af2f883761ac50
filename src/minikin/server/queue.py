"""The line: who is next, and what can be painted together with it.

Clients take turns image by image (A1, B1, C1, A2, ...), so that one who asks for much does not keep
the others waiting. The image whose turn it is brings along whatever waits and can share its batch, in
the same order, up to a number of images and to what fits into memory. Nothing waits for a batch to
fill up.

The line is held for moments only: how much fits into memory, which may be a question to another machine, is
asked while others come and go.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import NamedTuple

from minikin.server.engine import EngineLost, Prepared
from minikin.server.errors import Refused
from minikin.server.jobs import Job
from minikin.server.limits import Limits


class Piece(NamedTuple):
    """One image of a job; all of it when the job is done alone."""

    job: Job
    number: int

    @property
    def group(self) -> Hashable:
        return self.job.prepared.group

    @property
    def seed(self) -> int:
        return self.job.seeds[self.number]


class Line:
    """Waiting images by client; `take` blocks until there is a batch."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._by_client: OrderedDict[str, deque[Piece]] = OrderedDict()
        self._changed = threading.Condition()
        self.closing = threading.Event()
        self.rate_s = 0.2  # seconds a megapixel-step takes, as measured lately

    def put(self, job: Job, *, forced: bool = False) -> None:
        """Let a job wait. Raises Refused, 429, when too many do; `forced` for those of before a restart."""
        with self._changed:
            if not forced:
                self._check(job.asked.client)
            mine = self._by_client.setdefault(job.asked.client, deque())
            alone = job.prepared.group is None
            mine.extend(Piece(job, k) for k in range(1 if alone else len(job.seeds)))
            self._changed.notify_all()

    def check(self, client: str) -> None:
        """Raise Refused, 429, when another job of this client could not wait: before anything is read."""
        with self._changed:
            self._check(client)

    def full(self, why: str) -> Refused:
        """What a request is told that would be too much for everybody together."""
        with self._changed:
            return self._full(why, "queue_full")

    def take(
        self, timeout_s: float | None = None, room: Callable[[Prepared], int] = lambda prepared: sys.maxsize
    ) -> list[Piece]:
        """The next batch; [] when closed, or when nothing came in time.

        room  how many images like this one fit into memory now. Nobody else waits while it is found out;
              when it raises EngineLost, so does this, and nothing was taken
        """
        with self._changed:
            self._changed.wait_for(lambda: self.closed or self._any(), timeout_s)
            first = None if self.closed else self._first()
        if first is None:
            return []
        try:
            most = self._most(first, room)
        except EngineLost:
            self.give_back([first])
            raise
        with self._changed:
            return self._batch(first, most)

    def give_back(self, pieces: list[Piece]) -> None:
        """Put pieces in front again."""
        with self._changed:
            for piece in reversed(pieces):
                self._by_client.setdefault(piece.job.asked.client, deque()).appendleft(piece)
            self._changed.notify_all()

    def remove(self, job: Job) -> bool:
        """Nothing of this job waits any longer; whether something did."""
        with self._changed:
            client = job.asked.client
            before = len(self._by_client.get(client, ()))
            left = deque(p for p in self._by_client.get(client, ()) if p.job is not job)
            if left:
                self._by_client[client] = left
            else:
                self._by_client.pop(client, None)
            return len(left) < before

    def close(self) -> None:
        with self._changed:
            self.closing.set()
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        return self.closing.is_set()

    def waiting(self, client: str | None = None) -> list[Job]:
        """Jobs none of whose images was begun, the oldest first."""
        with self._changed:
            lines = [self._by_client.get(client, deque())] if client is not None else self._by_client.values()
            jobs = {p.job.id: p.job for line in lines for p in line if p.job.started is None}
        return sorted(jobs.values(), key=lambda job: job.created)

    def position(self, job: Job) -> int:
        """How many jobs are before this one, counted as they came; 0 for none, or when it is begun."""
        if job.started is not None:
            return 0
        return sum(other.created < job.created for other in self.waiting())

    def wait_s(self) -> float:
        """How long everything that waits will take."""
        return sum(job.cost_left for job in self.waiting()) * self.rate_s

    def measured(self, cost: float, seconds: float) -> None:
        """A batch of this cost took so long."""
        if cost > 0:
            self.rate_s += 0.3 * (seconds / cost - self.rate_s)

    def _check(self, client: str) -> None:
        everybody = {p.job.id for line in self._by_client.values() for p in line}
        own = {p.job.id for p in self._by_client.get(client, ())}
        if len(own) >= self.limits.waiting_per_client:
            raise self._full(f"{len(own)} of your requests are waiting already", "client_queue_full")
        if len(everybody) >= self.limits.waiting:
            raise self._full(f"{len(everybody)} requests are waiting already", "queue_full")

    def _full(self, why: str, code: str) -> Refused:
        import random

        pieces = [p for line in self._by_client.values() for p in line]
        seconds = sum(p.job.prepared.cost for p in pieces) * self.rate_s * random.uniform(1, 1.5)
        return Refused(
            f"{why[0].upper()}{why[1:]}; try again later.", status=429, code=code, retry_s=max(1.0, seconds)
        )

    def _any(self) -> bool:
        return any(self._by_client.values())

    def _first(self) -> Piece | None:
        """Whose turn it is."""
        client = next((c for c, line in self._by_client.items() if line), None)
        if client is None:
            return None
        self._by_client.move_to_end(client)  # who was served goes to the end
        return self._by_client[client].popleft()

    def _most(self, first: Piece, fits: Callable[[Prepared], int]) -> int:
        """How many images this one's batch may have. Asked for every batch: no answer is one, too."""
        try:
            room = fits(first.job.prepared)
        except EngineLost:
            raise
        except Exception:  # of a device that is not well: painting will say what is wrong, and to whom
            return 1
        alone = first.group is None or first.job.losses
        return 1 if alone else min(self.limits.batch, room)

    def _batch(self, first: Piece, room: int) -> list[Piece]:
        """The first, and what waits and may share its batch."""
        batch = [first]
        while len(batch) < room:
            more = self._round(first.group, room - len(batch))
            if not more:
                break
            batch += more
        for empty in [c for c, line in self._by_client.items() if not line]:
            del self._by_client[empty]
        return batch

    def _round(self, group: Hashable, room: int) -> list[Piece]:
        """One more image of each client, at most `room`."""
        found: list[Piece] = []
        for line in self._by_client.values():
            piece = next((p for p in line if p.group == group and not p.job.losses), None)
            if piece is not None and len(found) < room:
                line.remove(piece)
                found.append(piece)
        return found
