"""Sweep: find a concept's operating points by successive halving over a grid of settings.

    OUT/cache.jsonl       scores of every cell; the same command goes on from here
    OUT/images/           thumbnails of the last round
    OUT/PRESET.json       what was measured
    OUT/PRESET.png .html  the Pareto front, as a drawing and as a page

Equal images, encoder and photos give equal files, however often the run was interrupted.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minikin.errors import BadRecipe
from minikin.evaluation.cache import key
from minikin.evaluation.encoders import Encoder
from minikin.evaluation.experiment import BATCH, Cell, Evaluator, Experiment, Painter, check
from minikin.evaluation.prompts import prompt_templates
from minikin.evaluation.scores import ImageScores, References, open_references, plain, prompt_fidelity_metric
from minikin.evaluation.sweep.grid import GridPoint, duration, grid, sample
from minikin.evaluation.sweep.points import Selection, operating_point, select
from minikin.evaluation.sweep.report import SweepReport
from minikin.evaluation.sweep.search import FIRST, SearchResult, max_images, search
from minikin.events import Done, Event, Note
from minikin.generation.request import ImageRequest
from minikin.models.base import Base
from minikin.perfusion import operating_points
from minikin.perfusion.concept import Concept
from minikin.recipes import ConceptSettings, Paint, Sweep

FRESH = 1_000_003  # offset of the last round's seeds


@dataclass(frozen=True)
class SweepTask:
    """A concept, a preset, an encoder and the photos to sweep with.

    dependencies  hashes of the concept, the base and its adapters, and whatever else the images depend on
    embedded      guidance is an input of the U-Net (full LCM)
    """

    recipe: Sweep
    concept: Concept
    request: ImageRequest
    dependencies: dict[str, Any]
    encoder: Encoder
    references: References
    embedded: bool = False

    @property
    def preset(self) -> str:
        """Key under which the points are stored in the concept file."""
        return operating_points.key(self.request.preset.name, self.request.steps, self.request.preset.steps)

    @property
    def metric(self) -> str:
        return prompt_fidelity_metric(self.encoder)

    @cached_property
    def prompts(self) -> list[str]:
        """With <name> in place of the subject."""
        name = f"<{self.concept.name}>"
        return [t.replace("{}", name) for t in prompt_templates(self.recipe, self.concept.category)]

    @property
    def fresh_seeds(self) -> tuple[int, ...]:
        first = self.recipe.seed + FRESH
        return tuple(range(first, first + self.recipe.seeds))

    def cell(self, point: GridPoint, index: int, seeds: tuple[int, ...]) -> Cell:
        """Images of a grid point and a prompt."""
        recipe: Paint = Paint.make(
            prompt=self.prompts[index],
            base=self.recipe.base,
            preset=self.recipe.preset,
            steps=self.recipe.steps,
            guidance=point.guidance,
            interval=point.interval,
            n=len(seeds),
            batch=min(len(seeds), BATCH),
            seed=seeds[0],
            points={
                self.concept.name: ConceptSettings(
                    strength=point.strength, tau=point.tau, concept_start=point.concept_start
                )
            },
        )
        return Cell(recipe, self.dependencies)


def open_task(
    recipe: Sweep,
    concept: Concept,
    base: Base,
    request: ImageRequest,
    facts: Mapping[str, Any],
    encoder: Encoder | None = None,
) -> SweepTask:
    """Open the encoder and the photos.

    facts    of an image of this concept (`Studio.facts`)
    encoder  an opened one; by the recipe's name otherwise
    Raises BadRecipe without photos or for an encoder that does not know the base's images, BadPhoto, and what
    `open_encoder` raises.
    """
    if recipe.photos is None:
        raise BadRecipe(
            f"There are no photos of '{concept.name}' to compare with; a concept file holds none. Give "
            "the folder it was taught from: --photos FOLDER."
        )
    encoder, _, references = open_references(recipe.encoder, base, recipe.photos, encoder, recipe.device)
    dependencies = {
        "concept": facts["concepts"][concept.name]["sha256"], "base": facts["base"]["fingerprint"],
        "preset": facts["preset"], "steps": request.steps, "sampler": facts["sampler"],
        "size": [request.recipe.width, request.recipe.height], "adapters": facts["adapters"],
        "dtype": str(base.dtype).removeprefix("torch."),
    }  # fmt: skip
    return SweepTask(recipe, concept, request, dependencies, encoder, references, request.preset.embedded)


def sweep(task: SweepTask, out: Path, paint: Painter) -> Generator[Event, None, None]:
    """Search and write; the last event is Done with the operating points, {name: Point}.

    paint   images of a recipe, in the order of its seeds
    Raises BadRecipe, StorageError. Scores and images so far are kept however it ends.
    """
    check(task.encoder)
    recipe, concept = task.recipe, task.concept
    experiment = Experiment(out, lambda results, strength: nullcontext(paint), thumbnails=True)
    plain_prompts = [plain(p, {concept.name: concept.category}) for p in task.prompts]
    evaluator = Evaluator(task.encoder, task.references, plain_prompts)

    def evaluate(point: GridPoint, index: int, seeds: tuple[int, ...]) -> Sequence[ImageScores]:
        cell = task.cell(point, index, seeds)
        return experiment.scores(cell, evaluator, store=seeds == task.fresh_seeds)

    points = grid(recipe, concept, task.request, task.embedded)
    first_round = [task.cell(points[0], i, (recipe.seed,)) for i in (0, len(task.prompts) // FIRST)]
    seconds = experiment.seconds_per_image(
        key(task.dependencies), first_round, lambda cell: experiment.scores(cell, evaluator)
    )
    points, note = _affordable(recipe, points, seconds)
    n = max_images(len(points), recipe.prompts, recipe.seeds)
    yield Note(
        f"{len(points)} settings{note}; at most {n:,} images of {seconds:.2f} s "
        f"({task.request.steps} steps): {duration(n * seconds / 60)}. {len(experiment.cache)} sets of images "
        f"are in {experiment.cache.path} already. Ctrl-C keeps what is done; the same command goes on."
    )
    result = yield from search(
        points,
        evaluate,
        prompts=recipe.prompts,
        seed=recipe.seed,
        fresh=task.fresh_seeds,
        metric=task.metric,
        encoder=task.encoder.name,
    )
    selection = select(result.last)
    _report(task, experiment, result, selection).write(out, task.preset)
    stored_as = f"{task.encoder.card.name} {task.encoder.card.digest}"
    yield Done(
        {name: operating_point(result.last[i], stored_as) for name, i in selection.points.items()},
        {
            "preset": task.preset,
            "out": str(out),
            "settings": result.tried,
            "hypervolume": selection.hypervolume,
        },
    )


def _report(task: SweepTask, experiment: Experiment, result: SearchResult, selection: Selection) -> SweepReport:
    """Scores and images of the last round's settings, with what they depend on."""
    recipe, concept = task.recipe, task.concept
    facts = {
        "concept": {"name": concept.name, "category": concept.category}, "base": recipe.base,
        "preset": task.preset, "steps": task.request.steps, "dependencies": task.dependencies,
        "encoder": asdict(task.encoder.card), "photos": len(task.references.photos), "prompts": task.prompts,
        "seeds": list(task.fresh_seeds),
    }  # fmt: skip
    images = [
        [p for i in range(recipe.prompts) for p in experiment.paths(task.cell(r.point, i, task.fresh_seeds))]
        for r in result.last
    ]
    title = f"{concept.name} on {recipe.base}, preset {task.preset}"
    return SweepReport(title, facts, result, selection, task.metric, task.references.upper_bound, images)


def _affordable(
    recipe: Sweep, points: tuple[GridPoint, ...], seconds: float
) -> tuple[tuple[GridPoint, ...], str]:
    """As many grid points as the budget allows, and a note on it."""
    if recipe.budget_minutes is None:
        return points, ""

    def minutes(n: int) -> float:
        return max_images(n, recipe.prompts, recipe.seeds) * seconds / 60

    n = max((n for n in range(2, len(points) + 1) if minutes(n) <= recipe.budget_minutes), default=0)
    if not n:
        raise BadRecipe(
            f"{recipe.budget_minutes:g} minutes are too few: two settings alone take {duration(minutes(2))}. "
            "Give more, or fewer --prompts and --seeds."
        )
    if n == len(points):
        return points, ""
    return sample(points, n, recipe.seed), f" of {len(points)}, drawn to stay in the budget"
