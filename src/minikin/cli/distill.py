"""minikin distill: one call into the Studio, its lock, and what is printed at the end."""

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
from minikin.training.distributed import here


def start(
    recipe: Distill, out: Path, *, workers: int, address: str | None, resume: bool, as_json: bool
) -> None:  # fmt: skip
    """Distil in this process, in several of this machine, or on a cluster."""
    if address is None and workers == 1:
        run(recipe, out, resume=resume, as_json=as_json)
    elif address is None:
        raise SystemExit(_launched(workers))
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
        _tell(done, out, recipe, as_json)


def _launched(workers: int) -> int:
    """This command in so many processes, by PyTorch's launcher; its exit code.

    Not `accelerate launch`: on CPUs it starts one process, whatever --num_processes says. The launcher has a
    session of its own, so that Ctrl-C reaches each process once, by it: the second would not let it save.
    """
    told, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word != "--workers" and not word.startswith("--workers="):
            told.append(word)
        skip = word == "--workers"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers))
    process = subprocess.Popen([sys.executable, *launcher, "-m", "minikin", *told], start_new_session=True)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)


def run(recipe: Distill, out: Path, *, resume: bool, as_json: bool) -> None:
    """Distil into the folder. Of several processes the first alone shows anything."""
    rank, local = here()
    with _locked(out, rank):
        studio = Studio.open(recipe.base, device=recipe.device or _own_device(local), dtype=recipe.dtype)
        work = studio.distilling(recipe, out, resume=resume)
        if rank:
            for _ in work:
                pass
            return
        done = display.run(work, as_json=as_json)
    _tell(done, out, recipe, as_json)


@contextmanager
def _locked(out: Path, rank: int) -> Iterator[None]:
    if rank:
        yield
        return
    with files.lock(out / ".lock", str(out)):
        yield


def _own_device(local: int) -> str | None:
    """The card of this process, when a launcher started several."""
    if "LOCAL_RANK" not in os.environ:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def _tell(done: events.Done, out: Path, recipe: Distill, as_json: bool) -> None:
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
