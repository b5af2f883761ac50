"""Shares of what a server can hold: by key first, by client name within the key.

A client is `KEY NAME` (see `middleware`), with a hash for the key and a name that the sender chooses. Names are
free, so what one key may hold is limited for all of its names together: whoever has another key finds a place.
Without keys, everybody on this machine is `local`, and only the names separate people.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from minikin.server.errors import RequestRejected

LOCAL = "local"  # in place of a key's hash on a server without keys


def key_of(client: str) -> str:
    """The part of a client that its sender cannot choose."""
    return client.partition(" ")[0]


def most_of_key(total: int, key: str) -> int:
    """How many of `total` places one key may have: half of them, and all of them on a server without keys."""
    return total if key == LOCAL else max(1, total // 2)


class Places:
    """What is open now, streams or sessions; an entry counts from its admission until it is released.

    total  for all; one key gets at most half of it, one name three quarters of what its key gets
    what   in the plural, for the error: "event streams"
    """

    def __init__(self, total: int, what: str, code: str) -> None:
        self.total, self.what, self.code = total, what, code
        self._open: Counter[str] = Counter()  # by client

    def enter(self, client: str) -> Callable[[], None]:
        """Take a place; returns what gives it back, once. Raises RequestRejected (429)."""
        key = key_of(client)
        of_key = most_of_key(self.total, key)
        of_client = max(1, 3 * of_key // 4)
        by_key = sum(n for name, n in self._open.items() if key_of(name) == key)
        if self._open.total() >= self.total or by_key >= of_key or self._open[client] >= of_client:
            raise RequestRejected(
                f"Too many {self.what} are open: {self.total} in all, {of_key} of one key, {of_client} of one "
                "client. Close one, or try again later.",
                status=429, code=self.code, retry_s=5,
            )  # fmt: skip
        self._open[client] += 1
        entered = [client]

        def leave() -> None:
            if entered:
                self._open[entered.pop()] -= 1
                self._open += Counter()  # forgets who has none left

        return leave

    @contextmanager
    def place(self, client: str) -> Iterator[None]:
        """A place for as long as the block runs. Raises RequestRejected (429)."""
        leave = self.enter(client)
        try:
            yield
        finally:
            leave()

    def __len__(self) -> int:
        return self._open.total()


@dataclass(eq=False)
class _Waiter:
    """A client that waits for its turn on an event loop."""

    client: str
    loop: asyncio.AbstractEventLoop
    granted: asyncio.Event


class Turns:
    """A few pieces of work at once; who waits is served by how little its key, then its client, has at work.

    at_once  pieces of work; the last free place is for a key (without keys: a client) that has none at work, so
             that one of them with slow work never keeps the others waiting
    wait_s   longest wait
    """

    def __init__(self, at_once: int, wait_s: float) -> None:
        self.at_once, self.wait_s = at_once, wait_s
        self._lock = threading.Lock()
        self._at_work: list[str] = []
        self._waiting: list[_Waiter] = []

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """A turn for as long as the block runs. Raises RequestRejected (503) when none came in time."""
        waiter = _Waiter(client, asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._waiting.append(waiter)
            self._grant()
        try:
            try:
                await asyncio.wait_for(waiter.granted.wait(), self.wait_s)
            except TimeoutError:
                message = "The server cannot decode images at the moment; try again."
                raise RequestRejected(message, status=503, code="busy", retry_s=5) from None
            yield
        finally:
            with self._lock:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
                else:
                    self._at_work.remove(client)
                self._grant()

    def _grant(self) -> None:
        """Give the free places to those whose turn it is; called with the lock."""
        while waiters := [w for w in self._waiting if self._may_start(w.client)]:
            waiter = min(waiters, key=lambda w: (self._share(key_of(w.client)), self._at_work.count(w.client)))
            self._waiting.remove(waiter)
            self._at_work.append(waiter.client)
            waiter.loop.call_soon_threadsafe(waiter.granted.set)

    def _may_start(self, client: str) -> bool:
        free = self.at_once - len(self._at_work)
        key = key_of(client)
        at_work = self._at_work.count(client) if key == LOCAL else self._share(key)
        return free > 1 or (free == 1 and not at_work)

    def _share(self, key: str) -> int:
        return sum(key_of(client) == key for client in self._at_work)
