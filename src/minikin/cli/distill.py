"""The command distill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minikin import events, files
from minikin.cli import display
from minikin.recipes import Distill
from minikin.studio import Studio
from minikin.training.distributed import launcher_ranks


def start(
    recipe: Distill, out: Path, *, workers: int, address: str | None, resume: bool, as_json: bool
) -> None:  # fmt: skip
    """Distil in this process, in several processes of this machine, or on a Ray cluster."""
    if address is None and workers == 1:
        run(recipe, out, resume=resume, as_json=as_json)
    elif address is None:
        raise SystemExit(_launch(workers))
    else:
        from minikin.cluster.distill import distill
        from minikin.cluster.pool import Cluster

        # workers have a current folder of their own
        paths = {k: str(Path(v).resolve()) for k in ("data", "concepts", "start")
                 if (v := getattr(recipe, k)) and Path(v).exists()}  # fmt: skip
        recipe = recipe.model_copy(update=paths)
        with files.lock(out / ".lock", str(out)):
            work = distill(recipe, out.resolve(), Cluster(workers, address), resume=resume)
            done = display.run(work, as_json=as_json)
        _report(done, out, recipe, as_json)


def _launch(workers: int) -> int:
    """Run this command in several processes by torch.distributed.run; returns the exit code.

    `accelerate launch` starts one process on CPUs, whatever --num_processes says. The launcher runs in a
    session of its own, so that each process gets Ctrl-C once: a second one would stop it before it saves.
    """
    arguments, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word != "--workers" and not word.startswith("--workers="):
            arguments.append(word)
        skip = word == "--workers"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers))
    process = subprocess.Popen([sys.executable, *launcher, "-m", "minikin", *arguments], start_new_session=True)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)


def run(recipe: Distill, out: Path, *, resume: bool, as_json: bool) -> None:
    """Distil into the folder. Of several processes only the first prints and holds the lock."""
    rank, local = launcher_ranks()
    with _lock(out, rank):
        studio = Studio.open(recipe.base, device=recipe.device or _device_of_rank(local), dtype=recipe.dtype)
        work = studio.distilling(recipe, out, resume=resume)
        if rank:
            for _ in work:
                pass
            return
        done = display.run(work, as_json=as_json)
    _report(done, out, recipe, as_json)


@contextmanager
def _lock(out: Path, rank: int) -> Iterator[None]:
    if rank:
        yield
        return
    with files.lock(out / ".lock", str(out)):
        yield


def _device_of_rank(local: int) -> str | None:
    """The GPU of this process when a launcher started several; None for the usual choice."""
    if "LOCAL_RANK" not in os.environ:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def _report(done: events.Done, out: Path, recipe: Distill, as_json: bool) -> None:
    facts = {"event": "done", "result": str(done.result), "out": str(out), **done.facts}
    if as_json:
        display.emit(facts)
        return
    display.out.print(
        f"{done.result}  {facts['steps']} steps, {facts['seen']:,} examples seen in {facts['seconds']:.0f} s\n"
        f"log, curve and samples: {out}/",
        soft_wrap=True,
    )
    name = f"my-{recipe.method}"
    if done.result.suffix != ".safetensors":
        how = f'"a photo of a cat" --base {name}'
    elif recipe.base == "tiny":  # the name under which its preset looks for it first
        name, how = f"{recipe.method}-tiny", f'"a photo of a cat" --preset {recipe.method}'
    else:
        how = f'"a photo of a cat <lora:{name}>" --base {recipe.base}'
    display.out.print(
        f"try: minikin models add {done.result} --name {name}\n     minikin paint {how}",
        soft_wrap=True,
    )  # fmt: skip
