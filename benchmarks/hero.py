"""The README's first image, docs/hero.png: photos, the file they become, and scenes painted with it.

    make demo && python -m benchmarks.hero [FOLDER]

FOLDER is that of the demo, `demo` by default: its concept is painted and nothing is taught.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from minikin import Studio
from minikin.cli.demo import examples_folder
from minikin.images import xmp
from minikin.images.encode import save_image
from minikin.images.photos import load_photos
from minikin.perfusion import concept_file

CONCEPT = "my_teapot"
SCENES = ("in the snow", "in the forest", "in the desert", "at night")
SEED = 7
CELL, GAP, ARROW = 128, 8, 56  # px
TILE = 2 * CELL + GAP
CAPTION = 30
INK, PAPER, LINE = (40, 44, 52), (248, 248, 246), (205, 205, 200)
OUT = Path(__file__).parents[1] / "docs" / "hero.png"


def hero(folder: Path) -> Image.Image:
    """Three tiles with arrows between them."""
    path = folder / f"{CONCEPT}.safetensors"
    concept = concept_file.load(path)
    photos = load_photos(examples_folder() / CONCEPT)
    studio = Studio.open("tiny")
    studio.add(concept)
    scenes = [studio.paint(f"a photo of <{CONCEPT}> {scene}", seed=SEED)[0] for scene in SCENES]
    tiles = [
        (_grid([Image.fromarray(p.pixels) for p in photos[:4]]), f"{len(photos)} photos"),
        (_file(path.name, path.stat().st_size, concept.category), "one small file"),
        (_grid(scenes), f'"<{CONCEPT}> in the snow", ...'),
    ]
    sheet = Image.new("RGB", (3 * TILE + 2 * ARROW + 2 * GAP, TILE + CAPTION + 2 * GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (tile, caption) in enumerate(tiles):
        x = GAP + i * (TILE + ARROW)
        sheet.paste(tile, (x, GAP))
        draw.text((x + TILE / 2, GAP + TILE + 8), caption, INK, ImageFont.load_default(15), anchor="ma")
        if i:
            _arrow(draw, x - ARROW, GAP + TILE // 2)
    return sheet


def _grid(images: list[Image.Image]) -> Image.Image:
    tile = Image.new("RGB", (TILE, TILE), "white")
    for i, image in enumerate(images):
        small = image.resize((CELL, CELL), Image.Resampling.LANCZOS)
        tile.paste(small, (i % 2 * (CELL + GAP), i // 2 * (CELL + GAP)))
    return tile


def _file(name: str, size: int, category: str) -> Image.Image:
    """A sheet of paper with a folded corner, the file's name and its size."""
    tile = Image.new("RGB", (TILE, TILE), "white")
    draw = ImageDraw.Draw(tile)
    left, top, right, bottom, fold = 44, 12, TILE - 44, TILE - 12, 36
    outline = [(left, top), (right - fold, top), (right, top + fold), (right, bottom), (left, bottom)]
    draw.polygon(outline, PAPER, LINE, 2)
    draw.polygon(
        [(right - fold, top), (right - fold, top + fold), (right, top + fold)], (232, 232, 228), LINE, 2
    )
    middle = TILE / 2
    stem, _, suffix = name.partition(".")
    for y, text, height in (
        (78, stem, 20), (104, f".{suffix}", 15), (146, f"{size / 1000:.1f} KB", 26), (190, f"a {category}", 15),
    ):  # fmt: skip
        draw.text((middle, y), text, INK, ImageFont.load_default(height), anchor="ma")
    return tile


def _arrow(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    draw.line([(x + 10, y), (x + ARROW - 18, y)], INK, 4)
    draw.polygon([(x + ARROW - 24, y - 9), (x + ARROW - 24, y + 9), (x + ARROW - 8, y)], INK)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo"))
    args = parser.parse_args()
    image = hero(args.folder).quantize(256)
    print(save_image(image, OUT, source_type=xmp.COMPOSITE))


if __name__ == "__main__":
    main()
