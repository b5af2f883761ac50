"""The stages by name, in the order they need each other, and the one verb that runs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec

from minikin import events
from minikin.errors import UnknownName, extra
from minikin.files import lock, sweep_orphans
from minikin.tiny.build.job import Job

# name: module with `stage(job)`, a generator of events
STAGES = {
    "pictures": "minikin.tiny.build.pictures",
    "autoencoder": "minikin.tiny.build.autoencoder",
    "tokenizer": "minikin.tiny.build.tokenizer",
    "text": "minikin.tiny.build.text",
    "latents": "minikin.tiny.build.latents",
    "unet": "minikin.tiny.build.unet",
    "export": "minikin.tiny.build.export",
    "adapters": "minikin.tiny.build.adapters",
    "judge": "minikin.tiny.build.judge",
    "classifier": "minikin.tiny.build.classifier",
}


def chosen(names: Sequence[str]) -> list[str]:
    """The stages asked for in their order; all of them when none is named. Raises UnknownName."""
    for name in names:
        if name not in STAGES:
            raise UnknownName("stage", name, STAGES)
    return [s for s in STAGES if s in names or not names]


def run(job: Job, names: Sequence[str] = ()) -> Iterator[events.Event]:
    """Run stages one after the other; each goes on where it stopped. The last event is Done.

    Raises Busy when another process builds there, and whatever a stage raises.
    """
    import time

    started = time.monotonic()
    if find_spec("matplotlib") is None:
        yield events.Note(f"No learning curves: matplotlib is not installed; {extra('build')} brings it.", True)
    with lock(job.out / ".lock", f"the build in {job.out}"):
        for folder in (p for p in job.out.rglob("*") if p.is_dir()):
            sweep_orphans(folder)
        for name in chosen(names):
            yield from import_module(STAGES[name]).stage(job)
    yield events.Done(job.model, {"seconds": round(time.monotonic() - started, 1)})
