"""Few-step students of tiny against its 50 steps: FD, KID, prompt and subject fidelity, diversity.

    python -m benchmarks.fewstep --prompts 500 --json fewstep.json --grid fewstep.png
    python -m benchmarks.fewstep --only lcm-lora tdm --steps 4

Prompts are held out: combinations that training never had. Distances (FD, KID of the encoder's vectors) are to
images of the 50-step base of other prompts and seeds, because images of equal prompts are not independent; the
base's own row is the distance of two such sets, the lower bound of the others. `seeds` is seed identifiability,
chance 1 / 8. Subject fidelity is that of concepts taught once on the base and used with each preset. The shares
of the base's text alignment and subject fidelity are ratios over the same prompts and seeds, resampled
together.
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

from benchmarks import distances, seeds
from benchmarks.batched import generate_batched
from benchmarks.measure import machine
from minikin import Studio
from minikin.errors import MinikinError
from minikin.evaluation import metrics
from minikin.evaluation.encoder_registry import open_encoder
from minikin.evaluation.encoders import Encoder
from minikin.evaluation.intervals import Estimate, bootstrap_mean, bootstrap_ratio
from minikin.images.sheet import contact_sheet
from minikin.tiny.encoders.classifier import Classifier
from minikin.tiny.world import World

BASE_STEPS = 50
BASE = "DDIM"  # at tiny's default guidance
# name: recipe, and the numbers of steps
ROWS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    BASE: ({"scheduler": "DDIM"}, (BASE_STEPS, 1, 2, 4, 8)),  # first: the others are shares of it
    "DPM++ 2M": ({"scheduler": "DPM++ 2M"}, (1, 2, 4, 8)),
    "DDIM, guidance 4": ({"scheduler": "DDIM", "guidance": 4.0}, (8,)),  # the students' teacher
    "lcm": ({"preset": "lcm"}, (1, 2, 4, 8)),
    "lcm-lora": ({"preset": "lcm-lora", "force": True}, (1, 2, 4, 8)),
    "turbo": ({"preset": "turbo", "force": True}, (1, 2, 4, 8)),
    "tdm": ({"preset": "tdm", "force": True}, (1, 2, 4, 8)),
}
CONCEPTS = ("my_dog", "my_teapot", "my_car", "my_chair", "my_robot", "my_teddy")
PLACES = ("on the beach", "in the forest", "in the snow", "on a blue background", "in the desert", "at night")
COPIES = 2  # images of a concept and a place
SEEDS, SEED_PROMPTS, GRID_COLUMNS = 8, 24, 8


class Bench:
    """Encoder, classifier, held-out prompts and taught concepts.

    concepts_folder  keeps taught concepts for other runs
    """

    def __init__(
        self,
        n: int,
        base: str,
        concepts: tuple[str, ...],
        mode: str = "gated",
        concepts_folder: Path | None = None,
    ) -> None:
        self.mode, self.concepts_folder = mode, concepts_folder
        self.studio = Studio.open(base, device="cpu")
        self.encoder: Encoder = open_encoder("tiny")
        self.classifier = Classifier.open()
        held_out = prompts(World("small"), 2 * n, 5)
        self.specs, others = held_out[:n], [spec.prompt for spec in held_out[n:]]
        self.prompts = [spec.prompt for spec in self.specs]
        self.texts = self.encoder.encode_texts(self.prompts)
        images = generate_batched(
            self.studio, others, range(50_000, 50_000 + n), scheduler=BASE, steps=BASE_STEPS
        )
        self.reference = self.encoder.encode_images(images)
        self.photos = {name: self._teach(name) for name in concepts}
        self.base_scores: dict[str, np.ndarray] = {}  # of the base in 50 steps, per image

    def _teach(self, name: str) -> torch.Tensor:
        """Teach a concept on the base, or load it; returns the vectors of its photos."""
        folder = Path("examples") / name
        category = (folder / "category.txt").read_text().strip()
        file = None
        if self.concepts_folder:
            subfolder = f"{self.studio.base.fingerprint[:8]}-{self.mode}"
            file = self.concepts_folder / subfolder / f"{name}.safetensors"
        if file and file.is_file():
            self.studio.add(str(file))
        else:
            concept = self.studio.teach(
                folder, name=name, category=category, mode=self.mode, seed=1, preview=False
            )
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                concept.save(file)
        photos = [Image.open(f).convert("RGB") for f in sorted(folder.glob("*.jpg"))]
        return self.encoder.encode_subjects(photos)

    def row(self, name: str, recipe: dict[str, Any]) -> tuple[dict[str, Any], list[Image.Image]]:
        """All numbers of one recipe, and its first images."""
        started = time.perf_counter()
        images = generate_batched(self.studio, self.prompts, range(len(self.prompts)), **recipe)
        seconds = (time.perf_counter() - started) / len(images)
        vectors = self.encoder.encode_images(images)
        answers = self.classifier.predict(np.stack([np.asarray(image) for image in images]))
        row: dict[str, Any] = {
            "row": name,
            "seconds an image": round(seconds, 4),
            "FD": distances.frechet_distance(vectors, self.reference, resamples=50),
            "KID": distances.kernel_distance(vectors, self.reference),
            "text_alignment": metrics.text_alignment(vectors, self.texts, self.prompts),
            "seeds": self._seed_identifiability(recipe),
        }
        row |= {f"true {k}": v for k, v in shares(rules.score_all(self.specs, answers)).items()}
        scores = {"text_alignment": (vectors.double() * self.texts.double()).sum(1).numpy()}
        groups = {"text_alignment": self.prompts}
        if self.photos:
            name_of = "subject_fidelity"
            scores[name_of], _, groups[name_of], _ = self.subject_scores(recipe)
            row[name_of] = bootstrap_mean(scores[name_of], 0, groups[name_of])
        if name == f"{BASE} {BASE_STEPS}":
            self.base_scores = scores
        for score, whole in self.base_scores.items():
            row[f"{score}, share of the base's"] = bootstrap_ratio(scores[score], whole, 0, groups[score])
        return row, images[:GRID_COLUMNS]

    def subject_scores(
        self, recipe: dict[str, Any]
    ) -> tuple[np.ndarray, list[Image.Image], list[str], list[str]]:
        """Subject fidelity (n,) of images of all concepts and places; the images, prompts and plain prompts."""
        texts, plain = [], []
        for name in self.photos:
            category = self.studio.concepts.loaded[name].concept.category
            texts += [f"a photo of <{name}> {place}" for place in PLACES for _ in range(COPIES)]
            plain += [f"a photo of a {category} {place}" for place in PLACES for _ in range(COPIES)]
        images = generate_batched(self.studio, texts, range(len(texts)), **recipe)
        subjects = self.encoder.encode_subjects(images).double().split(len(PLACES) * COPIES)
        fidelity = [(s @ p.double().T).mean(1) for s, p in zip(subjects, self.photos.values(), strict=True)]
        return torch.cat(fidelity).numpy(), images, texts, plain

    def _seed_identifiability(self, recipe: dict[str, Any]) -> Estimate:
        chosen = self.prompts[:SEED_PROMPTS]
        texts = [t for t in chosen for _ in range(SEEDS)]
        images = generate_batched(self.studio, texts, list(range(SEEDS)) * len(chosen), **recipe)
        return seeds.identifiability(seeds.thumbnails(images).view(len(chosen), SEEDS, -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--steps", nargs="*", type=int)
    parser.add_argument("--concepts", nargs="*", default=list(CONCEPTS))
    parser.add_argument(
        "--mode", default="gated", choices=("gated", "value"), help="of the concepts; gated in the docs' tables"
    )
    parser.add_argument("--concepts-folder", type=Path, help="keeps taught concepts for other runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--grid", type=Path)
    args = parser.parse_args()
    bench = Bench(args.prompts, args.base, tuple(args.concepts), args.mode, args.concepts_folder)
    rows: list[dict[str, Any]] = []
    images, captions = [], []
    for name in args.only:
        recipe, counts = ROWS[name]
        for steps in counts:
            if args.steps and steps not in args.steps:
                continue
            try:
                row, first = bench.row(f"{name} {steps}", {**recipe, "steps": steps})
            except MinikinError as e:
                print(f"{name} {steps}: {e}")
                continue
            rows.append(row)
            images += first
            captions += [f"{name} {steps}"] * len(first)
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            if args.json:
                report = {"machine": machine(), "rows": rows}
                args.json.write_text(json.dumps(report, indent=1, default=_as_list))
            if args.grid:
                contact_sheet(images, captions, columns=GRID_COLUMNS).save(args.grid)


def _as_list(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high, estimate.n]


if __name__ == "__main__":
    main()
