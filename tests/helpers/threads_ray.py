"""As much of Ray as replicas use, in threads of this process: actors that die, hang or are slow at a word."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from contextlib import suppress
from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class WorkerCrashedError(RayError):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Actor:
    """A call a thread.

    hung    calls are not answered while it is set
    slow_s  before each answer
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.dead, self.hung, self.slow_s = threading.Event(), threading.Event(), 0.0
        self._open: set[Future[Any]] = set()
        self._made = self._call(make)

    def die(self) -> None:
        self.dead.set()
        for ref in tuple(self._open):
            with suppress(InvalidStateError):
                ref.set_exception(RayActorError("The actor died."))

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self._call(lambda: self._answer(method, args)))

    def _answer(self, method: str, args: Sequence[Any]) -> Any:
        created = self._made.result()
        while self.hung.is_set():
            if self.dead.wait(0.005):
                raise RayActorError("The actor was killed.")
        self.dead.wait(self.slow_s)
        return getattr(created, method)(*args)

    def _call(self, work: Callable[[], Any]) -> Future[Any]:
        ref: Future[Any] = Future()
        self._open.add(ref)
        if self.dead.is_set():
            self.die()

        def run() -> None:
            try:
                matches = work()
            except RayError as e:
                with suppress(InvalidStateError):
                    ref.set_exception(e)
            except Exception as e:
                with suppress(InvalidStateError):
                    ref.set_exception(RayTaskError(e))
            else:
                with suppress(InvalidStateError):
                    ref.set_result(matches)
            self._open.discard(ref)

        threading.Thread(target=run, daemon=True).start()
        return ref


class ThreadsRay:
    """Stands where the module `ray` does.

    actors  all that were ever started, the oldest first
    down    the cluster starts no actor any more, and none answers
    """

    exceptions = SimpleNamespace(
        RayError=RayError, RayActorError=RayActorError, RayTaskError=RayTaskError,
        WorkerCrashedError=WorkerCrashedError,
    )  # fmt: skip

    def __init__(self) -> None:
        self.actors: list[Actor] = []
        self.down = False

    def remote(self, **share: Any) -> Callable[[type], Any]:
        return lambda kind: SimpleNamespace(remote=lambda *args: self._started(kind, args))

    def wait(self, refs: list[Future[Any]], timeout: float) -> tuple[list[Future[Any]], list[Future[Any]]]:
        done, _ = wait(refs, timeout, FIRST_COMPLETED)
        return [r for r in refs if r in done], [r for r in refs if r not in done]

    def get(self, ref: Future[Any]) -> Any:
        return ref.result()

    def kill(self, actor: Actor) -> None:
        actor.die()

    def fall(self) -> None:
        """The head is gone, and everything with it."""
        self.down = True
        for actor in self.actors:
            actor.die()

    def _started(self, kind: type, args: Sequence[Any]) -> Actor:
        actor = Actor(lambda: kind(*args))
        self.actors.append(actor)
        if self.down:
            actor.die()
        return actor
