"""minikin distill: one call into the Studio, its lock, and what is printed at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minikin import events, files
from minikin.cli import display
from minikin.recipes import Distill
from minikin.studio import Studio
from minikin.training.ranks import here


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
        soft_wrap=True, markup=False,
    )  # fmt: skip
