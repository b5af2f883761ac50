"""Stage `adapters`: the exported model distilled to few steps, one LoRA for each preset of tiny.

The files go to OUT/adapters/PRESET.safetensors; tiny's own lie in tiny/adapters, where the presets find
them. `minikin distill` does the work, each method with a folder of its own: on scenes of the world, `lcm-lora`
then, and `lcm` only, on captions that name things (`familiar`), so that they follow concepts.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import torch
from tools.tiny_training import in_domain_concepts
from tools.tiny_training.job import Job

from minikin import events
from minikin.distillation.distill import distill
from minikin.distillation.export import LORA_NAME
from minikin.files import atomic_write
from minikin.models import precision
from minikin.models.base import Base
from minikin.models.loading.registry import open_base
from minikin.recipes import Distill

STAGE = "adapters"


def stage(job: Job) -> Iterator[events.Event]:
    """Distil by every method of the recipe; a finished one is kept."""
    base = open_base(str(job.need(job.model, "export")), device=job.device)
    own = job.recipe.adapters
    if own.named:
        yield from in_domain_concepts.make(
            base, _things(job), job.recipe.world, things=own.things, steps=own.things_steps,
            captions=own.captions,
        )  # fmt: skip
    for method in own.batch:
        made: Path | None = None
        for named in (False, True):
            if method in (own.named if named else own.steps):
                made = yield from _distilled(job, base, method, named)
        if made is None:
            continue
        target = atomic_write(_file(job, method), made.read_bytes())
        yield events.Note(f"{STAGE}: {target} ({target.stat().st_size / 1e6:.1f} MB)")


def _distilled(job: Job, base: Base, method: str, named: bool) -> Generator[events.Event, None, Path]:
    """One run in a folder of its own; a finished one is kept."""
    out, made = _folder(job, method, named), None
    resume = (out / "checkpoint.safetensors").exists()
    for event in distill(base, recipe_of(job, method, named), out, resume=resume):
        if isinstance(event, events.Done):
            made = event.result
        else:
            yield event
    assert isinstance(made, Path)
    return made


def recipe_of(job: Job, method: str, named: bool = False) -> Distill:
    """The recipe of one run, with the build's budget where one was asked for (shared equally)."""
    own = job.recipe.adapters
    runs = len(own.steps) + len(own.named)
    how: dict[str, object] = {"steps": (own.named if named else own.steps)[method]}
    if STAGE in job.steps:
        how = {"steps": max(1, job.steps[STAGE] // runs)}
    elif STAGE in job.minutes:
        how = {"minutes": job.minutes[STAGE] / runs}
    if named and method in own.steps:
        how["start"] = str(_folder(job, method, False) / LORA_NAME)
    elif method in own.start:
        first = own.start[method]
        before = _folder(job, first, False) / LORA_NAME
        how["start"] = str(before if first in own.steps and not named else _file(job, first))
    if named:
        things = _things(job)
        how |= {"data": str(things / "captions.txt"), "concepts": str(things / "concepts")}
        how |= {"teacher_steps": own.teacher_steps}
    else:
        how |= {"data": f"scenes:{job.recipe.world}", "count": own.scenes}
    recipe: Distill = Distill.make(
        method=method, rank=own.rank, batch=own.batch[method], save_minutes=own.save_minutes,
        autocast=precision.quick(torch.device(job.device)), **how,
    )  # fmt: skip
    return recipe


def _file(job: Job, method: str) -> Path:
    return job.out / STAGE / f"{method}.safetensors"


def _folder(job: Job, method: str, named: bool) -> Path:
    return job.folder(STAGE) / (f"{method}-named" if named else method)


def _things(job: Job) -> Path:
    return job.folder(STAGE) / "things"
