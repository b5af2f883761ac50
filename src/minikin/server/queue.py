"""Queue of images to generate, fair between clients and batched by compatible settings.

Clients take turns image by image (A1, B1, C1, A2, ...), so that one large request does not keep the others
waiting; keys take turns first, then the client names within a key. The image at the front brings along every
waiting image that can share its batch, in the same order, up to a number of images and to what fits into
memory. Nothing waits for a batch to fill up.

The queue's lock is held for moments only: how much fits into memory, which may be a question to another
machine, is asked without it.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from itertools import islice
from typing import NamedTuple

from minikin.server.admission import LOCAL, key_of, most_of_key
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
        self._by_client: OrderedDict[str, deque[QueueItem]] = OrderedDict()  # whose turn within a key is next
        self._keys: OrderedDict[str, None] = OrderedDict()  # which key's turn is next
        self._changed = threading.Condition()
        self.closing = threading.Event()
        self.rate_s = 0.2  # seconds per megapixel-step, a running mean

    def put(self, job: Job, *, forced: bool = False) -> None:
        """Add a job. Raises RequestRejected (429) when the queue is full, unless `forced` (after a restart)."""
        with self._changed:
            if not forced:
                self._check(job.request.client)
            items = self._of_client(job.request.client)
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
                self._of_client(item.job.request.client).appendleft(item)
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
        key, limits = key_of(client), self.limits
        jobs = {name: {item.job.id for item in items} for name, items in self._by_client.items()}
        of_client, of_all = len(jobs.get(client, ())), len(set().union(*jobs.values()))
        of_key = sum(len(ids) for name, ids in jobs.items() if key_of(name) == key)
        if of_client >= limits.waiting_per_client:
            raise self._rejection(f"{of_client} of your requests are waiting already", "client_queue_full")
        if of_key >= max(limits.waiting_per_client, most_of_key(limits.waiting, key)) and key != LOCAL:
            raise self._rejection(f"{of_key} requests of your key are waiting already", "client_queue_full")
        if of_all >= limits.waiting:
            raise self._rejection(f"{of_all} requests are waiting already", "queue_full")

    def _of_client(self, client: str) -> deque[QueueItem]:
        self._keys.setdefault(key_of(client))
        return self._by_client.setdefault(client, deque())

    def _rejection(self, why: str, code: str) -> RequestRejected:
        cost = sum(item.job.prepared.cost for items in self._by_client.values() for item in items)
        seconds = cost * self.rate_s * random.uniform(1, 1.5)
        message = f"{why[0].upper()}{why[1:]}; try again later."
        return RequestRejected(message, status=429, code=code, retry_s=max(1.0, seconds))

    def _any(self) -> bool:
        return any(self._by_client.values())

    def _first(self) -> QueueItem | None:
        """The next item in turn; its key and its client move to the end of their rounds."""
        return next(self._one_of_each_key(lambda item: True), None)

    def _one_of_each_key(self, suits: Callable[[QueueItem], bool]) -> Iterator[QueueItem]:
        """The first item that suits of each key's next client; each key and client moves to its round's end."""
        for key in list(self._keys):
            for client, items in self._by_client.items():
                item = next(filter(suits, items), None) if key_of(client) == key else None
                if item is not None:
                    items.remove(item)
                    self._keys.move_to_end(key)
                    self._by_client.move_to_end(client)
                    yield item
                    break

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
        for key in self._keys.keys() - {key_of(client) for client in self._by_client}:
            del self._keys[key]
        return batch

    def _round(self, group: Hashable, most: int) -> list[QueueItem]:
        """One more image of each key, at most `most`."""
        return list(islice(self._one_of_each_key(lambda i: i.group == group and not i.job.losses), most))
