"""A comparison from start to end: what it costs, teaching, painting, judging, and what is written.

    OUT/methods/      what was taught; a method that is there is not taught again
    OUT/pictures/     every image, named by all that it depends on, so that none is painted twice
    OUT/cache.jsonl   seconds of an image, for the cost
    OUT/report.html .md .json .csv

The same images, judge and photos give the same numbers, however often the run was interrupted. Who
teaches and who paints is the caller's choice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from minikin.baselines import class_images
from minikin.errors import BadRecipe
from minikin.evaluation import metrics
from minikin.evaluation.compare import methods, report
from minikin.evaluation.compare.method_result import Point, Standing
from minikin.evaluation.compare.methods import Taught
from minikin.evaluation.compare.variants import variant
from minikin.evaluation.encoders import Judge
from minikin.evaluation.scores import References, plain, score
from minikin.evaluation.sweep import figure
from minikin.evaluation.sweep.cache import Cache, key
from minikin.evaluation.sweep.settings import PLACES, texts, told
from minikin.evaluation.two_subjects import Together, together
from minikin.events import Done, Event, Note, Progress
from minikin.images.encode import save_image
from minikin.images.photos import Photo
from minikin.models.base import Base
from minikin.recipes import BESIDE, Compare, Paint
from minikin.recipes import Teach as Teaching

BATCH = 8  # images of one prompt at once

Painter = Callable[[Paint], Sequence[Image.Image]]
Teach = Callable[[str, Compare], Generator[Event, None, Taught]]  # a method by its name
# a painter with these on, so strongly
Wear = Callable[[Sequence[Taught], float], AbstractContextManager[Painter]]


@dataclass(frozen=True)
class Course:
    """One way to paint: a preset in a number of steps; `target` is whatever else its images depend on."""

    preset: str
    steps: int
    target: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.steps} step{'s' if self.steps > 1 else ''} ({self.preset})"


@dataclass(frozen=True)
class Task:
    """What is compared, on what, judged by whom.

    skipped  a sentence for each number of steps that cannot be painted here
    known    what the judge sees in the photos
    beside   the same of a second thing's photos, for images of both
    """

    recipe: Compare
    methods: tuple[str, ...]
    base: Base
    photos: Sequence[Photo]
    courses: tuple[Course, ...]
    skipped: tuple[str, ...]
    judge: Judge
    known: References
    beside: References | None = None
    second_photos: Sequence[Photo] = ()

    @property
    def measure(self) -> str:
        """tiny's own judge takes an unusual drawing for none of its category: recognition is free of that."""
        return "recognised" if self.judge.name == "tiny" else "alignment"

    @property
    def prompts(self) -> list[str]:
        """With <name> where the thing is named."""
        named = f"<{self.recipe.name}>"
        return [t.replace("{}", named) for t in texts(self.recipe, self.recipe.category)]

    def duets(self, regions: bool = False) -> list[tuple[str, str]]:
        """Prompts of both things, with their names and with their categories; none without a second thing."""
        r = self.recipe
        if self.beside is None:
            return []
        names = [f"<{n}@{side}>" if regions else f"<{n}>" for n, side in ((r.name, "left"), (BESIDE, "right"))]
        kinds = [f"a {c}" for c in (r.category, r.beside_category)]
        both = [f"{a} to the left of {b}" for a, b in (names, kinds)]
        return [(f"a photo of {both[0]} {s}", f"a photo of {both[1]} {s}") for s in PLACES[: r.prompts]]

    @property
    def second(self) -> Compare:
        """The recipe by which the second thing is taught."""
        r = self.recipe
        return r.model_copy(update={"name": BESIDE, "category": r.beside_category})

    @property
    def plain(self) -> str:
        """The prompt whose images drift is measured on."""
        return class_images.prompt(self.recipe.category)


@dataclass(frozen=True)
class Wish:
    """Images of one prompt: what is on and how strongly, by which course; both things for a duet."""

    taught: Taught | None
    strength: float
    course: Course
    prompt: str
    n: int
    partner: Taught | None = None

    @property
    def on(self) -> tuple[Taught, ...]:
        return tuple(t for t in (self.taught, self.partner) if t)


