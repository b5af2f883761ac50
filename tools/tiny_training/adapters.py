"""Stage `adapters`: few-step LoRAs of the exported model, one for each preset of tiny.

The files go to OUT/adapters/PRESET.safetensors; tiny's are in src/minikin/tiny/adapters, where the presets
find them. Each method runs `minikin distill` in a folder of its own, on scenes of the world. Then `lcm-lora`
is trained further, and `lcm` is trained only, on captions that name in-domain concepts
(in_domain_concepts.py), so that these students follow concepts.
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
    """Distil by every method of the recipe; finished runs are skipped."""
    base = open_base(str(job.need(job.model, "export")), device=job.device)
    recipe = job.recipe.adapters
    if recipe.with_concepts:
        yield from in_domain_concepts.make(
            base,
            _things(job),
            job.recipe.world,
            things=recipe.things,
            steps=recipe.things_steps,
            captions=recipe.captions,
        )
    for method in recipe.batch:
        result: Path | None = None
        for with_concepts in (False, True):
            if method in (recipe.with_concepts if with_concepts else recipe.steps):
                result = yield from _distilled(job, base, method, with_concepts)
        if result is None:
            continue
        target = atomic_write(_file(job, method), result.read_bytes())
        yield events.Note(f"{STAGE}: {target} ({target.stat().st_size / 1e6:.1f} MB)")


def _distilled(job: Job, base: Base, method: str, with_concepts: bool) -> Generator[events.Event, None, Path]:
    """Run or resume one distillation in its folder; returns the LoRA's path."""
    out, result = _folder(job, method, with_concepts), None
    resume = (out / "checkpoint.safetensors").exists()
    for event in distill(base, recipe_of(job, method, with_concepts), out, resume=resume):
        if isinstance(event, events.Done):
            result = event.result
        else:
            yield event
    assert isinstance(result, Path)
    return result


def recipe_of(job: Job, method: str, with_concepts: bool = False) -> Distill:
    """The recipe of one run; a budget of the build is shared equally by all runs."""
    adapters = job.recipe.adapters
    runs = len(adapters.steps) + len(adapters.with_concepts)
    options: dict[str, object] = {
        "steps": (adapters.with_concepts if with_concepts else adapters.steps)[method]
    }
    if STAGE in job.steps:
        options = {"steps": max(1, job.steps[STAGE] // runs)}
    elif STAGE in job.minutes:
        options = {"minutes": job.minutes[STAGE] / runs}
    if with_concepts and method in adapters.steps:
        options["start"] = str(_folder(job, method, False) / LORA_NAME)
    elif method in adapters.start:
        initial = adapters.start[method]
        initial_lora = _folder(job, initial, False) / LORA_NAME
        options["start"] = str(
            initial_lora if initial in adapters.steps and not with_concepts else _file(job, initial)
        )
    if with_concepts:
        things = _things(job)
        options |= {"data": str(things / "captions.txt"), "concepts": str(things / "concepts")}
        options |= {"teacher_steps": adapters.teacher_steps}
    else:
        options |= {"data": f"scenes:{job.recipe.world}", "count": adapters.scenes}
    recipe: Distill = Distill.make(
        method=method,
        rank=adapters.rank,
        batch=adapters.batch[method],
        save_minutes=adapters.save_minutes,
        autocast=precision.has_fast_bfloat16(torch.device(job.device)),
        **options,
    )
    return recipe


def _file(job: Job, method: str) -> Path:
    return job.out / STAGE / f"{method}.safetensors"


def _folder(job: Job, method: str, with_concepts: bool) -> Path:
    return job.folder(STAGE) / (f"{method}-named" if with_concepts else method)


def _things(job: Job) -> Path:
    return job.folder(STAGE) / "things"
