"""The search for each baseline's settings on tiny: learning rate x steps, the same for all methods.

    python -m benchmarks.baselines --out baselines.json                     all methods, three concepts
    python -m benchmarks.baselines --out baselines.json --methods dreambooth custom-diffusion
    python -m benchmarks.baselines --out smoke.json --smoke                 seconds: whether it runs

One run of a method at one rate on one concept is measured at several numbers of steps on its way, so that
steps cost nothing extra. The first concept tries every rate; each method's best two go on to the others.
Everything that is finished is in the file, and the same command goes on.
Measured as teaching on tiny is (benchmarks/teaching.py): likeness of colour and texture inside the
mask, to the photos and to photos that teaching never saw; whether the base finds each image's scene
again among all scenes; and drift, the mean difference of plain images of the category in grey levels.
A setting's score is sqrt(likeness x scenes found), its mean over the concepts decides. Likeness to the
unseen photos is not in it: they bring no masks, and what attention leaves of their backgrounds counts.
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

from minikin import Studio
from minikin.baselines.result import Learned
from minikin.baselines.train import teach
from minikin.evaluation import subject_fidelity as looks
from minikin.evaluation.alignment import picks_own
from minikin.files import atomic_write
from minikin.images.photos import load_photos
from minikin.perfusion.masks import picture_mask
from minikin.recipes import Baseline

EXAMPLES = Path(__file__).parents[1] / "examples"
CONCEPTS = ("my_dog", "my_teapot", "my_backpack")
SCENES = ("in the snow", "in the forest", "at night", "on a blue background")
PICTURES, SEED = 2, 7  # for each scene
STEPS = 10  # of painting: from 8 on tiny's distance to 50 steps does not fall (docs/measurements.md)
KEPT = 2  # rates of a method that the first concept leaves to the others

Grid = dict[str, tuple[tuple[float, ...], tuple[int, ...]]]
GRID: Grid = {  # rates, numbers of steps
    "textual-inversion": ((2e-3, 5e-3, 2e-2, 5e-2), (100, 200, 400)),
    "dreambooth": ((3e-5, 1e-4, 3e-4), (50, 100, 200)),
    "dreambooth-prior": ((3e-5, 1e-4, 3e-4), (50, 100, 200)),
    "dreambooth-lora": ((3e-4, 1e-3, 3e-3), (50, 100, 200, 400)),
    "custom-diffusion": ((3e-4, 1e-3, 3e-3), (50, 100, 200, 400)),
}
SMOKE: Grid = {name: (rates[:1], (1, 2)) for name, (rates, _) in GRID.items()}


class Judge:
    """Measures what has been learned of one concept, on the base as it is painted with by everybody."""

    def __init__(self, studio: Studio, name: str, *, smoke: bool = False) -> None:
        self.studio, self.category = studio, (EXAMPLES / name / "category.txt").read_text().strip()
        self.scenes = SCENES[:2] if smoke else SCENES
        self.how = {"n": 1 if smoke else PICTURES, "seed": SEED, "steps": 4 if smoke else STEPS}
        self.photos = load_photos(EXAMPLES / name)
        unseen = load_photos(EXAMPLES / name / "unseen")
        self.shown = [looks.descriptor(p.pixels, p.mask) for p in self.photos if p.mask is not None]
        self.unseen = [self._described(Image.fromarray(p.pixels)) for p in unseen]
        self.plain = self._paint([f"a photo of a {self.category} {s}" for s in self.scenes])

    def _described(self, picture: Image.Image) -> np.ndarray:
        return looks.descriptor(np.asarray(picture), picture_mask(self.studio.base, picture, self.category))

    def _paint(self, prompts: Sequence[str]) -> list[Image.Image]:
        return [image for p in prompts for image in self.studio.paint(p, **self.how)]

    def __call__(self, learned: Learned) -> dict[str, float]:
        plain = [f"a photo of a {self.category} {s}" for s in self.scenes]
        with self.studio.wearing(learned):
            made = self._paint([learned.prompt(f"a photo of <{learned.name}> {s}") for s in self.scenes])
            now = self._paint(plain)
        found = [self._described(i) for i in made]
        among = [[looks.similarity(f, r) for r in self.shown] for f in found]
        fresh = [[looks.similarity(f, r) for r in self.unseen] for f in found]
        n = len(made) // len(plain)  # the images of one seed at a time: each has another scene
        hits = [picks_own(self.studio.base, made[k::n], plain) for k in range(n)]
        drift = [
            np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()
            for a, b in zip(self.plain, now, strict=True)
        ]
        values = (np.mean(among), np.mean(fresh), np.mean(hits), np.mean(drift))
        names = ("likeness", "unseen", "alignment", "drift")
        return {k: round(float(v), 4) for k, v in zip(names, values, strict=True)}


def search(
    out: Path, methods: Sequence[str], concepts: Sequence[str], *, smoke: bool = False
) -> dict[str, Any]:
    """Run what is not in the file yet; returns the table, which is also written after every run."""
    table: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": []}
    done = {(r["method"], r["rate"], r["concept"]) for r in table["rows"]}
    grid, studio = SMOKE if smoke else GRID, Studio.open("tiny", device="cpu")
    for concept in concepts:
        rates = {m: grid[m][0] if concept == concepts[0] else leading(table["rows"], m) for m in methods}
        left = [(m, rate) for m in methods for rate in rates[m] if (m, rate, concept) not in done]
        judge = Judge(studio, concept, smoke=smoke) if left else None
        for method, rate in left:
            assert judge is not None
            rows = one(judge, method, rate, grid[method][1], concept, smoke=smoke)
            table["rows"] += rows
            table["best"] = best(table["rows"])
            atomic_write(out, json.dumps(table, indent=1).encode())
            for r in rows:
                print(json.dumps(r), flush=True)
    return table


def one(
    judge: Judge, method: str, rate: float, marks: Sequence[int], concept: str, *, smoke: bool = False
) -> list[dict[str, Any]]:  # fmt: skip
    """One run, measured at every mark."""
    rows: list[dict[str, Any]] = []
    measuring = 0.0
    recipe = Baseline.make(
        method=method, name=concept, category=judge.category, rate=rate, steps=max(marks), save_minutes=60.0,
        class_pictures=4 if smoke else None,
    )  # fmt: skip

    def look(step: int, learned: Learned) -> None:
        nonlocal measuring
        start = time.monotonic()
        row = {"method": method, "rate": rate, "steps": step, "concept": concept}
        rows.append({**row, **judge(learned), "seconds": round(start - began - measuring, 1)})
        measuring += time.monotonic() - start

    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()  # with class images, where the cache does not have them
        for _ in teach(judge.studio.base, judge.photos, recipe, Path(folder), look=look, look_at=marks):
            pass
    return rows


def score(row: dict[str, Any]) -> float:
    return float((row["likeness"] * row["alignment"]) ** 0.5)


def leading(rows: Sequence[dict[str, Any]], method: str) -> list[float]:
    """The rates of a method with the highest scores, each at its best number of steps, on the first concept."""
    found: dict[float, float] = {}
    for r in rows:
        if r["method"] == method and r["concept"] == rows[0]["concept"]:
            found[r["rate"]] = max(score(r), found.get(r["rate"], 0.0))
    return sorted(found, key=lambda rate: -found[rate])[:KEPT]


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per method the rate and steps of the highest score, over the concepts that all settings have."""
    found: dict[str, dict[tuple[float, int], dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in rows:
        found[r["method"]][r["rate"], r["steps"]][r["concept"]] = score(r)
    out = {}
    for method, settings in found.items():
        most = max(len(scores) for scores in settings.values())
        whole = {k: float(np.mean(list(s.values()))) for k, s in settings.items() if len(s) == most}
        (rate, steps), value = max(whole.items(), key=lambda item: item[1])
        out[method] = {"rate": rate, "steps": steps, "score": round(value, 4), "concepts": most}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("baselines.json"))
    parser.add_argument("--methods", nargs="+", choices=list(GRID), default=list(GRID))
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS))
    parser.add_argument("--smoke", action="store_true", help="two steps of every method, few images")
    args = parser.parse_args()
    concepts = args.concepts[:1] if args.smoke else args.concepts
    print(json.dumps(search(args.out, args.methods, concepts, smoke=args.smoke)["best"], indent=1))


if __name__ == "__main__":
    main()
