"""Which results a server removes: those that are too old, and of too many the oldest of the largest owner."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

from minikin.server.admission import key_of
from minikin.server.limits import Limits


def expired(rows: Iterable[Mapping[str, Any]], limits: Limits, now: float) -> list[str]:
    """Ids of the results to remove: those older than `keep_s`, and more until the others fit into `keep_bytes`.

    rows  with id, client, bytes and made (seconds), the oldest first

    These are the oldest of the client that holds most, within the key that holds most: nobody's results go for
    those of somebody who has more.
    """
    too_old, by_client, of_key = list[str](), dict[str, deque[Mapping[str, Any]]](), Counter[str]()
    for row in rows:
        if now - row["made"] > limits.keep_s:
            too_old.append(row["id"])
        else:
            by_client.setdefault(row["client"], deque()).append(row)
            of_key[key_of(row["client"])] += row["bytes"]
    largest: dict[str, list[tuple[int, str]]] = {}  # of each key its clients, that with the most bytes first
    for client, held in by_client.items():
        heapq.heappush(largest.setdefault(key_of(client), []), (-sum(row["bytes"] for row in held), client))
    surplus: list[str] = []
    while of_key.total() > limits.keep_bytes:
        key = max(of_key, key=of_key.__getitem__)
        size, client = largest[key][0]
        row = by_client[client].popleft()
        heapq.heapreplace(largest[key], (size + row["bytes"], client))
        of_key[key] -= row["bytes"]
        surplus.append(row["id"])
    return too_old + surplus
