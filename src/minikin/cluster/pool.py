"""Ray, as a fleet uses it: one of this machine's own, or a cluster that is running already.

    with Cluster(workers=2).joined() as ray: ...

One of our own listens on 127.0.0.1 alone, asks for a token that nobody else knows, has no dashboard and
tells nobody that it runs. Who may talk to a cluster may run anything on it: see docs/fleet.md.
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
LOSSES = 3  # workers that may die under the same work
CORES_EACH = 4  # of a worker without a GPU, where it is not said


class Lost(MinikinError):
    """A worker died under this work, and so did those that tried it again."""

    exit_code = 1
    code = "worker_lost"


@dataclass(frozen=True)
class Cluster:
    """Where a fleet works.

    workers  at once; None for one a GPU, or one for every four cores of machines without
    address  of a running cluster: auto, HOST:PORT or ray://HOST:10001; None for this machine alone
    cpus     of each worker; its threads, too
    gpus     of each worker, a share below 1 as well; None for one where there are any
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
        """Inside, Ray is up and this process belongs to it; yields the module. Raises BadRecipe."""
        ray = _ray(own=self.address is None)
        if ray.is_initialized():  # somebody else's to end
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
        """What Ray is to set aside for one worker."""
        gpus = self.gpus
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
        cpus = self.cpus or (1.0 if gpus or self.workers else float(min(CORES_EACH, os.cpu_count() or 1)))
        return {"num_cpus": cpus, "num_gpus": gpus}

    def count(self, ray: Any) -> int:
        """Workers at once."""
        if self.workers:
            return self.workers
        have, each = ray.cluster_resources(), self.share(ray)
        if each["num_gpus"]:
            return max(1, int(have.get("GPU", 0) / each["num_gpus"]))
        return max(1, int(have.get("CPU", 1) / each["num_cpus"]))

    def _cores(self) -> int:
        asked = (self.workers or 1) * (self.cpus or 1)
        return max(os.cpu_count() or 1, int(asked + 0.999))


