"""Shares of what a server can hold: by key first, by client name within the key.

A client is `KEY NAME` (see `middleware`), with a hash for the key and a name that the sender chooses. Names are
free, so what one key may hold is limited for all of its names together: whoever has another key finds a place.
Without keys, everybody on this machine is `local`, and only the names separate people.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
