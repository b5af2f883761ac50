"""Engines in other processes: the inference backend of `minikin serve --replicas N`.

    engines = remote_engines(ray, opening, 4, share)

Replicas are Ray actors behind the gateway's queue, not Ray Serve deployments: the gateway already queues,
batches, shares fairly, rejects, repeats and stores, and Serve would do the first half of that a second time and
answer every request of a dead replica with a bare 500. Ray provides processes, machines and GPUs.

A replica that died or does not answer raises EngineLost; the worker then puts its batch back into the queue and
calls `warm_up`, which starts another replica. Nothing here knows of jobs.
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

from minikin.cluster.pool import WorkerLost, result_of
from minikin.cluster.replica import MAX_CACHED, THREADS, RemoteRequest, Replica, SentConcepts
from minikin.events import Event, Progress
from minikin.recipes import Paint, Recipe
from minikin.server.engine import Concepts, Engine, EngineLost, JobInputs, OnStep, PreparedRequest, Row
from minikin.server.errors import RequestRejected

POLL_S = 0.05  # between two questions for a batch's progress
ADMISSION_S = 10.0  # until a request for which no replica answers is rejected
HEDGE_S = 1.0  # without an answer, until the next replica is asked as well
ALIVE_S = 10.0  # an idle replica answers sooner, or is dead
OPEN_S = 900.0  # until a base is open: the first time it may be downloaded


def remote_engines(
    ray: Any, open_engine: Callable[[], Engine], count: int, share: Mapping[str, float]
) -> list[Engine]:
    """One engine per replica. Raises the error of opening the base."""
    replicas = ReplicaSet(ray, open_engine, share)
    engines = [RemoteEngine(replicas) for _ in range(count)]
    replicas.engines += engines
    for engine in engines:
        engine.connect()
    return list(engines)


class ReplicaSet:
    """The replicas of one gateway: starts them, and sends them concepts."""

    def __init__(self, ray: Any, open_engine: Callable[[], Engine], share: Mapping[str, float]) -> None:
        self.ray, self.open_engine = ray, open_engine
        self.engines: list[RemoteEngine] = []
        self._make = ray.remote(max_concurrency=THREADS, max_restarts=0, **share)(Replica)
        self._sent: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._turn = itertools.count()

    def start(self) -> Any:
        return self._make.remote(self.open_engine)

    def send(self, concepts: Concepts) -> SentConcepts:
        """References to concepts in Ray's object store: each content goes to a machine once."""
        references = {}
        with self._lock:
            for name, pinned in concepts.items():
                if pinned.sha256 not in self._sent:
                    self._sent[pinned.sha256] = self.ray.put(pinned.concept)
                self._sent.move_to_end(pinned.sha256)
                references[name] = (pinned.sha256, self._sent[pinned.sha256])
            while len(self._sent) > MAX_CACHED:
                self._sent.popitem(last=False)
        return references

    def ask_any(self, method: str, *args: Any) -> Any:
        """The first answer of any replica; the next one is asked, too, after HEDGE_S without an answer.

        Raises that replica's errors, and RequestRejected (503) when none answers within ADMISSION_S.
        """
        deadline, first = time.monotonic() + ADMISSION_S, next(self._turn) % len(self.engines)
        order = [*self.engines[first:], *self.engines[:first]]
        waiting: dict[Any, tuple[RemoteEngine, Any]] = {}
        while (seconds_left := deadline - time.monotonic()) > 0:
            busy = [actor for _, actor in waiting.values()]
            engine = next((m for m in order if not m.is_dead and not any(m.actor is a for a in busy)), None)
            if engine is not None:
                ref, actor = engine.submit(method, *args)
                waiting[ref] = engine, actor
            elif not waiting:
                time.sleep(0.1)  # until a worker has started another replica
                continue
            for ref in self.ray.wait(list(waiting), timeout=min(HEDGE_S, seconds_left))[0]:
                asked_engine, actor = waiting.pop(ref)
                with suppress(EngineLost):
                    return asked_engine.result(ref, actor)
        raise RequestRejected("No replica answers now.", status=503, code="no_replica", retry_s=10)


