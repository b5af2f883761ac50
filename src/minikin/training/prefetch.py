"""Batches prepared on a thread, one step ahead."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from minikin.training.config import StepContext

Prepare = Callable[[StepContext], Any]


class Prefetch:
    """Prepares the batch of the next step on a thread while the current step is computed."""

    def __init__(self, prepare: Prepare | None, pool: ThreadPoolExecutor) -> None:
        self.prepare, self.pool = prepare, pool
        self.ahead: tuple[StepContext, Future[Any]] | None = None

    def get(self, ctx: StepContext, following: StepContext) -> Any:
        """The batch of this step; another context than announced is prepared now."""
        if self.prepare is None:
            return None
        ready = self.ahead if self.ahead and self.ahead[0] == ctx else self._submit(self.prepare, ctx)
        data = ready[1].result()
        self.ahead = self._submit(self.prepare, following)
        return data

    def _submit(self, prepare: Prepare, ctx: StepContext) -> tuple[StepContext, Future[Any]]:
        return ctx, self.pool.submit(prepare, ctx)
