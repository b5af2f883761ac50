"""Few-step students of tiny against its 50 steps: distance, text alignment, truth, likeness, diversity.

    python -m benchmarks.fewstep --prompts 500 --json fewstep.json --grid fewstep.png
    python -m benchmarks.fewstep --only lcm-lora tdm --steps 4

Prompts are held out: combinations that training never saw. Distances (FD, KID in the judge's features)
are to images of the 50-step base of other prompts and seeds (images of equal prompts are pairs, for
which these are not meant), and the base's own row is the distance of two such sets: nothing can be
expected below it. `seeds` is seed identifiability, chance 1 / 8. Likeness is that of concepts taught once
on the base and painted with each preset. What is kept of the base's alignment and likeness is a ratio
over the same prompts and seeds, drawn together.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tools.tiny_training.evaluation import rules
from tools.tiny_training.evaluation.prompts import prompts
from tools.tiny_training.evaluation.report import shares

from benchmarks import frechet as distance
from benchmarks import seeds
from benchmarks.many import paint_many
from benchmarks.measure import machine
from minikin import Studio
from minikin.errors import MinikinError
from minikin.evaluation import intervals, metrics
from minikin.evaluation.encoders import Judge, open_judge
from minikin.images.sheet import contact_sheet
from minikin.tiny.encoders.classifier import Classifier
from minikin.tiny.world import World

BASE_STEPS = 50
BASE = "DDIM"  # at the guidance that tiny is painted with by default
# name: how it is painted, and in how many steps
ROWS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    BASE: ({"scheduler": "DDIM"}, (BASE_STEPS, 1, 2, 4, 8)),  # first: the others are shares of it
    "DPM++ 2M": ({"scheduler": "DPM++ 2M"}, (1, 2, 4, 8)),
    "DDIM, guidance 4": ({"scheduler": "DDIM", "guidance": 4.0}, (8,)),  # what the students were taught
    "lcm": ({"preset": "lcm"}, (1, 2, 4, 8)),
    "lcm-lora": ({"preset": "lcm-lora", "force": True}, (1, 2, 4, 8)),
    "turbo": ({"preset": "turbo", "force": True}, (1, 2, 4, 8)),
    "tdm": ({"preset": "tdm", "force": True}, (1, 2, 4, 8)),
}
CONCEPTS = ("my_dog", "my_teapot", "my_car", "my_chair", "my_robot", "my_teddy")
PLACES = ("on the beach", "in the forest", "in the snow", "on a blue background", "in the desert", "at night")
SEEDS, SEED_PROMPTS, SHOWN = 8, 24, 8


class Bench:
    """The judge, the classifier, the prompts, the taught concepts."""

    def __init__(
        self, n: int, base: str, concepts: tuple[str, ...], mode: str = "gated", kept: Path | None = None
    ) -> None:
        self.mode, self.kept = mode, kept
        self.studio = Studio.open(base, device="cpu")
        self.judge: Judge = open_judge("tiny")
        self.classifier = Classifier.open()
        drawn = prompts(World("small"), 2 * n, 5)
        self.asked, others = drawn[:n], [a.prompt for a in drawn[n:]]
        self.texts = [a.prompt for a in self.asked]
        self.read = self.judge.texts(self.texts)
        painted = paint_many(self.studio, others, range(50_000, 50_000 + n), scheduler=BASE, steps=BASE_STEPS)
        self.reference = self.judge.images(painted)
        self.photos = {name: self._taught(name) for name in concepts}
        self.whole: dict[str, np.ndarray] = {}  # of the base in 50 steps, image by image

    def _taught(self, name: str) -> torch.Tensor:
        """Teach a concept on the base; its photos as the judge sees them, whole as the images are.

        What was taught before lies in `kept` and is not taught again."""
        folder = Path("examples") / name
        category = (folder / "category.txt").read_text().strip()
        own = f"{self.studio.base.fingerprint[:8]}-{self.mode}"
        file = self.kept / own / f"{name}.safetensors" if self.kept else None
        if file and file.is_file():
            self.studio.add(str(file))
        else:
            concept = self.studio.teach(
                folder, name=name, category=category, mode=self.mode, seed=1, preview=False
            )
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                concept.save(file)
        return self.judge.likeness([Image.open(f).convert("RGB") for f in sorted(folder.glob("*.jpg"))])

    def row(self, name: str, how: dict[str, Any]) -> tuple[dict[str, Any], list[Image.Image]]:
        """All numbers of one way of painting, and its first images."""
        started = time.perf_counter()
        pictures = paint_many(self.studio, self.texts, range(len(self.texts)), **how)
        seconds = (time.perf_counter() - started) / len(pictures)
        seen = self.judge.images(pictures)
        verdicts = self.classifier.look(np.stack([np.asarray(p) for p in pictures]))
        found: dict[str, Any] = {
            "row": name,
            "seconds an image": round(seconds, 4),
            "FD": distance.frechet(seen, self.reference, resamples=50),
            "KID": distance.kernel(seen, self.reference),
            "alignment": metrics.alignment(seen, self.read, self.texts),
            "seeds": self._seeds(how),
        }
        found |= {f"true {k}": v for k, v in shares(rules.judge_all(self.asked, verdicts)).items()}
        aligned = (seen.double() * self.read.double()).sum(1).numpy()
        values, groups = {"alignment": aligned}, {"alignment": self.texts}
        if self.photos:
            values["likeness"], groups["likeness"] = self._likeness(how)
            found["likeness"] = intervals.mean(values["likeness"], 0, groups["likeness"])
        if name == f"{BASE} {BASE_STEPS}":
            self.whole = values
        for score, whole in self.whole.items():
            found[f"{score} kept"] = intervals.ratio(values[score], whole, 0, groups[score])
        return found, pictures[:SHOWN]

    def _seeds(self, how: dict[str, Any]) -> Any:
        chosen = self.texts[:SEED_PROMPTS]
        texts = [t for t in chosen for _ in range(SEEDS)]
        pictures = paint_many(self.studio, texts, list(range(SEEDS)) * len(chosen), **how)
        return seeds.identifiability(seeds.thumbnails(pictures).view(len(chosen), SEEDS, -1))

    def _likeness(self, how: dict[str, Any]) -> tuple[np.ndarray, list[str]]:
        """Of every image, and its prompt."""
        texts = [f"a photo of <{c}> {place}" for c in self.photos for place in PLACES for _ in range(2)]
        pictures = paint_many(self.studio, texts, range(len(texts)), **how)
        things = self.judge.likeness(pictures)
        each = len(texts) // len(self.photos)
        values = [(things[i * each : (i + 1) * each].double() @ photos.double().T).mean(1)
                  for i, photos in enumerate(self.photos.values())]  # fmt: skip
        return torch.cat(values).numpy(), texts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--steps", nargs="*", type=int)
    parser.add_argument("--concepts", nargs="*", default=list(CONCEPTS))
    parser.add_argument(
        "--mode", default="gated", choices=("gated", "row"), help="of teaching; the docs' tables are gated's"
    )
    parser.add_argument("--kept", type=Path, help="folder of the taught concepts, to use them again")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--grid", type=Path)
    args = parser.parse_args()
    bench = Bench(args.prompts, args.base, tuple(args.concepts), args.mode, args.kept)
    rows, shown, captions = [], [], []
    for name in args.only:
        how, counts = ROWS[name]
        for steps in counts:
            if args.steps and steps not in args.steps:
                continue
            try:
                found, pictures = bench.row(f"{name} {steps}", {**how, "steps": steps})
            except MinikinError as e:
                print(f"{name} {steps}: {e}")
                continue
            rows.append(found)
            shown += pictures
            captions += [f"{name} {steps}"] * len(pictures)
            print("  ".join(f"{k} {v}" for k, v in found.items()), flush=True)
            if args.json:
                args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1, default=_plain))
            if args.grid:
                contact_sheet(shown, captions, columns=SHOWN).save(args.grid)


def _plain(value: Any) -> Any:
    return [value.value, value.low, value.high, value.n]


if __name__ == "__main__":
    main()
