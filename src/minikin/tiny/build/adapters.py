"""Stage `adapters`: the exported model distilled to few steps, one LoRA for each preset of tiny.

The files go to OUT/adapters/PRESET.safetensors; tiny's own lie in tiny/adapters, where the presets find
them. `minikin distill` does the work, on scenes of the world, each method with a folder of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from minikin import events
from minikin.bases.opening.registry import open_base
from minikin.distilling.distill import distill
from minikin.files import atomic_write
from minikin.recipes import Distill
from minikin.tiny.build.job import Job

STAGE = "adapters"


def stage(job: Job) -> Iterator[events.Event]:
    """Distil by every method of the recipe; a finished one is kept."""
    base = open_base(str(job.need(job.model, "export")), device=job.device)
    for method in job.recipe.adapters.steps:
        out = job.folder(STAGE) / method
        made: Path | None = None
        resume = (out / "checkpoint.safetensors").exists()
        for event in distill(base, recipe_of(job, method), out, resume=resume):
            if isinstance(event, events.Done):
                made = event.result
            else:
                yield event
        assert made is not None
        target = job.out / STAGE / f"{method}.safetensors"
        atomic_write(target, made.read_bytes())
        yield events.Note(f"{STAGE}: {target} ({target.stat().st_size / 1e6:.1f} MB)")


def recipe_of(job: Job, method: str) -> Distill:
    """The recipe of one method, with the build's budget where one was asked for (shared equally)."""
    own = job.recipe.adapters
    budget: dict[str, object] = {"steps": own.steps[method]}
    if STAGE in job.steps:
        budget = {"steps": max(1, job.steps[STAGE] // len(own.steps))}
    elif STAGE in job.minutes:
        budget = {"minutes": job.minutes[STAGE] / len(own.steps)}
    recipe: Distill = Distill.make(
        method=method, data=f"scenes:{job.recipe.world}", rank=own.rank, batch=own.batch, count=own.scenes,
        autocast=True, save_minutes=own.save_minutes, **budget,
    )  # fmt: skip
    return recipe
