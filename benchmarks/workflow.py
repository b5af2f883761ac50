"""Refine and inpaint: seams of enlarged images, times, and the images of docs/workflow.md.

python -m benchmarks workflow       seams and times
python benchmarks/workflow.py       the same, and docs/workflow-*.jpg
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.seams import seams
from minikin import Studio
from minikin.images.sheet import contact_sheet

CAR = "a photo of a red car in the snow"
DOG = "a photo of a dog in the meadow"
SEEDS = range(6)
DOC_SEEDS = {"dog": 2, "teapot": 6, "wide": 4}  # seeds of the images of docs/, chosen by eye of eight each
BORDERS = (64, 128, 192)  # of overlapping tiles of 128 px in 256
ROOT = Path(__file__).resolve().parents[1]


def naive(studio: Studio, draft: Image.Image, seed: int, **recipe: Any) -> Image.Image:
    """Control: four tiles refined separately and put side by side."""
    enlarged, sheet = draft.resize((256, 256), Image.Resampling.LANCZOS), Image.new("RGB", (256, 256))
    for k, (x, y) in enumerate([(0, 0), (128, 0), (0, 128), (128, 128)]):
        tile = enlarged.crop((x, y, x + 128, y + 128))
        sheet.paste(studio.refine(tile, prompt=CAR, seed=seed + 100 * k, **recipe)[0], (x, y))
    return sheet


def run() -> list[dict[str, Any]]:
    """Seams of six images refined at twice the size, by tiled diffusion and in separate tiles; times."""
    studio = Studio.open("tiny")
    rows = []
    for strength in (0.3, 0.5):
        recipe: dict[str, Any] = {"steps": 8, "strength": strength}
        ours, theirs = [], []
        for seed in SEEDS:
            draft = studio.paint(CAR, seed=seed, steps=8)[0]
            (large,) = studio.refine(draft, prompt=CAR, size="2x", seed=seed, **recipe)
            ours.append(seams(large, BORDERS, BORDERS))
            theirs.append(seams(naive(studio, draft, seed, **recipe), [128], [128]))
        for name, values in (("tiled diffusion", ours), ("separate tiles", theirs)):
            value = f"{statistics.median(values):.2f} ({min(values):.2f}, {max(values):.2f})"
            rows.append({"what": f"seams at 2x, strength {strength}, {name}", "value": value})
    mask = np.zeros((128, 128), bool)
    mask[40:100, 40:100] = True
    for name, work in {
        "paint, 25 steps": lambda: studio.paint(CAR),
        "refine, 25 steps at 0.4 (10 run)": lambda: studio.refine(draft, prompt=CAR),
        "refine 2x, the same (9 tiles)": lambda: studio.refine(draft, prompt=CAR, size="2x"),
        "inpaint, 25 steps": lambda: studio.inpaint(draft, mask, CAR),
        "inpaint, turbo": lambda: studio.inpaint(draft, mask, CAR, preset="turbo"),
    }.items():
        work()
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        rows.append({"what": name, "value": f"{1000 * statistics.median(seconds):.0f} ms"})
    return rows


def show(folder: Path) -> None:
    """The images of docs/workflow.md."""
    studio = Studio.open("tiny")
    drafts = studio.paint(DOG, n=20, preset="tdm")
    small = [d.resize((96, 96), Image.Resampling.LANCZOS) for d in drafts]
    contact_sheet(small, [f"seed {k}" for k in range(20)], columns=10).save(
        folder / "workflow-drafts.jpg", quality=60
    )
    studio.teach(ROOT / "examples" / "my_teapot", name="my_teapot", category="teapot")
    draft = drafts[DOC_SEEDS["dog"]]
    (fine,) = studio.refine(draft, prompt=DOG, preset="quality", seed=DOC_SEEDS["dog"])
    mask = Image.new("L", fine.size)
    ImageDraw.Draw(mask).rectangle((10, 20, 118, 122), fill=255)
    beside = Image.composite(Image.blend(fine, Image.new("RGB", fine.size, "#b23a0e"), 0.6), fine, mask)
    (placed,) = studio.inpaint(fine, mask, "<my_teapot> in the meadow", seed=DOC_SEEDS["teapot"])
    (wide,) = studio.inpaint(fine, prompt="a meadow", extend="left=32,right=32", seed=DOC_SEEDS["wide"])
    images = [draft, fine, beside, placed, wide]
    captions = ["draft, tdm", "refined at 0.4", "mask", "<my_teapot>", "extended left and right"]
    row = Image.new("RGB", (sum(i.width + 6 for i in images) + 6, 128 + 30), "white")
    x = 6
    for image, caption in zip(images, captions, strict=True):
        row.paste(image, (x, 6))
        ImageDraw.Draw(row).text((x, 138), caption, fill=(60, 60, 60))
        x += image.width + 6
    row.save(folder / "workflow.jpg", quality=88)
    draft = studio.paint(CAR, seed=1, steps=8)[0]
    recipe: dict[str, Any] = {"steps": 8, "strength": 0.3}
    pair = [naive(studio, draft, 1, **recipe), studio.refine(draft, prompt=CAR, size="2x", seed=1, **recipe)[0]]
    scores = [seams(pair[0], [128], [128]), seams(pair[1], BORDERS, BORDERS)]
    labels = [f"separate tiles: {scores[0]:.1f}", f"tiles blended at every step: {scores[1]:.1f}"]
    contact_sheet(pair, labels, columns=2).save(folder / "workflow-seams.jpg", quality=85)


if __name__ == "__main__":
    for line in run():
        print(f"{line['what']:62} {line['value']}")
    show(ROOT / "docs")
