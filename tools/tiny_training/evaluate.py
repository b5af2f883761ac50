"""How good a tiny model is: draw held-out prompts, let the classifier count what is right.

    python -m tools.tiny_training.evaluate
    python -m tools.tiny_training.evaluate --model FOLDER --pictures 256 --json out/e.json --time

Prompts are captions of held-out scenes (evaluation/prompts.py), what counts as right is written in
evaluation/rules.py, and the same rules applied to the world's own scenes of the same prompts are the
ceiling. Also the autoencoder's PSNR and the U-Net's v-loss on held-out scenes, and a sheet of some
images, not chosen.
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
from tools.tiny_training.encoder_metrics import AMONG, caption_of
from tools.tiny_training.evaluation import report as reports
from tools.tiny_training.evaluation.model import Model, psnr
from tools.tiny_training.evaluation.prompts import Asked, of_each, prompts
from tools.tiny_training.evaluation.report import Report
from tools.tiny_training.evaluation.rules import judge_all

from minikin.errors import BadRecipe, MinikinError
from minikin.evaluation.intervals import mean
from minikin.files import atomic_write
from minikin.images.encode import save_image
from minikin.images.sheet import contact_sheet
from minikin.tiny import vocabulary as words
from minikin.tiny.encoders.classifier import Classifier
from minikin.tiny.encoders.dual_encoder import Judge
from minikin.tiny.world import World

SEED = 7001  # plus --seed: the stream of scenes, apart from those of training
SCENES = 256  # for PSNR and v-loss
SHOWN, COLUMNS = 48, 8  # images on the sheet


@dataclass(frozen=True)
class Evaluation:
    """The numbers, and what they were counted on: images (n, 128, 128, 3) uint8 and their prompts."""

    report: Report
    pictures: np.ndarray
    asked: Sequence[Asked]
    rights: Sequence[dict[str, bool]]

    def sheet(self) -> Image.Image:
        """The first images with their prompts; what is wrong with one stands before its prompt."""
        return contact_sheet(
            [Image.fromarray(p) for p in self.pictures[:SHOWN]],
            [_wrong(r) + a.prompt for a, r in zip(self.asked, self.rights, strict=True)][:SHOWN],
            columns=COLUMNS,
        )


def evaluate(
    model: Model, *, pictures: int, each: int = 0, steps: int, guidance: float, seed: int, world: str = "small",
    judges: Path | None = None, timed: bool = False, tell: bool = False,
) -> Evaluation:  # fmt: skip
    """Draw as many prompts and judge them.

    each    in place of `pictures`: so many one-object prompts of every kind of object
    judges  a folder with judge.safetensors and classifier.safetensors; the embedded ones by default
    timed  also time one U-Net call and one image
    tell   print to stderr how far it is
    """
    drawer = World(world)
    classifier = Classifier.open(judges and judges / "classifier.safetensors")
    judge = Judge.open(judges and judges / "judge.safetensors")
    asked = of_each(drawer, each, SEED + seed) if each else prompts(drawer, pictures, SEED + seed)
    texts = [a.prompt for a in asked]
    truth = np.stack([np.asarray(drawer.draw(a.scene)[0]) for a in asked])
    drawn = _draw(model, texts, steps, guidance, seed, tell)
    rights, ceiling = (judge_all(asked, classifier.look(p)) for p in (drawn, truth))
    held = slice(0, min(SCENES, len(asked)))
    noise = model.v_loss(truth[held], texts[held], seed)
    report = Report(
        settings={
            "pictures": len(asked), "each": each, "steps": steps, "guidance": guidance, "seed": seed,
            "world": world,
        },
        drawn=reports.shares(rights),
        ceiling=reports.shares(ceiling),
        by_category=reports.by_category(asked, rights),
        by_background=reports.by_background(asked, rights),
        captions=(_captions(judge, drawn, texts), _captions(judge, truth, texts)),
        psnr=mean(psnr(truth[held], model.round_trip(truth[held]))),
        v_loss=mean(noise.each),
        v_quarters=noise.quarters,
        times=model.times(steps=steps, guidance=guidance) if timed else {},
    )  # fmt: skip
    return Evaluation(report, drawn, asked, rights)


def _draw(model: Model, texts: Sequence[str], steps: int, guidance: float, seed: int, tell: bool) -> np.ndarray:
    start, out, n = time.monotonic(), [], 0
    for part in model.draw(texts, steps=steps, guidance=guidance, seed=seed):
        out.append(part)
        n += len(part)
        if tell:
            speed = n / (time.monotonic() - start)
            print(f"\rdrawn {n} of {len(texts)}, {speed:.1f}/s ", end="", file=sys.stderr, flush=True)
    if tell:
        print(file=sys.stderr)
    return np.concatenate(out)


def _captions(judge: Judge, pictures: np.ndarray, texts: Sequence[str]) -> float | None:
    """Own caption best of 50; None for fewer."""
    return caption_of(judge, pictures, tuple(texts)) if len(texts) >= AMONG else None


def _wrong(rights: dict[str, bool]) -> str:
    wrong = [bar for bar, right in rights.items() if not right]
    return f"[not {', '.join(wrong)}] " if wrong else ""


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    p = argparse.ArgumentParser("python -m tools.tiny_training.evaluate", description="Evaluate a tiny model.")
    p.add_argument("--model", default="tiny", help="diffusers folder; the embedded model by default")
    p.add_argument("--pictures", type=int, default=1000)
    p.add_argument(
        "--each", type=int, default=0, metavar="N",
        help="N one-object prompts of every kind instead; of three kinds of the small world training knows all",
    )  # fmt: skip
    p.add_argument("--steps", type=int, default=25)
    p.add_argument("--guidance", type=float, default=3.0)
    p.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    p.add_argument("--world", default="small", choices=sorted(words.WORLDS), help="whose prompts")
    p.add_argument(
        "--judges", type=Path, metavar="FOLDER",
        help="judge.safetensors and classifier.safetensors of that world; the embedded ones by default",
    )  # fmt: skip
    p.add_argument("--device", help="cuda, mps, xpu or cpu; the best there is by default")
    p.add_argument("--json", type=Path, metavar="OUT", help="write all numbers there")
    p.add_argument(
        "--grid", type=Path, default=Path("out/evaluation.png"), metavar="OUT",
        help="write the sheet of images there [out/evaluation.png]",
    )  # fmt: skip
    p.add_argument("--time", action="store_true", help="also time one U-Net call and one image")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    a = parser().parse_args(arguments)
    try:
        if a.pictures < 1 or a.steps < 1 or a.each < 0:
            raise BadRecipe(
                f"--pictures {a.pictures} --steps {a.steps} --each {a.each}: the first two must be at least 1, "
                "--each at least 0."
            )
        found = evaluate(
            Model(a.model, a.device), pictures=a.pictures, each=a.each, steps=a.steps, guidance=a.guidance,
            seed=a.seed, world=a.world, judges=a.judges, timed=a.time, tell=True,
        )  # fmt: skip
        print(found.report.text())
        print(f"\n{save_image(found.sheet(), a.grid)}")
        if a.json:
            facts = {"model": str(a.model), **found.report.as_json()}
            print(atomic_write(a.json, (json.dumps(facts, indent=1) + "\n").encode()))
    except MinikinError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
