"""`minikin fleet teach`: a CSV of concepts to concept files, each in a worker of its own.

    for event in teach(rows(manifest, {}), out, Cluster(workers=8)): ...

A concept that is there and was taught from the same photos with the same settings is kept. One whose worker
died goes on from its checkpoint, at most 25 steps back. What cannot be taught is a sentence in results.csv
and keeps nobody else from being taught.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from PIL import Image

from minikin import events, files
from minikin.cluster import teach_worker
from minikin.cluster.concept_table import Row
from minikin.cluster.pool import Cluster, here, over_tasks
from minikin.cluster.prompts import failure
from minikin.cluster.teach_worker import Task
from minikin.errors import MinikinError, StorageError
from minikin.images.encode import save_image
from minikin.images.sheet import contact_sheet
from minikin.perfusion.concept_file import load
from minikin.training.signals import interruptible

AHEAD = 1000  # tasks sent at once, so that a cluster that grows with its work sees how much there is
SHOWN = 5
ON_SHEET = 400  # concepts on one contact sheet
COLUMNS = ("name", "category", "status", "file", "bytes", "sha256", "steps", "best_step", "seconds", "resumed",
           "error")  # fmt: skip


def teach(rows: Sequence[Row], out: Path, cluster: Cluster | None) -> Iterator[events.Event]:
    """Teach all; the last event is Done with the path of results.csv.

    cluster  None for this process alone
    Ctrl-C writes the results so far and ends with KeyboardInterrupt. Raises StorageError, Busy.
    """
    begun = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(files.lock(out / ".lock", str(out)))
        files.sweep_orphans(out)
        out = out.resolve()
        tasks = [Task(row, out) for row in rows]
        results: dict[str, dict[str, Any]] = {}
        for task in tasks:
            if known := task.done():
                results[task.row.recipe.name] = {**known, "status": "kept"}
        todo = [task for task in tasks if task.row.recipe.name not in results]
        kept = len(results)
        stop = stack.enter_context(interruptible())
        stack.callback(_write, out, tasks, results)
        if todo:
            yield events.Note(f"{len(todo)} concepts to teach, {kept} are there already.")
            for found, known in _answers(stack, todo, cluster, stop.is_set):
                if found is None:
                    continue
                name = found.row.recipe.name
                results[name] = _result(known)
                failed = _failed(results)
                if "error" in known and failed <= SHOWN:
                    yield events.Note(f"{name}: {known['error']['message']}", warning=True)
                yield events.Progress(
                    "concepts", len(results), len(tasks), f"{failed} failed" if failed else ""
                )
        if stop.is_set():
            yield events.Note(f"Stopped; {len(results)} of {len(tasks)} are done. The same command goes on.")
            raise KeyboardInterrupt
        sheet = _sheet(out, tasks, results)
        facts = {
            "concepts": len(tasks), "kept": kept, "taught": len(tasks) - kept - _failed(results),
            "failed": _failed(results), "seconds": round(time.monotonic() - begun, 2), "sheet": sheet,
        }  # fmt: skip
    yield events.Done(out / "results.csv", facts)


def _answers(
    stack: ExitStack, todo: Sequence[Task], cluster: Cluster | None, stopped: Any
) -> Iterator[tuple[Task | None, Any]]:
    if cluster is None:
        found = here(_Here(), iter(todo), stopped)
    else:
        ray = stack.enter_context(cluster.joined())
        most = cluster.workers or AHEAD
        found = over_tasks(ray, teach_worker.teach, iter(todo), cluster.share(ray), most, stopped)
    for task, known in found:
        if isinstance(known, StorageError):
            raise known
        yield task, {"error": failure(known)} if isinstance(known, Exception) else known


class _Here:
    def work(self, task: Task) -> dict[str, Any]:
        return teach_worker.teach(task)


def _result(known: dict[str, Any]) -> dict[str, Any]:
    if "error" in known:
        return {"status": "failed", "error": known["error"]["message"]}
    return {**known, "status": "taught"}


def _failed(results: dict[str, dict[str, Any]]) -> int:
    return sum(one["status"] == "failed" for one in results.values())


def _write(out: Path, tasks: Sequence[Task], results: dict[str, dict[str, Any]]) -> None:
    """results.csv, in the order of the manifest."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for task in tasks:
        one = results.get(task.row.recipe.name, {"status": "open"})
        there = {"file": task.file.name} if one["status"] in ("taught", "kept") else {}
        table.writerow({"name": task.row.recipe.name, "category": task.row.recipe.category, **there, **one})
    files.atomic_write(out / "results.csv", text.getvalue().encode())


def _sheet(out: Path, tasks: Sequence[Task], results: dict[str, dict[str, Any]]) -> str | None:
    """The concepts' own previews on one image; None when there are none."""
    images, names = [], []
    for task in tasks[:ON_SHEET]:
        if results[task.row.recipe.name]["status"] == "failed":
            continue
        try:
            preview = load(task.file).preview
        except MinikinError:
            continue
        if preview:
            images.append(Image.open(io.BytesIO(preview)).convert("RGB"))
            names.append(task.row.recipe.name)
    if not images:
        return None
    return str(save_image(contact_sheet(images, names), out / "sheet.png"))
