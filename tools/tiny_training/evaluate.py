"""Evaluation of a tiny model: generate images of held-out prompts and let the classifier check them.

    python -m tools.tiny_training.evaluate
    python -m tools.tiny_training.evaluate --model FOLDER --images 256 --json out/e.json --time

Prompts are captions of held-out scenes (evaluation/prompts.py). The rules for a correct image are in
evaluation/rules.py; the same rules applied to the world's images of the same scenes are the upper bound.
The report also has the autoencoder's PSNR and the U-Net's v-loss on held-out scenes, and a sheet of the
first images.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tools.tiny_training.encoder_metrics import CANDIDATES, caption_accuracy
from tools.tiny_training.evaluation import report as reports
from tools.tiny_training.evaluation.model import Model, psnr
from tools.tiny_training.evaluation.prompts import PromptSpec, of_each, prompts
from tools.tiny_training.evaluation.report import Report
from tools.tiny_training.evaluation.rules import score_all

from minikin.errors import BadRecipe, MinikinError
from minikin.evaluation.intervals import bootstrap_mean
from minikin.files import atomic_write
from minikin.images.encode import save_image
from minikin.images.sheet import contact_sheet
from minikin.tiny import vocabulary as words
from minikin.tiny.encoders.classifier import Classifier
from minikin.tiny.encoders.dual_encoder import KIND, DualEncoder
from minikin.tiny.world import World

SEED = 7001  # plus --seed: of the scenes, different from those of training
SCENES = 256  # for PSNR and v-loss
ON_SHEET, COLUMNS = 48, 8  # images on the sheet


@dataclass(frozen=True)
class Evaluation:
    """The report, the images (n, 128, 128, 3) uint8, their prompts, and the result of every rule."""

    report: Report
    images: np.ndarray
    specs: Sequence[PromptSpec]
    rights: Sequence[dict[str, bool]]

    def sheet(self) -> Image.Image:
        """Sheet of the first images with their prompts, after the names of the failed rules."""
        return contact_sheet(
            [Image.fromarray(p) for p in self.images[:ON_SHEET]],
            [_wrong(r) + a.prompt for a, r in zip(self.specs, self.rights, strict=True)][:ON_SHEET],
            columns=COLUMNS,
        )


def evaluate(
    model: Model,
    *,
    images: int,
    each: int = 0,
    steps: int,
    guidance: float,
    seed: int,
    world: str = "small",
    encoders: Path | None = None,
    timed: bool = False,
    show_progress: bool = False,
) -> Evaluation:
    """Generate `images` images of held-out prompts and evaluate them.

    each           in place of `images`: number of one-object prompts of every kind of object
    encoders       folder with the weight files of dual encoder and classifier; the embedded ones by default
    timed          also time one U-Net call and one image
    show_progress  print the progress to stderr
    """
    drawer = World(world)
    classifier = Classifier.open(encoders and encoders / "classifier.safetensors")
    encoder = DualEncoder.open(encoders and encoders / f"{KIND}.safetensors")
    specs = of_each(drawer, each, SEED + seed) if each else prompts(drawer, images, SEED + seed)
    texts = [a.prompt for a in specs]
    scene_images = np.stack([np.asarray(drawer.draw(a.scene)[0]) for a in specs])
    model_images = _draw(model, texts, steps, guidance, seed, show_progress)
    rights, ceiling = (score_all(specs, classifier.predict(p)) for p in (model_images, scene_images))
    held = slice(0, min(SCENES, len(specs)))
    noise = model.v_loss(scene_images[held], texts[held], seed)
    report = Report(
        settings={
            "pictures": len(specs),  # word: JSON key
            "each": each,
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "world": world,
        },
        drawn=reports.shares(rights),
        ceiling=reports.shares(ceiling),
        by_category=reports.by_category(specs, rights),
        by_background=reports.by_background(specs, rights),
        captions=(_captions(encoder, model_images, texts), _captions(encoder, scene_images, texts)),
        psnr=bootstrap_mean(psnr(scene_images[held], model.round_trip(scene_images[held]))),
        v_loss=bootstrap_mean(noise.each),
        v_quarters=noise.quarters,
        times=model.times(steps=steps, guidance=guidance) if timed else {},
    )
    return Evaluation(report, model_images, specs, rights)


def _draw(
    model: Model, texts: Sequence[str], steps: int, guidance: float, seed: int, show_progress: bool
) -> np.ndarray:
    start, out, n = time.monotonic(), [], 0
    for batch in model.draw(texts, steps=steps, guidance=guidance, seed=seed):
        out.append(batch)
        n += len(batch)
        if show_progress:
            speed = n / (time.monotonic() - start)
            print(f"\rdrawn {n} of {len(texts)}, {speed:.1f}/s ", end="", file=sys.stderr, flush=True)
    if show_progress:
        print(file=sys.stderr)
    return np.concatenate(out)


def _captions(encoder: DualEncoder, images: np.ndarray, texts: Sequence[str]) -> float | None:
    """Share of images whose caption fits best among 50; None for fewer images."""
    return caption_accuracy(encoder.fit(images, texts), texts) if len(texts) >= CANDIDATES else None


def _wrong(rights: dict[str, bool]) -> str:
    wrong = [bar for bar, right in rights.items() if not right]
    return f"[not {', '.join(wrong)}] " if wrong else ""


def parser() -> argparse.ArgumentParser:
    """Argument parser of the command."""
    p = argparse.ArgumentParser("python -m tools.tiny_training.evaluate", description="Evaluate a tiny model.")
    p.add_argument("--model", default="tiny", help="diffusers folder; the embedded model by default")
    p.add_argument("--images", "--pictures", type=int, default=1000)  # word: option of version 0.1
    p.add_argument(
        "--each",
        type=int,
        default=0,
        metavar="N",
        help="N one-object prompts of every kind instead; of three kinds of the small world training knows all",
    )
    p.add_argument("--steps", type=int, default=25)
    p.add_argument("--guidance", type=float, default=3.0)
    p.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    p.add_argument("--world", default="small", choices=sorted(words.WORLDS), help="whose prompts")
    p.add_argument(
        "--encoders",
        "--judges",  # word: option of version 0.1
        type=Path,
        metavar="FOLDER",
        help="weight files of dual encoder and classifier for that world; the embedded ones by default",
    )
    p.add_argument("--device", help="cuda, mps, xpu or cpu; the best there is by default")
    p.add_argument("--json", type=Path, metavar="OUT", help="write all numbers there")
    p.add_argument(
        "--grid",
        type=Path,
        default=Path("out/evaluation.png"),
        metavar="OUT",
        help="write the sheet of images there [out/evaluation.png]",
    )
    p.add_argument("--time", action="store_true", help="also time one U-Net call and one image")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    a = parser().parse_args(arguments)
    try:
        if a.images < 1 or a.steps < 1 or a.each < 0:
            raise BadRecipe(
                f"--images {a.images} --steps {a.steps} --each {a.each}: the first two must be at least 1, "
                "--each at least 0."
            )
        evaluation = evaluate(
            Model(a.model, a.device),
            images=a.images,
            each=a.each,
            steps=a.steps,
            guidance=a.guidance,
            seed=a.seed,
            world=a.world,
            encoders=a.encoders,
            timed=a.time,
            show_progress=True,
        )
        print(evaluation.report.text())
        print(f"\n{save_image(evaluation.sheet(), a.grid)}")
        if a.json:
            facts = {"model": str(a.model), **evaluation.report.as_json()}
            print(atomic_write(a.json, (json.dumps(facts, indent=1) + "\n").encode()))
    except MinikinError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
