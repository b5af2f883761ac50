"""Two concepts in one image, compared with their own colours: `python -m benchmarks.two_concepts`.

Pairs of the examples are taught and painted, with and without region words. Each half of an image (8 px over
the middle) is compared with the photos of both subjects by the colour histogram of the drawing score, which
needs no network. An image counts where each half overlaps with its own subject's colours by more than .2
and by .05 more than with the other's; without a stated side the subjects may be the other way round.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from minikin import Studio
from minikin.evaluation.drawing import Drawing, drawing_score
from minikin.evaluation.intervals import wilson_share
from minikin.images.sheet import contact_sheet

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPTS = (
    ("a photo of <{a}> to the left of <{b}> in the snow", True),
    ("a photo of <{a}> next to <{b}> in a meadow", False),
)
VARIANTS = {
    "strength 1, no regions": ("{n}:1", "{n}:1", "prompt"),  # strength 1, no regions: version 0.1
    "found": ("{n}", "{n}", "auto"),
    "region words": ("{n}@left", "{n}@right", "auto"),
}
SIDE, LEAST, MARGIN = 72, 0.2, 0.05


def references(name: str) -> list[Drawing]:
    """Three masked photos of an example."""
    masks = sorted((EXAMPLES / name / "masks").iterdir())[:3]
    photos = [next((EXAMPLES / name).glob(f"{mask.stem}.jp*g")) for mask in masks]
    return [
        Drawing.from_photo(
            np.asarray(Image.open(photo).convert("RGB")), np.asarray(Image.open(mask).convert("L"))
        )
        for photo, mask in zip(photos, masks, strict=True)
    ]


def teach_examples(studio: Studio, folder: Path, steps: int) -> list[str]:
    """The names of the examples, each taught and in use; their files are kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())
    for name in names:
        file = folder / f"{name}.safetensors"
        if file.exists():
            studio.add(file)
            continue
        category = (EXAMPLES / name / "category.txt").read_text().strip()
        studio.teach(EXAMPLES / name, name=name, category=category, steps=steps).save(file)
    return names


def overlaps(image: Image.Image, pair: Sequence[str], drawings: dict[str, list[Drawing]]) -> np.ndarray:
    """Overlap of colours (2 halves, 2 subjects)."""
    x = np.asarray(image.convert("RGB"))
    halves = (x[:, :SIDE], x[:, -SIDE:])
    return np.array([[drawing_score(half, drawings[name]).hist for name in pair] for half in halves])


def shows_both(overlap: np.ndarray, sided: bool) -> bool:
    """Whether each half shows its own subject's colours and not the other's."""
    orders = [overlap] if sided else [overlap, overlap[::-1]]
    return any(all(o[k, k] > LEAST and o[k, k] > o[k, 1 - k] + MARGIN for k in range(2)) for o in orders)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/two-concepts"))
    parser.add_argument("--teach-steps", type=int, default=150)
    parser.add_argument("--pairs", type=int, default=20, help="of 45, drawn at random")
    parser.add_argument("--preset", default="quality")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    a = parser.parse_args()
    studio = Studio.open("tiny")
    names = teach_examples(studio, a.out, a.teach_steps)
    drawings = {name: references(name) for name in names}
    pairs = list(itertools.combinations(names, 2))
    pairs = [pairs[k] for k in np.random.default_rng(0).permutation(len(pairs))[: a.pairs]]
    for variant in a.variants:
        left, right, regions = VARIANTS[variant]
        rows, images, captions = [], [], []
        for pair, (seed, (text, sided)) in itertools.product(pairs, enumerate(PROMPTS, 11)):
            prompt = text.format(a=left.format(n=pair[0]), b=right.format(n=pair[1]))
            (image,) = studio.paint(prompt, seed=seed, steps=a.steps, preset=a.preset, regions=regions)
            overlap = overlaps(image, pair, drawings)
            rows.append((shows_both(overlap, sided or "@" in left), overlap))
            images.append(image)
            captions.append(f"{pair[0]} {pair[1]}" + " +" * rows[-1][0])
        right_ones = sum(both for both, _ in rows)
        mean = np.mean([overlap for _, overlap in rows], 0)
        to_own, to_other = np.trace(mean) / 2, (mean[0, 1] + mean[1, 0]) / 2
        facts = {"variant": variant, "preset": a.preset, "steps": a.steps}
        facts |= {"both": wilson_share(right_ones, len(rows)).percent().strip()}
        facts |= {"own": round(float(to_own), 3), "other": round(float(to_other), 3)}
        print(json.dumps(facts), flush=True)
        name = f"{variant.replace(' ', '-')}-{a.preset}-{a.steps}.png"
        contact_sheet(images, captions, columns=len(PROMPTS) * 5).save(a.out / name)


if __name__ == "__main__":
    main()
