"""Queue of images to generate, fair between clients and batched by compatible settings.

Clients take turns image by image (A1, B1, C1, A2, ...), so that one large request does not keep the others
waiting. The image at the front brings along every waiting image that can share its batch, in the same order,
up to a number of images and to what fits into memory. Nothing waits for a batch to fill up.

The queue's lock is held for moments only: how much fits into memory, which may be a question to another
machine, is asked without it.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import NamedTuple

from minikin.server.engine import EngineLost, PreparedRequest
from minikin.server.errors import RequestRejected
from minikin.server.jobs import Job
from minikin.server.limits import Limits


class QueueItem(NamedTuple):
    """One image of a job, or the whole job when it runs alone."""

    job: Job
    number: int

    @property
    def group(self) -> Hashable:
        return self.job.prepared.group

    @property
    def seed(self) -> int:
        return self.job.seeds[self.number]


class JobQueue:
    """Waiting images by client; `take` blocks until there is a batch."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._by_client: OrderedDict[str, deque[QueueItem]] = OrderedDict()
        self._changed = threading.Condition()
        self.closing = threading.Event()
        self.rate_s = 0.2  # seconds per megapixel-step, a running mean

    def put(self, job: Job, *, forced: bool = False) -> None:
        """Add a job. Raises RequestRejected (429) when the queue is full, unless `forced` (after a restart)."""
        with self._changed:
            if not forced:
                self._check(job.request.client)
            items = self._by_client.setdefault(job.request.client, deque())
            alone = job.prepared.group is None
            items.extend(QueueItem(job, k) for k in range(1 if alone else len(job.seeds)))
            self._changed.notify_all()

    def check(self, client: str) -> None:
        """Raise RequestRejected (429) when another job of this client would not be accepted."""
        with self._changed:
            self._check(client)

    def rejection(self, why: str) -> RequestRejected:
        """The error (429) for a request that would be too much for all clients together."""
        with self._changed:
            return self._rejection(why, "queue_full")

    def take(
        self, timeout_s: float | None = None,
        max_batch: Callable[[PreparedRequest], int] = lambda prepared: sys.maxsize,
    ) -> list[QueueItem]:  # fmt: skip
        """The next batch; [] when the queue is closed, or when nothing came in time.

        max_batch  how many images like this one fit into memory now; called without the lock. When it raises
                   EngineLost, so does this method, and nothing was taken
        """
        with self._changed:
            self._changed.wait_for(lambda: self.closed or self._any(), timeout_s)
            first = None if self.closed else self._first()
        if first is None:
            return []
        try:
            size = self._batch_limit(first, max_batch)
        except EngineLost:
            self.give_back([first])
            raise
        with self._changed:
            return self._batch(first, size)

    def give_back(self, items: list[QueueItem]) -> None:
        """Put items at the front again."""
        with self._changed:
            for item in reversed(items):
                self._by_client.setdefault(item.job.request.client, deque()).appendleft(item)
            self._changed.notify_all()

    def remove(self, job: Job) -> bool:
        """Remove a job's waiting items; returns whether there were any."""
        with self._changed:
            client = job.request.client
            items = self._by_client.get(client, deque())
            remaining = deque(item for item in items if item.job is not job)
            if remaining:
                self._by_client[client] = remaining
            else:
                self._by_client.pop(client, None)
            return len(remaining) < len(items)

    def close(self) -> None:
        with self._changed:
            self.closing.set()
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        return self.closing.is_set()

    def waiting(self, client: str | None = None) -> list[Job]:
        """Jobs of which no image has started, oldest first; of one client or of all."""
        with self._changed:
            queues = [self._by_client.get(client, deque())] if client is not None else self._by_client.values()
            jobs = {item.job.id: item.job for items in queues for item in items if item.job.started is None}
        return sorted(jobs.values(), key=lambda job: job.created)

    def position(self, job: Job) -> int:
        """How many older jobs are waiting; 0 for none, or when this one has started."""
        if job.started is not None:
            return 0
        return sum(other.created < job.created for other in self.waiting())

    def wait_s(self) -> float:
        """Estimated seconds until everything that waits is done."""
        return sum(job.cost_left for job in self.waiting()) * self.rate_s

    def record_speed(self, cost: float, seconds: float) -> None:
        """Update `rate_s` from a batch of this cost (megapixel-steps) that took so long."""
        if cost > 0:
            self.rate_s += 0.3 * (seconds / cost - self.rate_s)

    def _check(self, client: str) -> None:
        all_jobs = {item.job.id for items in self._by_client.values() for item in items}
        client_jobs = {item.job.id for item in self._by_client.get(client, ())}
        if len(client_jobs) >= self.limits.waiting_per_client:
            raise self._rejection(
                f"{len(client_jobs)} of your requests are waiting already", "client_queue_full"
            )
        if len(all_jobs) >= self.limits.waiting:
            raise self._rejection(f"{len(all_jobs)} requests are waiting already", "queue_full")

    def _rejection(self, why: str, code: str) -> RequestRejected:
        cost = sum(item.job.prepared.cost for items in self._by_client.values() for item in items)
        seconds = cost * self.rate_s * random.uniform(1, 1.5)
        message = f"{why[0].upper()}{why[1:]}; try again later."
        return RequestRejected(message, status=429, code=code, retry_s=max(1.0, seconds))

    def _any(self) -> bool:
        return any(self._by_client.values())

    def _first(self) -> QueueItem | None:
        """The next item in turn; its client moves to the end of the round."""
        client = next((name for name, items in self._by_client.items() if items), None)
        if client is None:
            return None
        self._by_client.move_to_end(client)
        return self._by_client[client].popleft()

    def _batch_limit(self, first: QueueItem, max_batch: Callable[[PreparedRequest], int]) -> int:
        """How many images the first item's batch may have."""
        try:
            fits = max_batch(first.job.prepared)
        except EngineLost:
            raise
        except Exception:  # of a device in trouble: generating will say what is wrong, and for which job
            return 1
        alone = first.group is None or first.job.losses
        return 1 if alone else min(self.limits.batch, fits)

    def _batch(self, first: QueueItem, size: int) -> list[QueueItem]:
        """The first item and the waiting items that may share its batch."""
        batch = [first]
        while len(batch) < size:
            more = self._round(first.group, size - len(batch))
            if not more:
                break
            batch += more
        for client in [name for name, items in self._by_client.items() if not items]:
            del self._by_client[client]
        return batch

    def _round(self, group: Hashable, most: int) -> list[QueueItem]:
        """One more image of each client, at most `most`."""
        taken: list[QueueItem] = []
        for items in self._by_client.values():
            item = next((i for i in items if i.group == group and not i.job.losses), None)
            if item is not None and len(taken) < most:
                items.remove(item)
                taken.append(item)
        return taken