class Gallery:
    """Every image of a comparison, painted when it is not there yet."""

    def __init__(self, task: Task, out: Path, wear: Wear) -> None:
        self.task, self.wear = task, wear
        self.folder = out / "pictures"

    def paths(self, w: Wish) -> list[Path]:
        on = (w.taught.digest, w.strength, *self._changes(w).items()) if w.taught else None
        if on and w.partner:
            on = (*on, w.partner.digest)
        target = (str(self.task.base.dtype), w.course.target, on, w.prompt, w.n, self.task.recipe.seed)
        return [self.folder / f"{key(target)}-{k}.png" for k in range(w.n)]

    def paint(self, wishes: Sequence[Wish], stage: str) -> Generator[Progress, None, None]:
        """What is missing of one method: those of one strength in turn, so that it is put on once."""
        done, total = 0, sum(w.n for w in wishes)
        for strength in dict.fromkeys(w.strength for w in wishes):
            with ExitStack() as stack:
                painter: Painter | None = None
                for w in (w for w in wishes if w.strength == strength):
                    paths = self.paths(w)
                    if not all(p.is_file() for p in paths):  # a whole set: images of a batch go together
                        painter = painter or stack.enter_context(self.wear(w.on, strength))
                        for image, path in zip(painter(self._recipe(w)), paths, strict=True):
                            save_image(image, path)
                    done += w.n
                    yield Progress(stage, done, total, f"strength {strength:g}, {w.course}")

    def _recipe(self, w: Wish) -> Paint:
        made: Paint = Paint.make(
            prompt=w.prompt, base=self.task.recipe.base, preset=w.course.preset, steps=w.course.steps, n=w.n,
            batch=min(w.n, BATCH), seed=self.task.recipe.seed, points={}, **self._changes(w),
        )  # fmt: skip
        return made

    def _changes(self, w: Wish) -> dict[str, Any]:
        """What the method's variant changes in painting."""
        return dict(variant(w.taught.method).paint) if w.taught else {}


def compare(task: Task, out: Path, teach: Teach, wear: Wear) -> Generator[Event, None, None]:
    """Teach, paint, judge and write; the last event is Done with the path of the page.

    teach  by a method, or from what was kept of it
    wear   a painter; None of anything on for the plain base
    Raises BadRecipe, StorageError, and what teaching and painting raise. Whatever ends it, what was taught
    and painted is kept.
    """
    figure.check()
    if not task.judge.reads:
        raise BadRecipe(
            f"The judge {task.judge.name} sees but does not read: it cannot say whether a prompt is followed. "
            "Use --judge clip-b32 or clip-l14, or tiny for the embedded base."
        )
    gallery, cache, r = Gallery(task, out, wear), Cache(out / "cache.jsonl"), task.recipe
    yield _cost(task)
    minutes = 0.0
    for course in task.courses:
        before = [Wish(None, 0.0, course, task.plain, r.plain)]
        yield from _timed(gallery, before, cache)
        minutes += (cache.number(_seconds(gallery, before[0])) or 0.0) * _pictures(task) / 60
    yield Note(f"Painting takes {told(minutes)} at most; teaching comes on top of it.")
    standings: list[tuple[Taught, list[Standing]]] = []
    for method in task.methods:
        taught = yield from teach(method, r)
        some = [_wishes(task, taught, c) for c in task.courses]
        yield from gallery.paint([w for wishes in some for w in wishes], f"painting {method}")
        both = yield from _both(task, gallery, taught, teach)
        standings.append((
            taught, [_standing(task, gallery, taught, wishes, *d) for wishes, d in zip(some, both, strict=True)]
        ))  # fmt: skip
    facts = report.facts(task, standings)
    page = report.write(facts, standings, out)
    yield Done(page, {"out": str(out), "methods": list(task.methods), "report": str(page)})


def _cost(task: Task) -> Note:
    """What will be taught and painted, before anything is."""
    tiny, steps = task.base.architecture == "tiny", []
    for method in task.methods:
        asked = methods.asked(method, task.recipe, tiny)
        most = f"at most {asked.max_steps}" if isinstance(asked, Teaching) else ""
        steps.append(f"{method} {asked.steps or most}")
    n = _pictures(task)
    each = ", ".join(str(c) for c in task.courses)
    return Note(
        f"{len(task.methods)} methods in {each}: {n * len(task.courses):,} images, {n:,} of each. Steps of "
        f"teaching: {', '.join(steps)}. {' '.join((*task.skipped, ''))}Ctrl-C keeps what is done; the same "
        "command goes on."
    )