class RemoteEngine:
    """One replica, as a `server.engine.Engine` for the gateway's worker."""

    def __init__(self, replicas: ReplicaSet) -> None:
        self.replicas, self.ray = replicas, replicas.ray
        self.name, self.side, self.pid = "", 0, 0
        self.actor: Any = replicas.start()
        self._described: dict[str, Any] | None = None
        self._dead: Any = None  # the last actor that died

    @property
    def is_dead(self) -> bool:
        return self._dead is self.actor

    def connect(self) -> None:
        """Wait until the base is open. Raises EngineLost, and the error of opening the base."""
        self._connect(self.actor)

    def ask(self, method: str, *args: Any, within_s: float = 30.0) -> Any:
        """Call a method that returns soon. Raises EngineLost."""
        if self.is_dead:
            raise EngineLost("This replica is dead.")
        ref, actor = self.submit(method, *args)
        done, _ = self.ray.wait([ref], timeout=within_s)
        if not done:
            raise EngineLost(f"A replica did not answer within {within_s:g} s.")
        return self.result(ref, actor)

    def submit(self, method: str, *args: Any) -> tuple[Any, Any]:
        """(reference to the result, actor) of a call."""
        actor = self.actor
        return getattr(actor, method).remote(*args), actor

    def result(self, ref: Any, actor: Any) -> Any:
        """The result of a call to this actor. Raises what it raised, and EngineLost."""
        try:
            return result_of(self.ray, ref)
        except WorkerLost as e:
            self._mark_dead(actor)
            raise EngineLost(f"A replica was lost: {e}") from e

    def _mark_dead(self, actor: Any) -> None:
        if actor is self.actor:  # a late result may come from its predecessor
            self._dead = actor

    def _ask_alive(self, method: str, *args: Any) -> Any:
        """Call a method that a live replica answers at once; else it counts as dead. Raises EngineLost."""
        actor = self.actor
        try:
            return self.ask(method, *args, within_s=ALIVE_S)
        except EngineLost:
            self._mark_dead(actor)
            raise

    # ---- the engine's protocol ---------------------------------------------------------------

    def prepare(
        self, kind: str, recipe: Recipe, concepts: Concepts, inputs: JobInputs | None = None
    ) -> PreparedRequest:
        submit = RemoteRequest(kind, recipe, self.replicas.send(concepts))
        sent_inputs = inputs and replace(inputs, stop=None)
        prepared: PreparedRequest = self.replicas.ask_any("prepare", submit, sent_inputs)
        return replace(prepared, concepts=concepts)

    def paint(self, rows: Sequence[Row], on_step: OnStep) -> list[Image.Image]:
        task_id = secrets.token_hex(8)
        sent = [(self._sent("paint", row.prepared), row.seed) for row in rows]
        ref, actor = self.submit("paint", task_id, sent)

        def preview(row: int) -> Image.Image | None:
            return self._preview(task_id, row)

        try:
            while not self.ray.wait([ref], timeout=POLL_S)[0]:
                on_step(self.ask("steps_done", task_id), preview)
        except BaseException as e:
            if isinstance(e, EngineLost):  # also of one that does not answer
                self._mark_dead(actor)
            else:
                actor.cancel.remote(task_id)
            raise
        images: list[Image.Image] = self.result(ref, actor)
        return images

    def _preview(self, task_id: str, row: int = 0) -> Image.Image | None:
        with suppress(EngineLost):
            image: Image.Image | None = self.ask("preview", task_id, row, within_s=2.0)
            return image
        return None

    def run(self, kind: str, prepared: PreparedRequest, inputs: JobInputs) -> Iterator[Event]:
        task_id, stopping, ended = secrets.token_hex(8), False, False
        sent_inputs = replace(inputs, stop=None)
        actor = self.actor
        work = actor.run.options(num_returns="streaming").remote(
            task_id, self._sent(kind, prepared), sent_inputs
        )
        try:
            for ref in work:
                if inputs.stop is not None and inputs.stop.is_set() and not stopping:
                    actor.stop.remote(task_id)
                    stopping = True
                event = self.result(ref, actor)
                if isinstance(event, Progress):
                    event = replace(event, preview=partial(self._preview, task_id))
                yield event
            ended = True
        except self.ray.exceptions.RayActorError as e:
            self._mark_dead(actor)
            raise EngineLost(f"A replica was lost: {type(e).__name__}.") from e
        finally:
            if not ended and not self.is_dead:
                actor.cancel.remote(task_id)

    def check(self) -> None:
        self._ask_alive("ping")

    def max_batch(self, prepared: PreparedRequest) -> int:
        images: int = self._ask_alive("max_batch", replace(prepared, concepts={}, plan=None))
        return images

    def with_live_engine(self, recipe: Paint) -> Paint:
        return recipe

    def facts(self, prepared: PreparedRequest) -> dict[str, Any]:
        facts: dict[str, Any] = prepared.plan
        return facts

    def describe(self) -> dict[str, Any]:
        if self._described is None:
            self._described = self.replicas.ask_any("describe")
        return self._described

    def warm_up(self) -> None:
        if self.is_dead:
            self.ray.kill(self.actor)  # also one that hangs
            actor = self.replicas.start()
            try:
                self._connect(actor)
            except BaseException:
                self.ray.kill(actor)
                raise
            self.actor = actor  # only now that its base is open: no request waits for that
        self.ask("warm_up", within_s=OPEN_S)

    def _connect(self, actor: Any) -> None:
        ref = actor.ping.remote()
        if not self.ray.wait([ref], timeout=OPEN_S)[0]:
            raise EngineLost("A replica did not open its base in time.")
        identity = self.result(ref, actor)
        self.name, self.side, self.pid = identity["name"], identity["side"], identity["pid"]

    def _sent(self, kind: str, prepared: PreparedRequest) -> RemoteRequest:
        return RemoteRequest(kind, prepared.recipe, self.replicas.send(prepared.concepts))
