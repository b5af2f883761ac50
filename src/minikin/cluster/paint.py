"""`minikin fleet paint`: generate a file of prompts into images named by content, and a run log.

    for event in paint(prompts, out, Cluster(workers=8), batch=4): ...

Whatever dies meanwhile, no image is lost or generated twice: workers write images under names that follow from
the request, the first writer wins, and only this process writes the run log. The same call resumes the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from minikin import events, files
from minikin.cluster.paint_worker import ChunkResult, EngineFactory, PaintWorker
from minikin.cluster.pool import ActorPool, Cluster, WorkerLost, run_locally
from minikin.cluster.prompts import PromptLine, Prompts, failure
from minikin.cluster.run_log import RunLog
from minikin.errors import BadRecipe
from minikin.training.signals import interruptible

CHUNK = 16  # lines per task
MAX_REPORTED = 5  # failures that are reported one by one


def paint(
    prompts: Prompts, out: Path, cluster: Cluster | None, open_engine: EngineFactory, *, batch: int = 4,
    chunk: int = CHUNK,
) -> Iterator[events.Event]:  # fmt: skip
    """Generate every line that is not done; the last event is Done with the run log's path.

    cluster      None for this process
    open_engine  opens the engine in a worker, for example `partial(studio_engine, "sd15")`
    batch        images per batch; chunk: lines per task
    Ctrl-C ends it with KeyboardInterrupt; finished lines are in the run log.
    Raises BadRecipe for a folder of another run, StorageError, Busy.
    """
    if chunk < 1 or batch < 1:
        raise BadRecipe("--chunk and --batch are at least 1.")
    lines = prompts.count()
    run: dict[str, Any] = {"base": prompts.base, "batch": batch, "chunk": chunk}
    run |= {k: prompts.values[k] for k in ("device", "dtype") if k in prompts.values}
    with ExitStack() as stack:
        stack.enter_context(files.lock(out / ".lock", str(out)))
        for folder in out.glob("[0-9a-f][0-9a-f]"):
            files.sweep_orphans(folder)
        progress = _Progress(RunLog(out, run), prompts, chunk)
        stack.callback(progress.run_log.close)
        stop = stack.enter_context(interruptible())
        factory = partial(PaintWorker, open_engine, out.resolve(), batch)
        if cluster is None:
            results = run_locally(_LazyWorker(factory), progress.missing(), stop.is_set)
        else:
            ray = stack.enter_context(cluster.joined())
            share, count = cluster.share(ray), cluster.count(ray)
            yield events.Note(f"{lines:,} lines, {count} workers.")
            pool = ActorPool(ray, factory, share, count, split=_by_line)
            results = pool.results(progress.missing(), stop.is_set)
        for chunk_done, result in results:
            if chunk_done is not None:
                yield from progress.take(chunk_done, result)
                yield events.Progress("painting", progress.ended, lines, progress.info())
        if progress.kept == progress.ended:  # nothing was new
            yield events.Progress("painting", progress.ended, lines)
        if stop.is_set():
            done = f"{progress.ended:,} of {lines:,} lines are done"
            yield events.Note(f"Stopped; {done}. The same command resumes.")
            raise KeyboardInterrupt
    yield events.Done(progress.run_log.path, progress.facts(lines))


def _by_line(chunk: list[PromptLine]) -> list[list[PromptLine]]:
    """The lines of a chunk on which workers died, one by one, to find the one that kills them."""
    return [[line] for line in chunk] if len(chunk) > 1 else []


class _LazyWorker:
    """A worker in this process, opened for its first chunk."""

    def __init__(self, factory: Callable[[], PaintWorker]) -> None:
        self.factory = factory
        self.worker: PaintWorker | None = None

    def work(self, chunk: list[PromptLine]) -> ChunkResult:
        if self.worker is None:
            self.worker = self.factory()
        return self.worker.work(chunk)


class _Progress:
    """The chunks to do, and counts of what was done."""

    def __init__(self, run_log: RunLog, prompts: Prompts, chunk: int) -> None:
        self.run_log, self.prompts, self.chunk = run_log, prompts, chunk
        self.start = time.monotonic()
        self.ended = self.kept = self.new = self.failed = 0

    def missing(self) -> Iterator[list[PromptLine]]:
        """Whole chunks with unfinished lines: batches must not depend on what is done already."""
        for chunk in self.prompts.chunks(self.chunk):
            done = sum(self.run_log.has(line) for line in chunk)
            self.kept += done
            self.ended += done
            if done < len(chunk):
                yield chunk

    def take(self, chunk: list[PromptLine], result: Any) -> Iterator[events.Note]:
        """Put a chunk's result into the run log; raises errors that every other line would meet, too."""
        if isinstance(result, WorkerLost):
            (line,) = chunk
            record = {"line": line.number, "id": line.id, "asked": line.digest, "error": failure(result)}
            result = ChunkResult([record], 0, self.run_log.fingerprint)
        elif isinstance(result, Exception):
            raise result
        new = [r for r, line in zip(result.records, chunk, strict=True) if not self.run_log.has(line)]
        self.run_log.add(new, result.fingerprint)
        self.ended += len(new)
        self.new += result.new
        for record in new:
            if "error" in record:
                self.failed += 1
                if self.failed <= MAX_REPORTED:
                    yield events.Note(f"line {record['line']}: {record['error']['message']}", warning=True)

    def info(self) -> str:
        rate = self.new / max(time.monotonic() - self.start, 1e-9)
        return f"{rate:.2f} images/s" + (f", {self.failed} failed" if self.failed else "")

    def facts(self, lines: int) -> dict[str, Any]:
        return {
            "lines": lines, "kept": self.kept, "painted": self.new, "failed": self.failed,
            "seconds": round(time.monotonic() - self.start, 2),
        }  # fmt: skip
