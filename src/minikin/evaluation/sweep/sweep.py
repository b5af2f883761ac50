"""A sweep from start to end: cost, search, operating points, and what is written.

    OUT/cache.jsonl       everything seen so far; the same command goes on from here
    OUT/pictures/         the images of the last round
    OUT/PRESET.json       what was measured
    OUT/PRESET.png .html  the front, to look at

The same images, judge and photos give the same files, however often the run was interrupted. Who
paints and who judges is the caller's choice.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from minikin.errors import BadRecipe
from minikin.evaluation.encoders import Judge
from minikin.evaluation.scores import References, plain
from minikin.evaluation.sweep import figure, page
from minikin.evaluation.sweep.cache import Cache, Seen, key
from minikin.evaluation.sweep.points import Chosen, as_point, choose
from minikin.evaluation.sweep.search import FIRST, Found, Standing, pictures, search
from minikin.evaluation.sweep.settings import Setting, drawn, grid, texts, told
from minikin.events import Done, Event, Note
from minikin.files import atomic_write
from minikin.generation.plan import Plan
from minikin.perfusion import operating_points as operating
from minikin.perfusion.concept import Concept
from minikin.recipes import Paint, Sweep, Tuned

FRESH = 1_000_003  # how far the seeds of the last round lie from the first ones'
SIDE = 256  # px at most, of the images that are kept
BATCH = 8  # images of one prompt at once

Painter = Callable[[Paint], Sequence[Image.Image]]


@dataclass(frozen=True)
class Task:
    """What is swept, on what, judged by whom.

    target  whatever else the images depend on: hashes of the concept, the base and its adapters
    known   what the judge sees in the concept's photos
    """

    recipe: Sweep
    concept: Concept
    plan: Plan
    target: dict[str, Any]
    judge: Judge
    known: References
    embedded: bool = False

    @property
    def preset(self) -> str:
        """The name under which the points are kept."""
        return operating.key(self.plan.preset.name, self.plan.steps, self.plan.preset.steps)

    @property
    def measure(self) -> str:
        """tiny's own judge takes an unusual drawing for none of its category: recognition is free of that."""
        return "recognised" if self.judge.name == "tiny" else "alignment"


class Looker:
    """Paints and judges what is not in the cache yet."""

    def __init__(self, task: Task, out: Path, paint: Painter) -> None:
        self.task, self.paint = task, paint
        self.cache = Cache(out / "cache.jsonl")
        self.folder = out / "pictures"
        name, category = task.concept.name, task.concept.category
        self.prompts = [t.replace("{}", f"<{name}>") for t in texts(task.recipe, category)]
        plains = [plain(p, {name: category}) for p in self.prompts]
        self.fits = task.judge.texts(plains)
        photos = [v for v in (task.known.photos, task.known.held_out) if v is not None]
        self.eye = key(task.judge.card.digest, plains, [_digest(v) for v in photos])
        first = task.recipe.seed + FRESH
        self.fresh = tuple(range(first, first + task.recipe.seeds))

    def __call__(self, setting: Setting, number: int, seeds: tuple[int, ...]) -> Sequence[Seen]:
        key_ = self._key(setting, number, seeds)
        kept = [self.picture(setting, number, k) for k in range(len(seeds))] if seeds == self.fresh else []
        found = self.cache.get(key_, self.eye)
        if found and all(path.is_file() for path in kept):
            return found
        painted = self.paint(self._recipe(setting, number, seeds))
        for image, path in zip(painted, kept, strict=False):
            atomic_write(path, page.jpeg(image, SIDE))
        seen = self._see(painted)
        self.cache.put(key_, self.eye, seen)
        return seen

    def seconds(self, setting: Setting, seed: int) -> float:
        """Of one image: of the second that is painted here, because the first warms up."""
        name = f"seconds {key(self.task.target)}"
        if (known := self.cache.number(name)) is not None:
            return known
        for number in (0, int(len(self.prompts) / FIRST)):  # both are wanted in the first round
            started = time.perf_counter()
            self(setting, number, (seed,))
            took = time.perf_counter() - started
        self.cache.keep(name, took)
        return took

    def picture(self, setting: Setting, number: int, k: int) -> Path:
        return self.folder / f"{self._key(setting, number, self.fresh)}-{k}.jpg"

    def _key(self, setting: Setting, number: int, seeds: tuple[int, ...]) -> str:
        return key(self.task.target, asdict(setting), self.prompts[number], seeds)

    def _recipe(self, s: Setting, number: int, seeds: tuple[int, ...]) -> Paint:
        recipe, name = self.task.recipe, self.task.concept.name
        made: Paint = Paint.make(
            prompt=self.prompts[number], base=recipe.base, preset=recipe.preset, steps=recipe.steps,
            guidance=s.guidance, interval=s.interval, n=len(seeds), batch=min(len(seeds), BATCH), seed=seeds[0],
            points={name: Tuned(strength=s.strength, tau=s.tau, switch=s.switch)},
        )  # fmt: skip
        return made

    def _see(self, painted: Sequence[Image.Image]) -> list[Seen]:
        judge, known = self.task.judge, self.task.known
        things = judge.likeness(painted).double()
        near = (things @ known.photos.double().T).mean(1)
        unseen = None if known.held_out is None else (things @ known.held_out.double().T).mean(1)
        fits = judge.images(painted).double() @ self.fits.double().T
        return [
            Seen(float(near[k]), None if unseen is None else float(unseen[k]), tuple(fits[k].tolist()))
            for k in range(len(painted))
        ]


