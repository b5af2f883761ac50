"""The page of a comparison: drawings, tables and images in one HTML file that needs no network."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from minikin.evaluation.compare import report
from minikin.evaluation.compare.method_result import Standing
from minikin.evaluation.compare.methods import Taught
from minikin.evaluation.sweep.page import LABELS, STYLE, inline, jpeg

SIDE = 128  # px of an image
PICTURES = 6  # of a method in a course
PLAIN = 3  # of its plain category
COLOURS = ("#15803d", "#65a30d", "#7a808a", "#7e22ce", "#c026d3", "#c2410c", "#3b6ea8")
SHAPES = "osvD^PX"


def write(found: dict[str, Any], table: report.Table) -> str:
    """The page as text."""
    title = html.escape(report.heading(found))
    parts = [_course(found, table, k, name) for k, name in enumerate(found["courses"])]
    notes = "".join(f"<p>{html.escape(text)}</p>\n" for text in (*found["skipped"], found["not_measured"]))
    prompts = "".join(f"<li>{html.escape(p)}</li>" for p in found["prompts"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p>{html.escape(report.whence(found))}</p>
{"".join(parts)}{notes}<p class="small">{html.escape(report.READING)}</p>
<h2>Prompts</h2>
<ol class="small">{prompts}</ol>
</body></html>
"""


def _course(found: dict[str, Any], table: report.Table, k: int, name: str) -> str:
    standings = [(taught, of[k]) for taught, of in table]
    drawing = _draw(standings, LABELS[found["axis"]], found["among_photos"])
    head = "".join(f"<th>{h}</th>" for h in report.head(found))
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(text)}</td>" for text in row) + "</tr>\n"
        for row in report.rows(found, name)
    )
    before = _images(standings[0][1].before[:PLAIN])
    shown = f"<tr><td>plain base</td><td></td><td>{before}</td></tr>\n" + "".join(
        f"<tr><td>{taught.method}</td><td>{_images(_some(s.points[0].pictures))}</td>"
        f"<td>{_images(s.after[:PLAIN])}</td></tr>\n"
        for taught, s in standings
    )
    return f"""<h2>{html.escape(name)}</h2>
<figure>{drawing}</figure>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table></div>
<div class="scroll"><table><thead><tr><th></th><th>as taught (strength 1)</th>
<th>{html.escape(found["plain"])}, with it on</th></tr></thead><tbody>
{shown}</tbody></table></div>
"""


def _cell(text: str) -> str:
    """An interval stands below its value, so that all columns fit on a screen."""
    value, bracket, interval = html.escape(text).partition(" [")
    return f'{value}<br><span class="small">[{interval}</span>' if bracket else value


def _draw(standings: Sequence[tuple[Taught, Standing]], label: str, among: float | None) -> str:
    """Every method's strengths as points and their front as a line, as SVG; equal for equal numbers."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "minikin", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(10.0, 4.6), facecolor="white")
        axes: Any = figure.add_axes((0.075, 0.13, 0.66, 0.84))
        for k, (taught, s) in enumerate(standings):
            colour, shape = COLOURS[k % len(COLOURS)], SHAPES[k % len(SHAPES)]
            axes.plot(*s.places[s.front].T, color=colour, linewidth=1.4)
            axes.scatter(*s.places.T, s=26, color=colour, marker=shape, alpha=0.7, linewidths=0)
            axes.scatter(
                *s.places[0], s=80, color=colour, marker=shape, edgecolors="white", label=taught.method
            )
        if among is not None and among <= axes.get_xlim()[1] + 0.05:
            axes.axvline(among, color="#b9bec6", linestyle=":", linewidth=1)
        axes.set(xlabel="likeness: mean cosine with the photos", ylabel=label)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, title="large: strength 1")
        data = io.BytesIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
    drawing = data.getvalue().decode()
    return drawing[drawing.index("<svg") :]


def _some(paths: Sequence[Path]) -> Sequence[Path]:
    """Images of different prompts, evenly."""
    return paths[:: max(1, len(paths) // PICTURES)][:PICTURES]


def _images(paths: Sequence[Path]) -> str:
    found = []
    for path in paths:
        with Image.open(path) as image:
            found.append(inline(jpeg(image, SIDE)))
    return "".join(found)
