"""The front as a drawing: likeness to the right, following the prompt upwards, images above.

One drawing serves as PNG and, as SVG, inside the page. Images stand in a row over the axes in the
order of their likeness, each joined to its point, so that they never cover each other.
"""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from minikin.errors import BadRecipe, extra
from minikin.evaluation.sweep.page import COLOURS, LABELS, Shown

PICTURES = 8  # at most, over the axes
SIZE = (10.0, 7.0)  # inches
INK, FAINT, LINE = "#222222", "#b9bec6", "#3b6ea8"


def check() -> None:
    """Raises BadRecipe when there is nothing to draw with, before anything is painted."""
    if find_spec("matplotlib") is None:
        raise BadRecipe(
            f"The front is drawn with matplotlib, which is not installed. Install it: {extra('judge')}."
        )


def draw(shown: Shown, kind: Literal["png", "svg"]) -> bytes:
    """The drawing as a file of this kind; equal for equal numbers and images."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "minikin", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=SIZE, facecolor="white")
        axes = figure.add_axes((0.075, 0.125, 0.905, 0.56))
        _points(axes, shown)
        _row(figure, axes, shown)
        if kind == "png":  # the page has the title itself
            figure.text(0.075, 0.972, shown.title, fontsize=13, color=INK, weight="bold", va="center")
        data = io.BytesIO()
        dateless = {"Date": None} if kind == "svg" else None
        figure.savefig(data, format=kind, dpi=130, bbox_inches="tight", pad_inches=0.15, metadata=dateless)
    return data.getvalue()


def _points(axes: Any, shown: Shown) -> None:
    last, chosen = shown.found.last, shown.chosen
    before = np.array([s.point for s in shown.found.before])
    n = len(shown.found.before)
    axes.scatter(*before.T, s=14, color=FAINT, linewidths=0, zorder=1, label=f"{n} settings of round 2")
    front = np.array([last[i].point for i in chosen.front])
    axes.plot(*front.T, color=LINE, linewidth=1.6, zorder=3, label="front")
    behind = False  # told once in the legend
    for i, one in enumerate(last):
        (x, y), colour = one.point, LINE if i in chosen.front else FAINT
        across = [[x - one.likeness.low], [one.likeness.high - x]]
        up = [[y - one.follows.low], [one.follows.high - y]]
        axes.errorbar(x, y, np.maximum(up, 0), np.maximum(across, 0), ecolor=colour, elinewidth=0.6, alpha=0.45,
                      zorder=2)  # fmt: skip
        if i not in shown.named:
            label = "" if i in chosen.front or behind else "behind the front"
            behind |= bool(label)
            axes.scatter(x, y, s=34, color=colour, zorder=4, edgecolors="white", linewidths=0.8,
                         label=label or None)  # fmt: skip
    for i, names in shown.named.items():
        axes.scatter(*last[i].point, s=90, color=COLOURS[names[0]], zorder=5, edgecolors="white",
                     linewidths=1.2, label=", ".join(names))  # fmt: skip
    axes.scatter(*last[0].point, s=110, marker="D", facecolors="none", edgecolors=INK, zorder=6, linewidths=1.2,
                 label="as taught")  # fmt: skip
    among = shown.known.among
    if among is not None and among <= axes.get_xlim()[1] + 0.05:
        axes.axvline(among, color=FAINT, linestyle=":", linewidth=1)
        axes.annotate("photos among themselves", (among, 0.99), xycoords=("data", "axes fraction"), rotation=90,
                      fontsize=8, color="#7a808a", ha="right", va="top")  # fmt: skip
    axes.set_xlabel("likeness: mean cosine with the photos")
    axes.set_ylabel(LABELS[shown.measure])
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.105), ncols=6, fontsize=8.5, frameon=False)


def _row(figure: Any, axes: Any, shown: Shown) -> None:
    """Images over the axes, in the order of likeness, joined to their points."""
    from matplotlib.patches import ConnectionPatch

    last, chosen = shown.found.last, shown.chosen
    picked = _picked(list(chosen.front), set(shown.named))
    height = 0.158
    width = height * SIZE[1] / SIZE[0]
    room = min(0.905 / len(picked), 0.16)
    margin = 0.075 + (0.905 - room * len(picked)) / 2
    for k, i in enumerate(picked):
        box = figure.add_axes((margin + room * k + (room - width) / 2, 0.74, width, height))
        box.imshow(np.asarray(_picture(shown.pictures[i])), interpolation="lanczos")
        box.set(xticks=[], yticks=[])
        names = shown.named.get(i, [])
        colour = COLOURS[names[0]] if names else LINE
        for spine in box.spines.values():
            spine.set(color=colour, linewidth=2.4 if names else 1.0)
        told = " ".join([f"{shown.numbers[i]}", *names[:1]]) + "".join(f"\n{name}" for name in names[1:])
        box.set_title(told, fontsize=9, color=colour, pad=3, weight="bold" if names else "normal")
        line = ConnectionPatch((0.5, 0), last[i].point, "axes fraction", "data", axesA=box, axesB=axes,
                               color=colour, linewidth=0.8, alpha=0.7)  # fmt: skip
        figure.add_artist(line)


def _picked(front: list[int], named: set[int]) -> list[int]:
    """At most PICTURES of the front, in its order; the named ones are always among them."""
    others = [i for i in front if i not in named]
    room = PICTURES - len(named)
    if len(others) > room:
        others = [others[int(k)] for k in np.linspace(0, len(others) - 1, room).round()]
    return [i for i in front if i in named or i in others]


def _picture(paths: list[Path]) -> Image.Image:
    with Image.open(paths[0]) as image:
        return image.convert("RGB").resize((128, 128), Image.Resampling.LANCZOS)