def sweep(task: Task, out: Path, paint: Painter) -> Generator[Event, None, None]:
    """Search and write; the last event is Done with the operating points, {name: Point}.

    paint   images of a recipe, in the order of its seeds
    Raises BadRecipe, StorageError. Whatever ends it, what was painted is kept.
    """
    recipe = task.recipe
    _check(task)
    settings = grid(recipe, task.concept, task.plan, task.embedded)
    look = Looker(task, out, paint)
    seconds = look.seconds(settings[0], recipe.seed)
    settings, note = _affordable(recipe, settings, seconds)
    at_most = pictures(len(settings), recipe.prompts, recipe.seeds)
    yield Note(
        f"{len(settings)} settings{note}; at most {at_most:,} images of {seconds:.2f} s "
        f"({task.plan.steps} steps): {told(at_most * seconds / 60)}. {len(look.cache)} sets of images are in "
        f"{look.cache.path} already. Ctrl-C keeps what is done; the same command goes on."
    )
    found = yield from search(
        settings, look, prompts=recipe.prompts, seed=recipe.seed, fresh=look.fresh, measure=task.measure
    )
    chosen = choose(found.last)
    told_by = f"{task.judge.name} {task.judge.card.digest}"
    named = {name: as_point(found.last[i], told_by) for name, i in chosen.named.items()}
    facts = _facts(task, look, found, chosen)
    stem = out / task.preset
    atomic_write(stem.with_name(f"{task.preset}.json"), json.dumps(facts, indent=1).encode())
    shown = page.Shown(
        title=f"{task.concept.name} on {recipe.base}, preset {task.preset}", facts=facts, found=found,
        chosen=chosen, known=task.known, measure=task.measure,
        pictures=[
            [look.picture(s.setting, n, k) for n in range(recipe.prompts) for k in range(recipe.seeds)]
            for s in found.last
        ],
    )  # fmt: skip
    atomic_write(stem.with_name(f"{task.preset}.png"), figure.draw(shown, "png"))
    atomic_write(stem.with_name(f"{task.preset}.html"), page.write(shown).encode())
    yield Done(named, {"preset": task.preset, "out": str(out), "settings": found.tried,
                       "hypervolume": chosen.hypervolume})  # fmt: skip


def _check(task: Task) -> None:
    if not task.judge.reads:
        raise BadRecipe(
            f"The judge {task.judge.name} sees but does not read: it cannot say whether a prompt is followed. "
            "Use --judge clip-b32 or clip-l14, or tiny for the embedded base."
        )
    figure.check()


def _affordable(
    recipe: Sweep, settings: tuple[Setting, ...], seconds: float
) -> tuple[tuple[Setting, ...], str]:  # fmt: skip
    """As many of the settings as the budget allows, and what to say of it."""
    if recipe.budget_minutes is None:
        return settings, ""

    def minutes(n: int) -> float:
        return pictures(n, recipe.prompts, recipe.seeds) * seconds / 60

    n = max((n for n in range(2, len(settings) + 1) if minutes(n) <= recipe.budget_minutes), default=0)
    if not n:
        raise BadRecipe(
            f"{recipe.budget_minutes:g} minutes are too few: two settings alone take {told(minutes(2))}. "
            "Give more, or paint fewer --prompts and --seeds."
        )
    if n == len(settings):
        return settings, ""
    return drawn(settings, n, recipe.seed), f" of {len(settings)}, drawn to stay in the budget"


def _facts(task: Task, look: Looker, found: Found, chosen: Chosen) -> dict[str, Any]:
    """What was measured, as plain data."""
    card, recipe = task.judge.card, task.recipe
    return {
        "concept": {"name": task.concept.name, "category": task.concept.category}, "base": recipe.base,
        "preset": task.preset, "steps": task.plan.steps, "target": task.target,
        "judge": asdict(card), "axis": task.measure, "photos": len(task.known.photos),
        "among_photos": task.known.among, "prompts": look.prompts, "seeds": list(look.fresh),
        "tried": found.tried, "second_round": len(found.before), "hypervolume": chosen.hypervolume,
        "taught": _row(found.last[0]), "front": [_row(found.last[i]) for i in chosen.front],
        "measured": [_row(s) for s in found.last],
        "points": {name: _row(found.last[i]) for name, i in chosen.named.items()},
    }  # fmt: skip


def _row(s: Standing) -> dict[str, Any]:
    told = ("likeness", "held_out", "alignment", "recognised")
    return asdict(s.setting) | {n: None if (m := getattr(s, n)) is None else asdict(m) for n in told}


def _digest(vectors: torch.Tensor) -> str:
    return hashlib.sha256(vectors.float().contiguous().numpy().tobytes()).hexdigest()[:16]
