"""Engines that paint in other processes: what `minikin serve --replicas N` gives its gateway.

    engines = remote_engines(ray, opening, 4, share)

Replicas are Ray actors behind the gateway's own line, not Ray Serve deployments: the gateway already queues,
batches, takes turns, refuses, replays and remembers, and Serve would do the first half of that a second time
and answer everything a dead replica had in hand with a bare 500. Ray gives processes, machines and GPUs.

A replica that dies raises EngineLost, one that keeps silent as well; the worker gives its batch back to the
line and calls `warm_up`, which starts another. Nothing here knows of jobs.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from PIL import Image

from minikin.cluster.pool import Lost, answer
from minikin.cluster.replica import KEPT, THREADS, Asked, Replica, Sent
from minikin.events import Event, Progress
from minikin.recipes import Paint, Recipe
from minikin.server.engine import Concepts, Engine, EngineLost, Given, OnStep, Prepared, Row
from minikin.server.errors import Refused

LOOK_S = 0.05  # between two looks at how far a batch is
DOOR_S = 10.0  # a request waits so long for any replica
NEXT_S = 1.0  # without an answer, until the next one is asked as well
ALIVE_S = 10.0  # one that has nothing to do answers sooner, or not at all
START_S = 900.0  # until a base is open: the first time it may come over the network


def remote_engines(
    ray: Any, opening: Callable[[], Engine], count: int, share: Mapping[str, float]
) -> list[Engine]:
    """One engine a replica. Raises what keeps the base from being opened."""
    fleet = Fleet(ray, opening, share)
    engines = [Remote(fleet) for _ in range(count)]
    fleet.members += engines
    for engine in engines:
        engine.introduce()
    return list(engines)


class Fleet:
    """What the replicas of one gateway share: how to start one, and the concepts they were sent."""

    def __init__(self, ray: Any, opening: Callable[[], Engine], share: Mapping[str, float]) -> None:
        self.ray, self.opening = ray, opening
        self.members: list[Remote] = []
        self._make = ray.remote(max_concurrency=THREADS, max_restarts=0, **share)(Replica)
        self._sent: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._turn = itertools.count()

    def start(self) -> Any:
        return self._make.remote(self.opening)

    def send(self, concepts: Concepts) -> Sent:
        """References instead of contents: each goes to a machine once."""
        found = {}
        with self._lock:
            for name, one in concepts.items():
                if one.sha256 not in self._sent:
                    self._sent[one.sha256] = self.ray.put(one.concept)
                self._sent.move_to_end(one.sha256)
                found[name] = (one.sha256, self._sent[one.sha256])
            while len(self._sent) > KEPT:
                self._sent.popitem(last=False)
        return found

    def anyone(self, method: str, *args: Any) -> Any:
        """Ask the replicas in turn: the next as well when those before are gone or keep silent.

        Whoever answers first; its errors are raised. Raises Refused (503) when none does within DOOR_S.
        """
        until, first = time.monotonic() + DOOR_S, next(self._turn) % len(self.members)
        turn = [*self.members[first:], *self.members[:first]]
        waiting: dict[Any, tuple[Remote, Any]] = {}
        while (left := until - time.monotonic()) > 0:
            asked = [actor for _, actor in waiting.values()]
            fresh = next((m for m in turn if not m.gone and not any(m.actor is a for a in asked)), None)
            if fresh is not None:
                ref, actor = fresh.asked(method, *args)
                waiting[ref] = fresh, actor
            elif not waiting:
                time.sleep(0.1)  # until a worker has another replica
                continue
            for ref in self.ray.wait(list(waiting), timeout=min(NEXT_S, left))[0]:
                one, actor = waiting.pop(ref)
                with suppress(EngineLost):
                    return one.got(ref, actor)
        raise Refused("No replica answers now.", status=503, code="no_replica", retry_s=10)


class Remote:
    """One replica as the gateway's worker sees it. See `server.engine.Engine`."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.ray = fleet, fleet.ray
        self.name, self.side, self.pid = "", 0, 0
        self.actor: Any = fleet.start()
        self._described: dict[str, Any] | None = None
        self._dead: Any = None  # the actor that was found dead; its successor is another one

    @property
    def gone(self) -> bool:
        return self._dead is self.actor

    def introduce(self) -> None:
        """Wait until the base is open. Raises EngineLost, and what keeps it from being opened."""
        self._meet(self.actor)

    def ask(self, method: str, *args: Any, within_s: float = 30.0) -> Any:
        """A short question. Raises EngineLost."""
        if self.gone:
            raise EngineLost("This replica is gone.")
        ref, actor = self.asked(method, *args)
        done, _ = self.ray.wait([ref], timeout=within_s)
        if not done:
            raise EngineLost(f"A replica did not answer within {within_s:g} s.")
        return self.got(ref, actor)

    def asked(self, method: str, *args: Any) -> tuple[Any, Any]:
        """A question on its way, and which actor it went to."""
        actor = self.actor
        return getattr(actor, method).remote(*args), actor

    def got(self, ref: Any, actor: Any) -> Any:
        """What that actor answered. Raises what it raised, and EngineLost."""
        try:
            return answer(self.ray, ref)
        except Lost as e:
            self._lose(actor)
            raise EngineLost(f"A replica was lost: {e}") from e

    def _lose(self, actor: Any) -> None:
        if actor is self.actor:  # an answer of its predecessor may come late
            self._dead = actor

    def _alive(self, method: str, *args: Any) -> Any:
        """A question that whoever lives answers at once: who does not is as good as dead. Raises EngineLost."""
        actor = self.actor
        try:
            return self.ask(method, *args, within_s=ALIVE_S)
        except EngineLost:
            self._lose(actor)
            raise

    # ---- the engine's protocol ---------------------------------------------------------------

    def prepare(self, kind: str, recipe: Recipe, concepts: Concepts, given: Given | None = None) -> Prepared:
        asked = Asked(kind, recipe, self.fleet.send(concepts))
        told = given and replace(given, stop=None)
        prepared: Prepared = self.fleet.anyone("prepare", asked, told)
        return replace(prepared, concepts=concepts)

    def paint(self, rows: Sequence[Row], on_step: OnStep) -> list[Image.Image]:
        ticket = secrets.token_hex(8)
        sent = [(self._sent("paint", row.prepared), row.seed) for row in rows]
        ref, actor = self.asked("paint", ticket, sent)

        def preview(row: int) -> Image.Image | None:
            return self._preview(ticket, row)

        try:
            while not self.ray.wait([ref], timeout=LOOK_S)[0]:
                on_step(self.ask("look", ticket), preview)
        except BaseException as e:
            if isinstance(e, EngineLost):  # one that does not answer, too
                self._lose(actor)
            else:
                actor.cancel.remote(ticket)
            raise
        images: list[Image.Image] = self.got(ref, actor)
        return images

    def _preview(self, ticket: str, row: int = 0) -> Image.Image | None:
        with suppress(EngineLost):
            shown: Image.Image | None = self.ask("preview", ticket, row, within_s=2.0)
            return shown
        return None

    def run(self, kind: str, prepared: Prepared, given: Given) -> Iterator[Event]:
        ticket, stopping, ended = secrets.token_hex(8), False, False
        told = replace(given, stop=None)
        actor = self.actor
        work = actor.run.options(num_returns="streaming").remote(ticket, self._sent(kind, prepared), told)
        try:
            for ref in work:
                if given.stop is not None and given.stop.is_set() and not stopping:
                    actor.stop.remote(ticket)
                    stopping = True
                event = self.got(ref, actor)
                if isinstance(event, Progress):
                    event = replace(event, look=partial(self._preview, ticket))
                yield event
            ended = True
        except self.ray.exceptions.RayActorError as e:
            self._lose(actor)
            raise EngineLost(f"A replica was lost: {type(e).__name__}.") from e
        finally:
            if not ended and not self.gone:
                actor.cancel.remote(ticket)

    def check(self) -> None:
        self._alive("hello")

    def room(self, prepared: Prepared) -> int:
        found: int = self._alive("room", replace(prepared, concepts={}, plan=None))
        return found

    def hastened(self, recipe: Paint) -> Paint:
        return recipe

    def facts(self, prepared: Prepared) -> dict[str, Any]:
        facts: dict[str, Any] = prepared.plan
        return facts

    def describe(self) -> dict[str, Any]:
        if self._described is None:
            self._described = self.fleet.anyone("describe")
        return self._described

    def warm_up(self) -> None:
        if self.gone:
            self.ray.kill(self.actor)  # one that hangs, too
            fresh = self.fleet.start()
            try:
                self._meet(fresh)
            except BaseException:
                self.ray.kill(fresh)
                raise
            self.actor = fresh  # not before its base is open: nobody is to wait for that
        self.ask("warm_up", within_s=START_S)

    def _meet(self, actor: Any) -> None:
        hello = actor.hello.remote()
        if not self.ray.wait([hello], timeout=START_S)[0]:
            raise EngineLost("A replica did not open its base in time.")
        told = self.got(hello, actor)
        self.name, self.side, self.pid = told["name"], told["side"], told["pid"]

    def _sent(self, kind: str, prepared: Prepared) -> Asked:
        return Asked(kind, prepared.recipe, self.fleet.send(prepared.concepts))
