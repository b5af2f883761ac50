"""Registry of stages in the order of their dependencies, and `run`, which runs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec

from tools.tiny_training.job import FORMER_NAMES, Job, canonical

from minikin import events
from minikin.errors import UnknownName, extra
from minikin.files import lock, sweep_orphans

# name: module with `stage(job)`, a generator of events
STAGES = {
    "images": "tools.tiny_training.images",
    "autoencoder": "tools.tiny_training.autoencoder",
    "tokenizer": "tools.tiny_training.tokenizer",
    "text": "tools.tiny_training.text",
    "latents": "tools.tiny_training.latents",
    "unet": "tools.tiny_training.unet",
    "export": "tools.tiny_training.export",
    "adapters": "tools.tiny_training.adapters",
    "dual-encoder": "tools.tiny_training.dual_encoder",
    "classifier": "tools.tiny_training.classifier",
}


def chosen(names: Sequence[str]) -> list[str]:
    """The stages with these names, in order; all stages when there are no names. Raises UnknownName."""
    names = [canonical(name) for name in names]
    for name in names:
        if name not in STAGES:
            raise UnknownName("stage", name, STAGES)
    return [s for s in STAGES if s in names or not names]


def run(job: Job, names: Sequence[str] = ()) -> Iterator[events.Event]:
    """Run stages one after the other; each resumes where it stopped. The last event is Done.

    Raises Busy when another process works in the folder, and the errors of the stages.
    """
    import time

    started = time.monotonic()
    if find_spec("matplotlib") is None:
        yield events.Note(f"No learning curves: matplotlib is not installed; {extra('build')} brings it.", True)
    with lock(job.out / ".lock", f"the build in {job.out}"):
        for former, name in FORMER_NAMES.items():  # folders of builds by version 0.1
            if (job.out / former).exists() and not (job.out / name).exists():
                (job.out / former).rename(job.out / name)
        for folder in (p for p in job.out.rglob("*") if p.is_dir()):
            sweep_orphans(folder)
        for name in chosen(names):
            yield from import_module(STAGES[name]).stage(job)
    yield events.Done(job.model, {"seconds": round(time.monotonic() - started, 1)})
