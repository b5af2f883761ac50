"""The stages by name, in the order they need each other, and the one verb that runs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec

from tools.tiny_training.job import Job

from minikin import events
from minikin.errors import UnknownName, extra
from minikin.files import lock, sweep_orphans

# name: module with `stage(job)`, a generator of events
STAGES = {
    "pictures": "tools.tiny_training.images",
    "autoencoder": "tools.tiny_training.autoencoder",
    "tokenizer": "tools.tiny_training.tokenizer",
    "text": "tools.tiny_training.text",
    "latents": "tools.tiny_training.latents",
    "unet": "tools.tiny_training.unet",
    "export": "tools.tiny_training.export",
    "adapters": "tools.tiny_training.adapters",
    "judge": "tools.tiny_training.dual_encoder",
    "classifier": "tools.tiny_training.classifier",
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
