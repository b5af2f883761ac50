"""Ray clusters, started on this machine or joined, and a pool of actors that survives dead workers.

    with Cluster(workers=2).joined() as ray: ...

A local cluster listens on 127.0.0.1 only, requires a random token, has no dashboard and sends no usage
statistics. Whoever can talk to a cluster can run anything on it: see docs/fleet.md.

`ray.util.ActorPool` also distributes work over actors, but it neither replaces dead actors nor repeats their
work, and raises the first error; the workers of a fleet may die at any time, so `ActorPool` here does both.
"""

from __future__ import annotations

import os
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from minikin.errors import BadRecipe, MinikinError, extra

STORE_BYTES = 100 << 20  # of shared memory: what travels is recipes and answers
LOSSES = 3  # workers that may die on the same item before it is given up
CORES_EACH = 4  # per worker without a GPU, by default


class WorkerLost(MinikinError):
    """A worker died on this item, and so did those that tried it again."""

    exit_code = 1
    code = "worker_lost"


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster and the resources of its workers.

    workers  how many at once; None for one per GPU, or one per four cores on machines without
    address  of a running cluster: auto, HOST:PORT or ray://HOST:10001; None starts one on this machine
    cpus     cores, and threads, per worker
    gpus     GPUs per worker, also a share below 1; None for one where there are any
    """

    workers: int | None = None
    address: str | None = None
    cpus: float | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise BadRecipe(f"A cluster has at least 1 worker, but --workers is {self.workers}.")
        if (self.cpus or 1) <= 0 or (self.gpus or 0) < 0:
            raise BadRecipe("A worker has more than 0 CPUs, and 0 or more GPUs.")

    @contextmanager
    def joined(self) -> Iterator[Any]:
        """Inside, this process is connected to Ray; yields the module. Raises BadRecipe."""
        ray = _ray(local=self.address is None)
        if ray.is_initialized():  # whoever started it shuts it down
            yield ray
            return
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if self.address is None:
                ray.init(
                    address="local", num_cpus=self._cores(), include_dashboard=False,
                    object_store_memory=STORE_BYTES, **quiet,
                )  # fmt: skip
            else:
                ray.init(address=self.address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, OSError) as e:
            where = f"There is no cluster at {self.address}" if self.address else "Ray did not start here"
            raise BadRecipe(
                f"{where}: {str(e).splitlines()[0] if str(e) else type(e).__name__}. Look with `ray status`, "
                "check the token (RAY_AUTH_MODE, RAY_AUTH_TOKEN), or leave --address out to use this machine."
            ) from e
        try:
            yield ray
        finally:
            ray.shutdown()

    def share(self, ray: Any) -> dict[str, float]:
        """Ray's resource options of one worker."""
        gpus = self.gpus
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
        cpus = self.cpus or (1.0 if gpus or self.workers else float(min(CORES_EACH, os.cpu_count() or 1)))
        return {"num_cpus": cpus, "num_gpus": gpus}

    def count(self, ray: Any) -> int:
        """How many workers run at once."""
        if self.workers:
            return self.workers
        have, each = ray.cluster_resources(), self.share(ray)
        if each["num_gpus"]:
            return max(1, int(have.get("GPU", 0) / each["num_gpus"]))
        return max(1, int(have.get("CPU", 1) / each["num_cpus"]))

    def _cores(self) -> int:
        cpus = (self.workers or 1) * (self.cpus or 1)
        return max(os.cpu_count() or 1, int(cpus + 0.999))


