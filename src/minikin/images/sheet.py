"""Contact sheets: grids of images with captions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP, LINE = 6, 15  # px


def contact_sheet(
    images: Sequence[Image.Image | None], captions: Sequence[str] | None = None, columns: int | None = None,
    title: str = "",
) -> Image.Image:  # fmt: skip
    """A grid of images of one size with captions below them, on white; None leaves a gap."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    w, h = next(image.size for image in images if image)
    font = ImageFont.load_default(size=11)
    lines = [wrapped(c, w, font) for c in captions] if captions else []
    by_row = [lines[i * columns : (i + 1) * columns] for i in range(rows)]
    below = [LINE * max((len(entry) for entry in row), default=0) + (4 if row else 0) for row in by_row]
    head = 26 if title else 0
    tops = [head + GAP + i * (h + GAP) + sum(below[:i]) for i in range(rows + 1)]
    sheet = Image.new("RGB", (columns * (w + GAP) + GAP, tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((GAP, 6), title, fill="black", font=ImageFont.load_default(size=14))
    for i, image in enumerate(images):
        x, y = GAP + i % columns * (w + GAP), tops[i // columns]
        if image:
            sheet.paste(image, (x, y))
        for k, text in enumerate(lines[i] if lines else []):
            draw.text((x, y + h + 3 + k * LINE), text, fill=(60, 60, 60), font=font)
    return sheet


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The text in lines of at most `width` pixels; a longer word gets a line of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