def _ray(*, own: bool) -> Any:
    """The module, with its environment set before it looks; raises BadRecipe where it is not installed."""
    if not find_spec("ray"):
        raise BadRecipe(
            f"Ray is not installed, which a fleet of workers needs. Install it with {extra('ray')}, "
            "or work in this process alone with --workers 0."
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if own:
        os.environ.setdefault(
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0"
        )  # its switch for 127.0.0.1, on Linux too
        if not os.environ.get("RAY_AUTH_MODE"):
            os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
    import ray

    with suppress(AttributeError):  # it was imported, and has looked for a token, before there was one
        ray._raylet.AuthenticationTokenLoader.instance().reset_cache()
    return ray


def answer(ray: Any, ref: Any) -> Any:
    """What a worker answered; raises what it raised, and Lost when it died too often."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as e:
        raise e.cause if isinstance(e.cause, Exception) else e from e
    except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as e:
        raise Lost(f"The worker died under this, {LOSSES} times: {_reason(e)}.") from e
    except ray.exceptions.RayError as e:  # a node that is gone, an object that went with it, too little memory
        raise Lost(f"The work was lost with its worker ({type(e).__name__}): {_reason(e)}.") from e


def _reason(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return lines[0][:200].rstrip(".") if lines else type(e).__name__


def over_tasks(
    ray: Any, function: Callable[[Any], Any], items: Iterator[Any], share: dict[str, float], most: int,
    stopped: Callable[[], bool],
) -> Iterator[tuple[Any, Any]]:  # fmt: skip
    """Each item's answer, or the exception, as they come; at most `most` are sent at once.

    (None, None) now and then while nothing comes. What was sent when `stopped` is ended by force.
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
            yield from _arrived(ray, waiting)
    finally:
        for ref in waiting:
            ray.cancel(ref, force=True)


def _arrived(ray: Any, waiting: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """What came within half a second, out of `waiting`: its value there, and the answer or the exception."""
    done, _ = ray.wait(list(waiting), timeout=0.5) if waiting else ([], None)
    for ref in done:
        value = waiting.pop(ref)
        try:
            yield value, answer(ray, ref)
        except Exception as e:
            yield value, e


@dataclass(eq=False)
class _Piece:
    """An item, and how many workers died that had it in hand. From the first on it is tried by itself."""

    item: Any
    losses: int = 0


class Crew:
    """Workers that keep something open: `factory()` is called in each, then `.work(item)` of what it gave.

    A worker gets work when it is up, and once all are, `ahead` items so that it never waits for the next. One
    that dies is replaced. What it had in hand is tried again, each item by itself: the one that kills its
    workers is found, and no other is blamed for standing beside it.
    split  an item under which LOSSES workers died, in parts to be tried by themselves; [] when it is lost
    """

    def __init__(
        self, ray: Any, factory: Callable[[], Any], share: dict[str, float], count: int, *,
        split: Callable[[Any], list[Any]], ahead: int = 2,
    ) -> None:  # fmt: skip
        self.ray, self.factory, self.split, self.ahead = ray, factory, split, ahead
        self._actor = ray.remote(max_restarts=0, **share)(Holder)
        self._starting: dict[Any, Any] = {}
        self._in_hand: dict[Any, int] = {}  # of workers that are up
        self._waiting: dict[Any, tuple[Any, _Piece, int]] = {}
        self._again: deque[_Piece] = deque()
        self._failed_starts = 0
        for _ in range(count):
            self._start()

    def answers(self, items: Iterator[Any], stopped: Callable[[], bool]) -> Iterator[tuple[Any, Any]]:
        """Each item's answer, or the exception, as they come; (None, None) now and then while nothing comes."""
        more = True
        try:
            while (more or self._waiting or self._again) and not stopped():
                self._welcome()
                while (more or self._again) and (one := self._free()):
                    piece = self._again.popleft() if self._again else _Piece(next(items, None))
                    if piece.item is None:
                        more = False
                    else:
                        self._send(one, piece)
                yield None, None
                for (one, piece, room), found in _arrived(self.ray, self._waiting):
                    if one in self._in_hand:
                        self._in_hand[one] -= room
                    if not isinstance(found, Lost) or self._lost(one, piece):
                        yield piece.item, found
        finally:
            for one in [*self._starting.values(), *self._in_hand]:
                self.ray.kill(one)

    def _start(self) -> None:
        one = self._actor.remote(self.factory)
        self._starting[one.hello.remote()] = one

    def _welcome(self) -> None:
        """Whoever is up by now. Raises what keeps one from opening: it keeps all of them."""
        if not self._starting:
            return
        for ref in self.ray.wait(list(self._starting), timeout=0 if self._waiting else 0.5)[0]:
            one = self._starting.pop(ref)
            try:
                answer(self.ray, ref)
                self._in_hand[one], self._failed_starts = 0, 0
            except Lost:
                self._failed_starts += 1
                if self._failed_starts > LOSSES:
                    raise
                self._start()

    def _free(self) -> Any:
        """Who has least in hand, if it may have more; None for nobody."""
        most = 1 if self._starting or self._again else self.ahead
        one = min(self._in_hand, key=self._in_hand.__getitem__, default=None)
        return one if one is not None and self._in_hand[one] < most else None

    def _send(self, one: Any, piece: _Piece) -> None:
        room = self.ahead if piece.losses else 1  # by itself: nothing else fits beside it
        self._in_hand[one] += room
        self._waiting[one.work.remote(piece.item)] = (one, piece, room)

    def _lost(self, one: Any, piece: _Piece) -> bool:
        """Replace a dead worker, try its work again; whether the piece is given up."""
        if self._in_hand.pop(one, None) is not None:
            self.ray.kill(one)
            self._start()
        piece.losses += 1
        if piece.losses < LOSSES:
            self._again.append(piece)
            return False
        parts = self.split(piece.item)
        self._again += [_Piece(part, 1) for part in parts]
        return not parts


class Holder:
    """An actor around something that opens slowly and works often."""

    def __init__(self, factory: Callable[[], Any]) -> None:
        self.held = factory()

    def hello(self) -> int:
        return os.getpid()

    def work(self, item: Any) -> Any:
        return self.held.work(item)


def here(worker: Any, items: Iterator[Any], stopped: Callable[[], bool]) -> Iterator[tuple[Any, Any]]:
    """The same in this process, one after the other."""
    for item in items:
        if stopped():
            return
        try:
            found = worker.work(item)
        except Exception as e:
            found = e
        yield item, found
