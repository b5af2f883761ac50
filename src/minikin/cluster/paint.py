"""`minikin fleet paint`: a file of prompts to images named by content and a manifest.

    for event in paint(prompts, out, Cluster(workers=8), batch=4): ...

Whatever dies meanwhile, nothing is lost and nothing is made twice: workers write images under names that
follow from what was asked, the first writer wins, and this process alone writes the manifest. The same
call again goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from minikin import events, files
from minikin.cluster.paint_worker import Opening, Painted, Painter
from minikin.cluster.pool import Cluster, Crew, Lost, here
from minikin.cluster.prompts import Line, Prompts, failure
from minikin.cluster.run_log import Manifest
from minikin.errors import BadRecipe
from minikin.training.signals import interruptible

CHUNK = 16  # lines a worker is given at once
SHOWN = 5  # failures that are told one by one


def paint(
    prompts: Prompts, out: Path, cluster: Cluster | None, opening: Opening, *, batch: int = 4,
    chunk: int = CHUNK,
) -> Iterator[events.Event]:  # fmt: skip
    """Paint every line that is not done; the last event is Done with the manifest's path.

    cluster  None for this process alone
    opening  opens the engine in a worker, for example `partial(studio_engine, "sd15")`
    batch    images computed at once; chunk: lines given to a worker at once
    Ctrl-C ends it with KeyboardInterrupt; what is done is in the manifest.
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
        work = _Work(Manifest(out, run), prompts, chunk)
        stack.callback(work.manifest.close)
        stop = stack.enter_context(interruptible())
        factory = partial(Painter, opening, out.resolve(), batch)
        if cluster is None:
            found = here(_Later(factory), work.missing(), stop.is_set)
        else:
            ray = stack.enter_context(cluster.joined())
            share, count = cluster.share(ray), cluster.count(ray)
            yield events.Note(f"{lines:,} lines, {count} workers.")
            crew = Crew(ray, factory, share, count, split=_singly)
            found = crew.answers(work.missing(), stop.is_set)
        for part, answer in found:
            if part is not None:
                yield from work.take(part, answer)
                yield events.Progress("painting", work.ended, lines, work.info())
        if work.kept == work.ended:  # nothing was new
            yield events.Progress("painting", work.ended, lines)
        if stop.is_set():
            yield events.Note(f"Stopped; {work.ended:,} of {lines:,} lines are done. The same command goes on.")
            raise KeyboardInterrupt
    yield events.Done(work.manifest.path, work.facts(lines))


def _singly(chunk: list[Line]) -> list[list[Line]]:
    """A chunk under which workers died, line by line: one of them may be why."""
    return [[line] for line in chunk] if len(chunk) > 1 else []


class _Later:
    """A worker of this process that is opened when there is work."""

    def __init__(self, factory: Callable[[], Painter]) -> None:
        self.factory = factory
        self.painter: Painter | None = None

    def work(self, chunk: list[Line]) -> Painted:
        if self.painter is None:
            self.painter = self.factory()
        return self.painter.work(chunk)


class _Work:
    """What is to be done, and what became of it."""

    def __init__(self, manifest: Manifest, prompts: Prompts, chunk: int) -> None:
        self.manifest, self.prompts, self.chunk = manifest, prompts, chunk
        self.begun = time.monotonic()
        self.ended = self.kept = self.new = self.failed = 0

    def missing(self) -> Iterator[list[Line]]:
        """Chunks of which something is not done, whole: what goes together must not depend on what is done."""
        for chunk in self.prompts.chunks(self.chunk):
            done = sum(self.manifest.has(line) for line in chunk)
            self.kept += done
            self.ended += done
            if done < len(chunk):
                yield chunk

    def take(self, chunk: list[Line], answer: Any) -> Iterator[events.Note]:
        """Put an answer into the manifest; raises what no other line would be spared."""
        if isinstance(answer, Lost):
            (line,) = chunk
            record = {"line": line.number, "id": line.id, "asked": line.asked, "error": failure(answer)}
            answer = Painted([record], 0, self.manifest.fingerprint)
        elif isinstance(answer, Exception):
            raise answer
        new = [r for r, line in zip(answer.records, chunk, strict=True) if not self.manifest.has(line)]
        self.manifest.add(new, answer.fingerprint)
        self.ended += len(new)
        self.new += answer.new
        for record in new:
            if "error" in record:
                self.failed += 1
                if self.failed <= SHOWN:
                    yield events.Note(f"line {record['line']}: {record['error']['message']}", warning=True)

    def info(self) -> str:
        rate = self.new / max(time.monotonic() - self.begun, 1e-9)
        return f"{rate:.2f} images/s" + (f", {self.failed} failed" if self.failed else "")

    def facts(self, lines: int) -> dict[str, Any]:
        return {
            "lines": lines, "kept": self.kept, "painted": self.new, "failed": self.failed,
            "seconds": round(time.monotonic() - self.begun, 2),
        }  # fmt: skip
