"""What runs in a replica: an engine, and what the gateway asks of it from another process.

Several calls run at once in threads of one process: a batch, a look at how far it is, the door's questions.
A call says everything it needs, so that another replica can be asked the same.
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
from minikin.server.engine import Concepts, Engine, Given, Pinned, Prepared, Preview, Row

KEPT = 512  # concepts and plans in memory
THREADS = 16  # calls at once; painting takes turns by itself

Sent = Mapping[str, tuple[str, Any]]  # concepts by name: SHA-256, and Ray's reference to the content


class Asked(NamedTuple):
    """A request as it travels: recipes and concepts are plain data, checked by the gateway."""

    kind: str
    recipe: Recipe
    concepts: Sent

    @property
    def key(self) -> tuple[str, str, tuple[tuple[str, str], ...]]:
        contents = tuple((name, sha) for name, (sha, _) in self.concepts.items())
        return self.kind, self.recipe.model_dump_json(), contents


@dataclass
class Ticket:
    """Work in progress."""

    cancelled: threading.Event
    stop: threading.Event
    done: int = 0
    preview: Preview | None = None


class Replica:
    """See `engine.Remote`."""

    def __init__(self, opening: Callable[[], Engine]) -> None:
        self.engine = opening()
        self._tickets: dict[str, Ticket] = {}
        self._concepts: OrderedDict[str, Concept] = OrderedDict()
        self._prepared: OrderedDict[Any, Prepared] = OrderedDict()
        self._lock = threading.Lock()

    def hello(self) -> dict[str, Any]:
        return {"name": self.engine.name, "side": self.engine.side, "pid": os.getpid()}

    def describe(self) -> dict[str, Any]:
        return self.engine.describe()

    def warm_up(self) -> None:
        self.engine.warm_up()

    def room(self, prepared: Prepared) -> int:
        return self.engine.room(prepared)

    # ---- the door ----------------------------------------------------------------------------

    def prepare(self, asked: Asked, given: Given | None) -> Prepared:
        """As the engine's; its plan is the facts for the image's record, and its concepts stay here."""
        prepared = self._ready(asked, given)
        return replace(prepared, concepts={}, plan=self.engine.facts(prepared))

    def _ready(self, asked: Asked, given: Given | None = None) -> Prepared:
        key = asked.key
        with self._lock:
            known = self._prepared.get(key)
        if known is None or given is not None:
            known = self.engine.prepare(asked.kind, asked.recipe, self._pinned(asked.concepts), given)
            with self._lock:
                _keep(self._prepared, key, known)
        return known

    def _pinned(self, sent: Sent) -> Concepts:
        found = {}
        for name, (sha, ref) in sent.items():
            with self._lock:
                concept = self._concepts.get(sha)
            if concept is None:
                import ray

                concept = ray.get(ref)
                with self._lock:
                    _keep(self._concepts, sha, concept)
            found[name] = Pinned(sha, concept if concept.name == name else concept.renamed(name))
        return found

    # ---- work --------------------------------------------------------------------------------

    def paint(self, ticket: str, rows: Sequence[tuple[Asked, int]]) -> list[Image.Image] | None:
        """One image a row; None when it was cancelled."""
        mine = self._begin(ticket)

        def step(done: int, preview: Preview) -> None:
            mine.done, mine.preview = done, preview
            if mine.cancelled.is_set():
                raise events.Cancelled

        try:
            return self.engine.paint([Row(self._ready(asked), seed) for asked, seed in rows], step)
        except events.Cancelled:
            return None
        finally:
            self._tickets.pop(ticket, None)

    def run(self, ticket: str, asked: Asked, given: Given) -> Iterator[events.Event]:
        """Work that is done alone, as events."""
        mine = self._begin(ticket)
        own = replace(given, stop=mine.stop)
        work = self.engine.run(asked.kind, self._ready(asked, own), own)
        try:
            for event in work:
                if mine.cancelled.is_set():
                    return
                if isinstance(event, events.Progress):  # who wants to see it asks `preview`
                    mine.preview = _looking(event)
                    event = replace(event, look=None)
                yield event
        finally:
            close: Any = getattr(work, "close", None)
            if close:
                close()
            self._tickets.pop(ticket, None)

    def look(self, ticket: str) -> int:
        """Steps done."""
        mine = self._tickets.get(ticket)
        return mine.done if mine else 0

    def preview(self, ticket: str, row: int) -> Image.Image | None:
        mine = self._tickets.get(ticket)
        return mine.preview(row) if mine and mine.preview else None

    def cancel(self, ticket: str) -> None:
        self._begin(ticket).cancelled.set()

    def stop(self, ticket: str) -> None:
        self._begin(ticket).stop.set()

    def _begin(self, ticket: str) -> Ticket:
        """The work of this ticket; made by whoever comes first, a cancellation too."""
        return self._tickets.setdefault(ticket, Ticket(threading.Event(), threading.Event()))


def _looking(event: events.Progress) -> Preview | None:
    look = event.look
    return (lambda row: look()) if look else None


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > KEPT:
        kept.popitem(last=False)
