"""Comparison of methods on the same photos: train, generate, score, report.

    OUT/methods/      trained results; one that exists is not trained again
    OUT/images/       every image, named by a hash of everything it depends on
    OUT/cache.jsonl   seconds of an image, for the cost
    OUT/report.html .md .json .csv

Equal images, encoder and photos give equal numbers, however often the run was interrupted. The caller supplies
training and painting.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minikin.baselines import class_images
from minikin.errors import BadRecipe
from minikin.evaluation import metrics
from minikin.evaluation.compare import methods, report
from minikin.evaluation.compare.methods import TrainedMethod, parse_methods
from minikin.evaluation.compare.results import MethodResult, StrengthResult
from minikin.evaluation.compare.samplers import Facts, SamplerConfig, sampler_configs
from minikin.evaluation.compare.variants import variant
from minikin.evaluation.encoders import Encoder
from minikin.evaluation.experiment import BATCH, Activate, Cell, Experiment, check, open_images
from minikin.evaluation.prompts import PLACES, prompt_templates
from minikin.evaluation.scores import References, open_references, plain, prompt_fidelity_metric, score
from minikin.evaluation.sweep.grid import duration
from minikin.evaluation.two_subjects import TwoSubjectScores, two_subject_scores
from minikin.events import Done, Event, Note
from minikin.images.photos import Photo
from minikin.models.base import Base
from minikin.perfusion.concept import check_category, check_name
from minikin.recipes import SECOND_NAME, Compare, Paint, Teach

Train = Callable[[str, Compare], Generator[Event, None, TrainedMethod]]  # a method by its name
TwoSubjects = tuple[TwoSubjectScores | None, list[Path]]


@dataclass(frozen=True)
class CompareTask:
    """Methods, samplers, encoder and photos of a comparison.

    skipped            a sentence for each number of steps that no preset here is for
    second_references  of a second subject's photos, for the two-subject test
    """

    recipe: Compare
    methods: tuple[str, ...]
    base: Base
    photos: Sequence[Photo]
    samplers: tuple[SamplerConfig, ...]
    skipped: tuple[str, ...]
    encoder: Encoder
    references: References
    second_references: References | None = None
    second_photos: Sequence[Photo] = ()

    @property
    def metric(self) -> str:
        return prompt_fidelity_metric(self.encoder)

    @property
    def prompts(self) -> list[str]:
        """With <name> in place of the subject."""
        name = f"<{self.recipe.name}>"
        return [t.replace("{}", name) for t in prompt_templates(self.recipe, self.recipe.category)]

    @property
    def plain_prompt(self) -> str:
        """Prompt of the images that drift is measured on."""
        return class_images.prompt(self.recipe.category)

    @property
    def second_recipe(self) -> Compare:
        """Recipe for training on the second subject."""
        r = self.recipe
        return r.model_copy(update={"name": SECOND_NAME, "category": r.beside_category})

    def two_subject_prompts(self, regions: bool = False) -> list[tuple[str, str]]:
        """Prompts of both subjects, with their names and with their categories, if there is a second one."""
        r = self.recipe
        if self.second_references is None:
            return []
        names = [
            f"<{n}@{side}>" if regions else f"<{n}>" for n, side in ((r.name, "left"), (SECOND_NAME, "right"))
        ]
        categories = [f"a {c}" for c in (r.category, r.beside_category)]
        both = [f"{a} to the left of {b}" for a, b in (names, categories)]
        return [(f"a photo of {both[0]} {s}", f"a photo of {both[1]} {s}") for s in PLACES[: r.prompts]]

    def cell(
        self, sampler: SamplerConfig, prompt: str, n: int, strength: float = 0.0, *results: TrainedMethod
    ) -> Cell:
        """n images of a prompt; without results, of the plain base."""
        changes = dict(variant(results[0].method).generation) if results else {}
        recipe: Paint = Paint.make(
            prompt=prompt,
            base=self.recipe.base,
            preset=sampler.preset,
            steps=sampler.steps,
            n=n,
            batch=min(n, BATCH),
            seed=self.recipe.seed,
            points={},
            **changes,
        )
        dependencies = [str(self.base.dtype), sampler.dependencies, strength, [r.digest for r in results]]
        return Cell(recipe, dependencies, results, strength, f"strength {strength:g}, {sampler}")

    def plain_cell(self, sampler: SamplerConfig, *results: TrainedMethod) -> Cell:
        """Images of the plain category, of the base alone or with a method active at strength 1."""
        return self.cell(sampler, self.plain_prompt, self.recipe.plain, 1.0 if results else 0.0, *results)

    def strength_cells(self, sampler: SamplerConfig, trained: TrainedMethod, strength: float) -> list[Cell]:
        return [self.cell(sampler, p, self.recipe.seeds, strength, trained) for p in self.prompts]


def open_task(
    recipe: Compare,
    base: Base,
    presets: Sequence[Mapping[str, Any]],
    facts: Facts,
    encoder: Encoder | None = None,
) -> CompareTask:
    """Open the encoder and the photos, and choose the samplers.

    presets  of the base (`Studio.presets`)
    encoder  an opened one; by the recipe's name otherwise
    Raises UnknownName, BadRecipe, BadPhoto, and what `open_encoder` raises.
    """
    selected = parse_methods(recipe.methods)
    check_name(recipe.name)
    check_category(recipe.category)
    prompt_templates(recipe, recipe.category)  # raises here what is wrong with them, not after training
    encoder, photos, references = open_references(recipe.encoder, base, recipe.photos, encoder, recipe.device)
    samplers, skipped = sampler_configs(recipe, presets, facts)
    if not samplers:
        raise BadRecipe(f"There is nothing to generate: {' '.join(skipped)} Choose other --steps.")
    second_photos: list[Photo] = []
    second_references = None
    if recipe.beside and recipe.beside_category:
        check_category(recipe.beside_category)
        _, second_photos, second_references = open_references(
            recipe.encoder, base, recipe.beside, encoder, recipe.device
        )
    return CompareTask(
        recipe, selected, base, photos, samplers, skipped, encoder, references, second_references, second_photos
    )


def compare(task: CompareTask, out: Path, train: Train, activate: Activate) -> Generator[Event, None, None]:
    """Train, generate, score and write; the last event is Done with the path of the page.

    train     a method, or reads its stored result
    activate  a painter with results active; with none, of the plain base
    Raises BadRecipe, StorageError, and what training and painting raise. Results and images so far are kept
    however it ends.
    """
    check(task.encoder)
    experiment = Experiment(out, activate)
    yield _cost(task)
    minutes = 0.0
    for sampler in task.samplers:
        cell = task.plain_cell(sampler)
        seconds = experiment.seconds_per_image(
            cell.key, [cell], lambda cell: list(experiment.generate([cell], "images of the plain base"))
        )
        minutes += seconds * _images_per_sampler(task) / 60
    yield Note(f"Images take {duration(minutes)} at most; training comes on top of it.")
    table: list[tuple[TrainedMethod, list[MethodResult]]] = []
    for method in task.methods:
        trained = yield from train(method, task.recipe)
        cells = [
            cell
            for sampler in task.samplers
            for cell in (
                task.plain_cell(sampler),
                task.plain_cell(sampler, trained),
                *(
                    c
                    for s in methods.strengths(method, task.recipe)
                    for c in task.strength_cells(sampler, trained, s)
                ),
            )
        ]
        yield from experiment.generate(cells, f"images by {method}")
        two_subjects = yield from _two_subjects(task, experiment, trained, train)
        results = [
            _result(task, experiment, trained, sampler, both)
            for sampler, both in zip(task.samplers, two_subjects, strict=True)
        ]
        table.append((trained, results))
    page = report.write(task, table, out)
    yield Done(page, {"out": str(out), "methods": list(task.methods), "report": str(page)})


def _cost(task: CompareTask) -> Note:
    """Numbers of images and of training steps, before anything is done."""
    tiny, steps = task.base.architecture == "tiny", []
    for method in task.methods:
        training = methods.training_recipe(method, task.recipe, tiny)
        most = f"at most {training.max_steps}" if isinstance(training, Teach) else ""
        steps.append(f"{method} {training.steps or most}")
    n = _images_per_sampler(task)
    return Note(
        f"{len(task.methods)} methods in {', '.join(str(s) for s in task.samplers)}: "
        f"{n * len(task.samplers):,} images, {n:,} of each. Training steps: {', '.join(steps)}. "
        f"{' '.join((*task.skipped, ''))}Ctrl-C keeps what is done; the same command goes on."
    )


def _images_per_sampler(task: CompareTask) -> int:
    r = task.recipe
    points = sum(len(methods.strengths(m, r)) for m in task.methods)
    pairs = len(task.two_subject_prompts()) * r.seeds * (1 + len(task.methods))
    return r.plain * (1 + len(task.methods)) + points * r.prompts * r.seeds + pairs


def _two_subjects(
    task: CompareTask, experiment: Experiment, trained: TrainedMethod, train: Train
) -> Generator[Event, None, list[TwoSubjects]]:
    """Two-subject test with each sampler: train on the second subject, generate both in one image, score."""
    if task.second_references is None:
        return [(None, []) for _ in task.samplers]
    seeds = task.recipe.seeds
    results: list[TwoSubjects] = []
    second = yield from train(trained.method, task.second_recipe)
    prompts = task.two_subject_prompts(variant(trained.method).regions)
    photos = (task.references.photos, task.second_references.photos)
    for sampler in task.samplers:
        with_both = [task.cell(sampler, p, seeds, 1.0, trained, second) for p, _ in prompts]
        without = [task.cell(sampler, p, seeds) for _, p in prompts]
        yield from experiment.generate(without, "pairs on the plain base")
        yield from experiment.generate(with_both, f"pairs by {trained.method}")
        paths, plain_paths = ([p for c in cells for p in experiment.paths(c)] for cells in (with_both, without))
        plain_prompts = [p for _, p in prompts for _ in range(seeds)]
        images, plain_images = open_images(paths), open_images(plain_paths)
        results.append((two_subject_scores(task.encoder, images, plain_images, photos, plain_prompts), paths))
    return results


def _result(
    task: CompareTask, experiment: Experiment, trained: TrainedMethod, sampler: SamplerConfig, both: TwoSubjects
) -> MethodResult:
    """A method's scores with one sampler, from its stored images."""
    r, encoder = task.recipe, task.encoder
    before, after = (experiment.paths(task.plain_cell(sampler, *results)) for results in ((), (trained,)))
    images, changed = open_images(before), open_images(after)
    drift = metrics.drift(encoder.encode_images(images), encoder.encode_images(changed))
    drift_free = all(a.tobytes() == b.tobytes() for a, b in zip(images, changed, strict=True))
    plain_prompts = [plain(p, {r.name: r.category}) for p in task.prompts for _ in range(r.seeds)]
    strengths = []
    for strength in methods.strengths(trained.method, r):
        cells = task.strength_cells(sampler, trained, strength)
        paths = [path for cell in cells for path in experiment.paths(cell)]
        scores = score(encoder, open_images(paths), plain_prompts, task.references)
        strengths.append(StrengthResult(strength, scores, paths))
    return MethodResult(str(sampler), drift, drift_free, strengths, task.metric, before, after, *both)
