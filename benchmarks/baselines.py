"""Hyper-parameter search of each baseline on tiny: learning rate x steps, the same for all methods.

    python -m benchmarks.baselines --out baselines.json                     all methods, three concepts
    python -m benchmarks.baselines --out baselines.json --methods dreambooth custom-diffusion
    python -m benchmarks.baselines --out smoke.json --smoke                 a test run of seconds

One run of a method with one learning rate on one concept is measured at several numbers of steps on its way, so
that steps cost nothing extra. The first concept tries every learning rate; each method's best two go on to the
others. Finished runs are in the file, and the same command resumes.

Metrics: colour fidelity inside the mask (benchmarks/colour_fidelity.py) to the photos and to held-out photos;
accuracy of a diffusion classifier that picks each image's scene among all; and drift, the mean difference of
plain images of the category in grey levels. A setting's score is sqrt(subject fidelity x scene accuracy); its
mean over the concepts decides. Fidelity to the held-out photos is not part of it: they have no masks, and
attention masks leave some background.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import colour_fidelity
from minikin import Studio
from minikin.baselines.result import BaselineResult
from minikin.baselines.train import teach
from minikin.evaluation.diffusion_classifier import accuracy
from minikin.files import atomic_write
from minikin.images.photos import load_photos
from minikin.perfusion.masks import image_mask
from minikin.recipes import Baseline

EXAMPLES = Path(__file__).parents[1] / "examples"
CONCEPTS = ("my_dog", "my_teapot", "my_backpack")
SCENES = ("in the snow", "in the forest", "at night", "on a blue background")
IMAGES, SEED = 2, 7  # for each scene
STEPS = 10  # from 8 on tiny's distance to 50 steps does not fall (docs/measurements.md)
FINALISTS = 2  # learning rates of a method that go on from the first concept to the others

Grid = dict[str, tuple[tuple[float, ...], tuple[int, ...]]]
GRID: Grid = {  # learning rates, numbers of steps
    "textual-inversion": ((2e-3, 5e-3, 2e-2, 5e-2), (100, 200, 400)),
    "dreambooth": ((3e-5, 1e-4, 3e-4), (50, 100, 200)),
    "dreambooth-prior": ((3e-5, 1e-4, 3e-4), (50, 100, 200)),
    "dreambooth-lora": ((3e-4, 1e-3, 3e-3), (50, 100, 200, 400)),
    "custom-diffusion": ((3e-4, 1e-3, 3e-3), (50, 100, 200, 400)),
}
SMOKE: Grid = {name: (rates[:1], (1, 2)) for name, (rates, _) in GRID.items()}


class Evaluation:
    """Metrics of a trained baseline on one concept; it is active only while images are generated."""

    def __init__(self, studio: Studio, name: str, *, smoke: bool = False) -> None:
        self.studio, self.category = studio, (EXAMPLES / name / "category.txt").read_text().strip()
        self.scenes = SCENES[:2] if smoke else SCENES
        self.recipe = {"n": 1 if smoke else IMAGES, "seed": SEED, "steps": 4 if smoke else STEPS}
        self.photos = load_photos(EXAMPLES / name)
        held_out = load_photos(EXAMPLES / name / "unseen")
        self.references = [
            colour_fidelity.descriptor(p.pixels, p.mask) for p in self.photos if p.mask is not None
        ]
        self.held_out = [self._descriptor(Image.fromarray(p.pixels)) for p in held_out]
        self.plain_prompts = [f"a photo of a {self.category} {s}" for s in self.scenes]
        self.plain = self._paint(self.plain_prompts)

    def _descriptor(self, image: Image.Image) -> np.ndarray:
        mask = image_mask(self.studio.base, image, self.category)
        return colour_fidelity.descriptor(np.asarray(image), mask)

    def _paint(self, prompts: Sequence[str]) -> list[Image.Image]:
        return [image for p in prompts for image in self.studio.paint(p, **self.recipe)]

    def __call__(self, result: BaselineResult) -> dict[str, float]:
        with self.studio.using_baselines(result):
            images = self._paint([result.prompt(f"a photo of <{result.name}> {s}") for s in self.scenes])
            plain = self._paint(self.plain_prompts)
        descriptors = [self._descriptor(i) for i in images]
        fidelity, held_out = (
            [[colour_fidelity.similarity(d, r) for r in references] for d in descriptors]
            for references in (self.references, self.held_out)
        )
        n = len(images) // len(self.plain_prompts)  # the images of one seed at a time, each of another scene
        scenes = [accuracy(self.studio.base, images[k::n], self.plain_prompts) for k in range(n)]
        drift = [
            np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()
            for a, b in zip(self.plain, plain, strict=True)
        ]
        values = (np.mean(fidelity), np.mean(held_out), np.mean(scenes), np.mean(drift))
        names = ("subject_fidelity", "held_out", "scene_accuracy", "drift")
        return {k: round(float(v), 4) for k, v in zip(names, values, strict=True)}


def search(
    out: Path, methods: Sequence[str], concepts: Sequence[str], *, smoke: bool = False
) -> dict[str, Any]:
    """Run everything that is not in the file yet; returns the table, which is written after every run."""
    table: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": []}
    done = {(r["method"], r["lr"], r["concept"]) for r in table["rows"]}
    grid, studio = SMOKE if smoke else GRID, Studio.open("tiny", device="cpu")
    for concept in concepts:
        rates = {m: grid[m][0] if concept == concepts[0] else best_rates(table["rows"], m) for m in methods}
        missing = [(m, lr) for m in methods for lr in rates[m] if (m, lr, concept) not in done]
        evaluate = Evaluation(studio, concept, smoke=smoke) if missing else None
        for method, lr in missing:
            assert evaluate is not None
            rows = train(evaluate, method, lr, grid[method][1], concept, smoke=smoke)
            table["rows"] += rows
            table["best"] = best(table["rows"])
            atomic_write(out, json.dumps(table, indent=1).encode())
            for r in rows:
                print(json.dumps(r), flush=True)
    return table


def train(
    evaluate: Evaluation, method: str, lr: float, marks: Sequence[int], concept: str, *, smoke: bool = False
) -> list[dict[str, Any]]:
    """One run, measured after each of these numbers of steps."""
    rows: list[dict[str, Any]] = []
    measuring = 0.0
    recipe = Baseline.make(
        method=method, name=concept, category=evaluate.category, lr=lr, steps=max(marks), save_minutes=60.0,
        class_images=4 if smoke else None,
    )  # fmt: skip

    def measure(step: int, result: BaselineResult) -> None:
        nonlocal measuring
        start = time.monotonic()
        row = {"method": method, "lr": lr, "steps": step, "concept": concept}
        rows.append({**row, **evaluate(result), "seconds": round(start - started - measuring, 1)})
        measuring += time.monotonic() - start

    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()  # with class images, where the cache does not have them
        for _ in teach(
            evaluate.studio.base, evaluate.photos, recipe, Path(folder), snapshot=measure, snapshot_steps=marks
        ):
            pass
    return rows


def score(row: dict[str, Any]) -> float:
    return float((row["subject_fidelity"] * row["scene_accuracy"]) ** 0.5)


def best_rates(rows: Sequence[dict[str, Any]], method: str) -> list[float]:
    """The learning rates of a method with the highest scores, at any number of steps, on the first concept."""
    scores: dict[float, float] = {}
    for r in rows:
        if r["method"] == method and r["concept"] == rows[0]["concept"]:
            scores[r["lr"]] = max(score(r), scores.get(r["lr"], 0.0))
    return sorted(scores, key=lambda lr: -scores[lr])[:FINALISTS]


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Learning rate and steps of each method's highest score, over the concepts that all settings have."""
    scores: dict[str, dict[tuple[float, int], dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in rows:
        scores[r["method"]][r["lr"], r["steps"]][r["concept"]] = score(r)
    table = {}
    for method, settings in scores.items():
        most = max(len(by_concept) for by_concept in settings.values())
        means = {k: float(np.mean(list(s.values()))) for k, s in settings.items() if len(s) == most}
        (lr, steps), value = max(means.items(), key=lambda item: item[1])
        table[method] = {"lr": lr, "steps": steps, "score": round(value, 4), "concepts": most}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("baselines.json"))
    parser.add_argument("--methods", nargs="+", choices=list(GRID), default=list(GRID))
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS))
    parser.add_argument(
        "--smoke", action="store_true", help="a test run: two steps of every method, few images"
    )
    args = parser.parse_args()
    concepts = args.concepts[:1] if args.smoke else args.concepts
    print(json.dumps(search(args.out, args.methods, concepts, smoke=args.smoke)["best"], indent=1))


if __name__ == "__main__":
    main()