def _ray(*, local: bool) -> Any:
    """The module, imported with its environment set; raises BadRecipe where it is not installed."""
    if not find_spec("ray"):
        raise BadRecipe(
            f"Ray is not installed, which a fleet of workers needs. Install it with {extra('ray')}, "
            "or run in this process with --workers 0."
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if local:
        # in spite of its name, Ray's switch for listening on 127.0.0.1 only, on Linux too
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        if not os.environ.get("RAY_AUTH_MODE"):
            os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
    import ray

    with suppress(AttributeError):  # if Ray was imported before, it has cached that there is no token
        ray._raylet.AuthenticationTokenLoader.instance().reset_cache()
    return ray


def result_of(ray: Any, ref: Any) -> Any:
    """A worker's result; raises what the worker raised, and WorkerLost when workers died too often."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as e:
        raise e.cause if isinstance(e.cause, Exception) else e from e
    except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as e:
        raise WorkerLost(f"The worker died on this, {LOSSES} times: {_reason(e)}.") from e
    except ray.exceptions.RayError as e:  # a lost node, an object lost with it, too little memory
        raise WorkerLost(f"The work was lost with its worker ({type(e).__name__}): {_reason(e)}.") from e


def _reason(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return lines[0][:200].rstrip(".") if lines else type(e).__name__


def run_tasks(
    ray: Any, function: Callable[[Any], Any], items: Iterator[Any], share: dict[str, float], most: int,
    stopped: Callable[[], bool],
) -> Iterator[tuple[Any, Any]]:  # fmt: skip
    """(item, result or exception) for each item, in the order of completion; at most `most` run at once.

    Yields (None, None) at least twice a second, so that the caller can react. Tasks that run when `stopped`
    returns True are killed.
    """
    task = ray.remote(max_retries=LOSSES - 1, **share)(function)
    waiting: dict[Any, Any] = {}
    more = True
    try:
        while (more or waiting) and not stopped():
            while more and len(waiting) < most:
                item = next(items, None)
                more = item is not None
                if more:
                    waiting[task.remote(item)] = item
            yield None, None
            yield from _completed(ray, waiting)
    finally:
        for ref in waiting:
            ray.cancel(ref, force=True)


def _completed(ray: Any, waiting: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """(value in `waiting`, result or exception) of references that complete within half a second."""
    done, _ = ray.wait(list(waiting), timeout=0.5) if waiting else ([], None)
    for ref in done:
        value = waiting.pop(ref)
        try:
            yield value, result_of(ray, ref)
        except Exception as e:
            yield value, e


@dataclass(eq=False)
class _Task:
    """An item, and how many workers died while they had it; after the first it runs by itself."""

    item: Any
    losses: int = 0


class ActorPool:
    """A pool of actors with state: `factory()` is called in each, then `.work(item)` of the object it returned.

    An actor gets its first item when it has started, and up to `ahead` items once all have, so that it never
    waits for the next. An actor that dies is replaced, and its items are tried again one at a time, so that the
    item that kills its workers is told from the others.
    split  returns the parts of an item on which LOSSES workers died, to be tried one by one; [] gives it up
    """

    def __init__(
        self, ray: Any, factory: Callable[[], Any], share: dict[str, float], count: int, *,
        split: Callable[[Any], list[Any]], ahead: int = 2,
    ) -> None:  # fmt: skip
        self.ray, self.factory, self.split, self.ahead = ray, factory, split, ahead
        self._actor = ray.remote(max_restarts=0, **share)(ActorHost)
        self._starting: dict[Any, Any] = {}
        self._load: dict[Any, int] = {}  # items by started actor
        self._waiting: dict[Any, tuple[Any, _Task, int]] = {}
        self._retry: deque[_Task] = deque()
        self._failed_starts = 0
        for _ in range(count):
            self._start()

    def results(self, items: Iterator[Any], stopped: Callable[[], bool]) -> Iterator[tuple[Any, Any]]:
        """(item, result or exception) in the order of completion; (None, None) at least twice a second."""
        more = True
        try:
            while (more or self._waiting or self._retry) and not stopped():
                self._collect_started()
                while (more or self._retry) and (actor := self._idlest()):
                    task = self._retry.popleft() if self._retry else _Task(next(items, None))
                    if task.item is None:
                        more = False
                    else:
                        self._send(actor, task)
                yield None, None
                for (actor, task, slots), result in _completed(self.ray, self._waiting):
                    if actor in self._load:
                        self._load[actor] -= slots
                    if not isinstance(result, WorkerLost) or self._lost(actor, task):
                        yield task.item, result
        finally:
            for actor in [*self._starting.values(), *self._load]:
                self.ray.kill(actor)

    def _start(self) -> None:
        actor = self._actor.remote(self.factory)
        self._starting[actor.ping.remote()] = actor

    def _collect_started(self) -> None:
        """Collect the actors that have started. Raises the error of a factory: it would meet all actors."""
        if not self._starting:
            return
        for ref in self.ray.wait(list(self._starting), timeout=0 if self._waiting else 0.5)[0]:
            actor = self._starting.pop(ref)
            try:
                result_of(self.ray, ref)
                self._load[actor], self._failed_starts = 0, 0
            except WorkerLost:
                self._failed_starts += 1
                if self._failed_starts > LOSSES:
                    raise
                self._start()

    def _idlest(self) -> Any:
        """The actor with the fewest items, if it may have more, else None."""
        most = 1 if self._starting or self._retry else self.ahead
        actor = min(self._load, key=self._load.__getitem__, default=None)
        return actor if actor is not None and self._load[actor] < most else None

    def _send(self, actor: Any, task: _Task) -> None:
        slots = self.ahead if task.losses else 1  # an item that lost a worker fills its actor
        self._load[actor] += slots
        self._waiting[actor.work.remote(task.item)] = (actor, task, slots)

    def _lost(self, actor: Any, task: _Task) -> bool:
        """Replace a dead actor and queue its item again; returns whether the item is given up."""
        if self._load.pop(actor, None) is not None:
            self.ray.kill(actor)
            self._start()
        task.losses += 1
        if task.losses < LOSSES:
            self._retry.append(task)
            return False
        parts = self.split(task.item)
        self._retry += [_Task(part, 1) for part in parts]
        return not parts


class ActorHost:
    """The actor's class: opens a worker once, then calls it for each item."""

    def __init__(self, factory: Callable[[], Any]) -> None:
        self.worker = factory()

    def ping(self) -> int:
        return os.getpid()

    def work(self, item: Any) -> Any:
        return self.worker.work(item)


def run_locally(worker: Any, items: Iterator[Any], stopped: Callable[[], bool]) -> Iterator[tuple[Any, Any]]:
    """As `ActorPool.results`, in this process, one item after the other."""
    for item in items:
        if stopped():
            return
        try:
            result = worker.work(item)
        except Exception as e:
            result = e
        yield item, result
