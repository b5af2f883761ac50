"""`minikin fleet teach`: teach a CSV of concepts, each as one task of a cluster.

    for event in teach(rows(table, {}), out, Cluster(workers=8)): ...

A concept file that exists and was taught from the same photos with the same settings is kept. A task whose
worker died resumes from its checkpoint, at most 25 steps back. A concept that cannot be taught is an error in
results.csv and does not stop the others.
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
from minikin.cluster.pool import Cluster, run_locally, run_tasks
from minikin.cluster.prompts import failure
from minikin.cluster.teach_worker import Task
from minikin.errors import MinikinError, StorageError
from minikin.images.encode import save_image
from minikin.images.sheet import contact_sheet
from minikin.perfusion.concept_file import load
from minikin.training.signals import interruptible

MAX_SUBMITTED = 1000  # tasks at once, so that an autoscaling cluster sees how much work there is
MAX_REPORTED = 5
ON_SHEET = 400  # concepts on one contact sheet
COLUMNS = ("name", "category", "status", "file", "bytes", "sha256", "steps", "best_step", "seconds", "resumed",
           "error")  # fmt: skip


def teach(rows: Sequence[Row], out: Path, cluster: Cluster | None) -> Iterator[events.Event]:
    """Teach all concepts; the last event is Done with the path of results.csv.

    cluster  None for this process
    Ctrl-C writes the results so far and ends with KeyboardInterrupt. Raises StorageError, Busy.
    """
    start = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(files.lock(out / ".lock", str(out)))
        files.sweep_orphans(out)
        out = out.resolve()
        tasks = [Task(row, out) for row in rows]
        results: dict[str, dict[str, Any]] = {}
        for task in tasks:
            if state := task.done():
                results[task.row.recipe.name] = {**state, "status": "kept"}
        todo = [task for task in tasks if task.row.recipe.name not in results]
        n_kept = len(results)
        stop = stack.enter_context(interruptible())
        stack.callback(_write, out, tasks, results)
        if todo:
            yield events.Note(f"{len(todo)} concepts to teach, {n_kept} exist already.")
            for ended, state in _results(stack, todo, cluster, stop.is_set):
                if ended is None:
                    continue
                name = ended.row.recipe.name
                results[name] = _result(state)
                failed = _failed(results)
                if "error" in state and failed <= MAX_REPORTED:
                    yield events.Note(f"{name}: {state['error']['message']}", warning=True)
                yield events.Progress(
                    "concepts", len(results), len(tasks), f"{failed} failed" if failed else ""
                )
        if stop.is_set():
            yield events.Note(f"Stopped; {len(results)} of {len(tasks)} are done. The same command resumes.")
            raise KeyboardInterrupt
        sheet = _sheet(out, tasks, results)
        facts = {
            "concepts": len(tasks), "kept": n_kept, "taught": len(tasks) - n_kept - _failed(results),
            "failed": _failed(results), "seconds": round(time.monotonic() - start, 2), "sheet": sheet,
        }  # fmt: skip
    yield events.Done(out / "results.csv", facts)


def _results(
    stack: ExitStack, todo: Sequence[Task], cluster: Cluster | None, stopped: Any
) -> Iterator[tuple[Task | None, Any]]:
    if cluster is None:
        results = run_locally(_LocalTeacher(), iter(todo), stopped)
    else:
        ray = stack.enter_context(cluster.joined())
        most = cluster.workers or MAX_SUBMITTED
        results = run_tasks(ray, teach_worker.teach, iter(todo), cluster.share(ray), most, stopped)
    for task, state in results:
        if isinstance(state, StorageError):
            raise state
        yield task, {"error": failure(state)} if isinstance(state, Exception) else state


class _LocalTeacher:
    def work(self, task: Task) -> dict[str, Any]:
        return teach_worker.teach(task)


def _result(state: dict[str, Any]) -> dict[str, Any]:
    if "error" in state:
        return {"status": "failed", "error": state["error"]["message"]}
    return {**state, "status": "taught"}


def _failed(results: dict[str, dict[str, Any]]) -> int:
    return sum(result["status"] == "failed" for result in results.values())


def _write(out: Path, tasks: Sequence[Task], results: dict[str, dict[str, Any]]) -> None:
    """Write results.csv, in the order of the table."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for task in tasks:
        result = results.get(task.row.recipe.name, {"status": "open"})
        file_cell = {"file": task.file.name} if result["status"] in ("taught", "kept") else {}
        table.writerow(
            {"name": task.row.recipe.name, "category": task.row.recipe.category, **file_cell, **result}
        )
    files.atomic_write(out / "results.csv", text.getvalue().encode())


def _sheet(out: Path, tasks: Sequence[Task], results: dict[str, dict[str, Any]]) -> str | None:
    """A contact sheet of the previews inside the concepts; None when there are none."""
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
