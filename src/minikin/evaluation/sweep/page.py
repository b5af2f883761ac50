"""The page of a sweep: drawing, operating points and all numbers in one HTML file that needs no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from minikin.evaluation.intervals import Measured
from minikin.evaluation.scores import References
from minikin.evaluation.sweep.points import Chosen
from minikin.evaluation.sweep.search import Found, Standing
from minikin.images.encode import MARKED

COLOURS = {"faithful": "#c2410c", "balanced": "#15803d", "creative": "#7e22ce"}
LABELS = {
    "recognised": "follows the prompt: share of images recognised",
    "alignment": "follows the prompt: text alignment (cosine)",
}
PICTURES = 6  # of each setting in the table

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto; max-width: 72rem;
  padding: 0 1rem; }
h1 { font-size: 1.35rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; max-width: 60rem; } .small { color: #666; font-size: .85rem; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; border-bottom: 2px solid #ccc; vertical-align: bottom; }
td { border-bottom: 1px solid #e5e5e5; } th, td { padding: .3rem .9rem .3rem 0; white-space: nowrap; }
td img { width: 64px; height: 64px; display: inline-block; margin-right: 2px; vertical-align: middle; }
b.name { border-radius: 3px; color: #fff; padding: 0 .4em; font-weight: 600; }
code { background: #f2f2f2; padding: .05em .3em; border-radius: 3px; }
"""


@dataclass(frozen=True)
class Shown:
    """Everything page and drawing show.

    facts     what OUT/PRESET.json holds
    images  files of the last round's images, for each of its settings, by prompt and seed
    """

    title: str
    facts: Mapping[str, Any]
    found: Found
    chosen: Chosen
    known: References
    measure: str
    pictures: list[list[Path]]

    @cached_property
    def order(self) -> list[int]:
        """The last round's settings by rising likeness, as they stand in the drawing."""
        return sorted(range(len(self.found.last)), key=lambda i: self.found.last[i].likeness.value)

    @cached_property
    def named(self) -> dict[int, list[str]]:
        """The operating points' names by setting; one may have several."""
        found: dict[int, list[str]] = {}
        for name, i in self.chosen.named.items():
            found.setdefault(i, []).append(name)
        return found

    @cached_property
    def numbers(self) -> dict[int, int]:
        """The settings' numbers in the table."""
        return {i: k + 1 for k, i in enumerate(self.order)}


def write(shown: Shown) -> str:
    """The page as text."""
    from minikin.evaluation.sweep import figure

    f = shown.facts
    drawing = figure.draw(shown, "svg").decode()
    drawing = drawing[drawing.index("<svg") :]
    title, name = html.escape(f"Sweep of {shown.title}"), html.escape(str(f["concept"]["name"]))
    among = f"{f['among_photos']:.3f}" if f["among_photos"] is not None else "not known for one photo"
    judge = f["judge"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p>{f["tried"]} settings were tried, {f["second_round"]} of them on {len(f["prompts"])} prompts; what is
reported was painted anew: {len(f["prompts"])} prompts, {len(f["seeds"])} pictures each, {f["steps"]} steps.
In prompts <code>&lt;{name}&gt;</code> now means <i>balanced</i>; <code>&lt;{name}:faithful&gt;</code> and
<code>&lt;{name}:creative&gt;</code> are the others.</p>
<figure>{drawing}</figure>
<h2>Measured settings, with 95 % intervals over prompts</h2>
<div class="scroll"><table><thead><tr><th>no.</th><th></th><th>strength</th><th>tau</th><th>guidance</th>
<th>category<br>first</th><th>likeness</th><th>held-out<br>likeness</th><th>recognised</th><th>text<br>alignment</th>
<th>pictures</th></tr></thead><tbody>
{"".join(_row(shown, i) for i in shown.order)}</tbody></table></div>
<p class="small">Likeness of the {f["photos"]} photos among themselves: {among}. Hypervolume of the front above
(0, 0): {f["hypervolume"]:.4f}. Judge: {html.escape(judge["name"])} ({html.escape(judge["source"])},
{html.escape(judge["licence"])}, {html.escape(judge["digest"])}); numbers of two judges do not compare.</p>
<h2>Prompts</h2>
<ol class="small">{"".join(f"<li>{html.escape(p)}</li>" for p in f["prompts"])}</ol>
</body></html>
"""


def _row(shown: Shown, i: int) -> str:
    one = shown.found.last[i]
    cells = [str(shown.numbers[i]), _names(shown, i), *_setting(one)]
    cells += [value(m) for m in (one.likeness, one.held_out, one.recognised, one.alignment)]
    cells.append("".join(inline(p.read_bytes()) for p in _some(shown.pictures[i])))
    return "<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>\n"


def _names(shown: Shown, i: int) -> str:
    told = [f'<b class="name" style="background:{COLOURS[n]}">{n}</b>' for n in shown.named.get(i, [])]
    if i == 0:
        told.append("as taught")
    return "<br>".join(told) or ("front" if i in shown.chosen.front else "")


def _setting(one: Standing) -> list[str]:
    s = one.setting
    span = "" if s.interval == (0.0, 1.0) else f", {s.interval[0]:.0%} to {s.interval[1]:.0%}"
    tau = "" if s.tau is None else f"{s.tau:g}"
    return [f"{s.strength:g}", tau, f"{s.guidance:g}{span}", f"{s.switch:.0%}" if s.switch else ""]


def value(m: Measured | None) -> str:
    """A number with its interval below it."""
    return "" if m is None else f'{m.value:.3f}<br><span class="small">[{m.low:.3f}, {m.high:.3f}]</span>'


def _some(paths: list[Path]) -> list[Path]:
    """Images of different prompts, evenly."""
    step = max(1, len(paths) // PICTURES)
    return paths[::step][:PICTURES]


def jpeg(image: Image.Image, side: int) -> bytes:
    """An image as a small JPEG, its longer side at most `side` px."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return MARKED.encode(small, "JPEG", quality=92)


def inline(data: bytes, alt: str = "") -> str:
    """A JPEG inside the page."""
    shown = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/jpeg;base64,{shown}">'
