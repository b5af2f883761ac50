"""Contact sheets: many pictures on one, with captions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP, LINE = 6, 15  # px


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str] | None = None, columns: int | None = None,
    title: str = "",
) -> Image.Image:  # fmt: skip
    """A grid of equally large pictures, each with a caption under it, on white."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    w, h = images[0].size
    font = ImageFont.load_default(size=11)
    lines = [_wrapped(c, w, font) for c in captions] if captions else []
    below = LINE * max((len(entry) for entry in lines), default=0) + (4 if lines else 0)
    head = 26 if title else 0
    sheet = Image.new("RGB", (columns * (w + GAP) + GAP, rows * (h + below + GAP) + GAP + head), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((GAP, 6), title, fill="black", font=ImageFont.load_default(size=14))
    for i, image in enumerate(images):
        x, y = GAP + i % columns * (w + GAP), head + GAP + i // columns * (h + below + GAP)
        sheet.paste(image, (x, y))
        for k, text in enumerate(lines[i] if lines else []):
            draw.text((x, y + h + 3 + k * LINE), text, fill=(60, 60, 60), font=font)
    return sheet


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