def _pictures(task: Task) -> int:
    """Images of one course."""
    r = task.recipe
    settings = sum(len(methods.strengths(m, r)) for m in task.methods)
    duets = len(task.duets()) * r.seeds * (1 + len(task.methods))
    return r.plain * (1 + len(task.methods)) + settings * r.prompts * r.seeds + duets


def _timed(gallery: Gallery, wishes: Sequence[Wish], cache: Cache) -> Generator[Progress, None, None]:
    """Paint the plain base's images, and remember how long one took."""
    new = not all(p.is_file() for w in wishes for p in gallery.paths(w))
    started = time.perf_counter()
    yield from gallery.paint(wishes, "painting the plain base")
    if new:
        took = (time.perf_counter() - started) / sum(w.n for w in wishes)
        cache.keep(_seconds(gallery, wishes[0]), took)


def _seconds(gallery: Gallery, w: Wish) -> str:
    return f"seconds {gallery.paths(w)[0].stem}"


def _wishes(task: Task, taught: Taught, course: Course) -> list[Wish]:
    """All images of a method in a course, those of the plain category first."""
    r = task.recipe
    plainly = Wish(taught, 1.0, course, task.plain, r.plain)
    every = methods.strengths(taught.method, r)
    return [plainly, *(Wish(taught, s, course, p, r.seeds) for s in every for p in task.prompts)]


def _both(
    task: Task, gallery: Gallery, taught: Taught, teach: Teach
) -> Generator[Event, None, list[tuple[Together | None, list[Path]]]]:
    """The second thing taught by the same method, and both in one image, for each course."""
    if task.beside is None:
        return [(None, []) for _ in task.courses]
    r = task.recipe
    found: list[tuple[Together | None, list[Path]]] = []
    partner = yield from teach(taught.method, task.second)
    prompts = task.duets(variant(taught.method).regions)
    for course in task.courses:
        own = [Wish(taught, 1.0, course, p, r.seeds, partner) for p, _ in prompts]
        plainly = [Wish(None, 0.0, course, p, r.seeds) for _, p in prompts]
        yield from gallery.paint(plainly, "painting pairs on the plain base")
        yield from gallery.paint(own, f"painting pairs by {taught.method}")
        paths, plain_paths = ([p for w in some for p in gallery.paths(w)] for some in (own, plainly))
        pictures, before = _opened(paths), _opened(plain_paths)
        each = [p for _, p in prompts for _ in range(r.seeds)]
        known = (task.known.photos, task.beside.photos)
        found.append((together(task.judge, pictures, before, known, each), paths))
    return found


def _standing(
    task: Task, gallery: Gallery, taught: Taught, wishes: Sequence[Wish], both: Together | None,
    duets: Sequence[Path],
) -> Standing:  # fmt: skip
    """A method's numbers in one course, from its images."""
    r, course = task.recipe, wishes[0].course
    before = gallery.paths(Wish(None, 0.0, course, task.plain, r.plain))
    after = gallery.paths(wishes[0])
    drift = metrics.drift(task.judge.images(_opened(before)), task.judge.images(_opened(after)))
    points = []
    for strength in methods.strengths(taught.method, r):
        own = [w for w in wishes[1:] if w.strength == strength]
        paths = [p for w in own for p in gallery.paths(w)]
        named = [plain(w.prompt, {r.name: r.category}) for w in own for _ in range(w.n)]
        points.append(Point(strength, score(task.judge, _opened(paths), named, task.known), paths))
    same = all(a.tobytes() == b.tobytes() for a, b in zip(_opened(before), _opened(after), strict=True))
    return Standing(str(course), drift, same, points, task.measure, before, after, both, duets)


def _opened(paths: Sequence[Path]) -> list[Image.Image]:
    found = []
    for path in paths:
        with Image.open(path) as image:
            found.append(image.convert("RGB"))
    return found
