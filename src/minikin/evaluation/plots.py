"""Drawings of Pareto fronts with matplotlib: subject fidelity to the right, prompt fidelity upwards.

Equal numbers and images give equal files.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from minikin.evaluation.experiment import open_images

if TYPE_CHECKING:
    from minikin.evaluation.compare.results import MethodResult
    from minikin.evaluation.sweep.report import SweepReport

MAX_IMAGES = 8  # above the axes of a sweep
SIZE = (10.0, 7.0)  # inches
INK, FAINT, LINE = "#222222", "#b9bec6", "#3b6ea8"
POINT_COLOURS = {"faithful": "#c2410c", "balanced": "#15803d", "creative": "#7e22ce"}
METHOD_COLOURS = ("#15803d", "#65a30d", "#7a808a", "#7e22ce", "#c026d3", "#c2410c", "#3b6ea8")
METHOD_MARKERS = "osvD^PX"
X_LABEL = "subject fidelity: mean cosine with the photos"
Y_LABELS = {
    "r_precision": "prompt fidelity: R-precision",
    "text_alignment": "prompt fidelity: text alignment (CLIP-T)",
}


def draw_sweep(report: SweepReport, kind: Literal["png", "svg"]) -> bytes:
    """All results of a sweep with intervals; images above the axes, each joined to its point."""

    def content(figure: Any) -> None:
        axes = figure.add_axes((0.075, 0.125, 0.905, 0.56))
        _sweep_points(axes, report)
        _image_row(figure, axes, report)
        if kind == "png":  # the page has a title of its own
            figure.text(0.075, 0.972, report.title, fontsize=13, color=INK, weight="bold", va="center")

    return _file(content, SIZE, kind, dpi=130, bbox_inches="tight", pad_inches=0.15)


def draw_methods(results: Mapping[str, MethodResult], metric: str, upper_bound: float | None) -> bytes:
    """Each method's strengths as points and their front as a line, as SVG."""

    def content(figure: Any) -> None:
        axes = figure.add_axes((0.075, 0.13, 0.66, 0.84))
        for k, (name, result) in enumerate(results.items()):
            colour, marker = METHOD_COLOURS[k % len(METHOD_COLOURS)], METHOD_MARKERS[k % len(METHOD_MARKERS)]
            points = result.fidelities
            axes.plot(*points[result.front].T, color=colour, linewidth=1.4)
            axes.scatter(*points.T, s=26, color=colour, marker=marker, alpha=0.7, linewidths=0)
            axes.scatter(*points[0], s=80, color=colour, marker=marker, edgecolors="white", label=name)
        _finish(axes, metric, upper_bound)
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, title="large: strength 1")

    return _file(content, (10.0, 4.6), "svg")


def _file(content: Any, size: tuple[float, float], kind: str, **options: Any) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "minikin", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=size, facecolor="white")
        content(figure)
        data = io.BytesIO()
        undated = {"Date": None} if kind == "svg" else None
        figure.savefig(data, format=kind, metadata=undated, **options)
    return data.getvalue()


def _finish(axes: Any, metric: str, upper_bound: float | None) -> None:
    if upper_bound is not None and upper_bound <= axes.get_xlim()[1] + 0.05:
        axes.axvline(upper_bound, color=FAINT, linestyle=":", linewidth=1)
        axes.annotate(
            "real-image upper bound",
            (upper_bound, 0.99),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=8,
            color="#7a808a",
            ha="right",
            va="top",
        )
    axes.set(xlabel=X_LABEL, ylabel=Y_LABELS[metric])
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _sweep_points(axes: Any, report: SweepReport) -> None:
    last, front = report.search.last, report.selection.front
    second = np.array([r.fidelities for r in report.search.second])
    label = f"{len(second)} settings of round 2"
    axes.scatter(*second.T, s=14, color=FAINT, linewidths=0, zorder=1, label=label)
    axes.plot(
        *np.array([last[i].fidelities for i in front]).T,
        color=LINE,
        linewidth=1.6,
        zorder=3,
        label="Pareto front",
    )
    in_legend = False
    for i, result in enumerate(last):
        (x, y), colour = result.fidelities, LINE if i in front else FAINT
        subject, prompt = result.scores.subject_fidelity, result.prompt_fidelity
        across, up = ([[m.value - m.low], [m.high - m.value]] for m in (subject, prompt))
        axes.errorbar(
            x, y, np.maximum(up, 0), np.maximum(across, 0), ecolor=colour, elinewidth=0.6, alpha=0.45, zorder=2
        )
        if i not in report.names:
            label = "" if i in front or in_legend else "dominated"
            in_legend |= bool(label)
            axes.scatter(
                x, y, s=34, color=colour, zorder=4, edgecolors="white", linewidths=0.8, label=label or None
            )
    for i, names in report.names.items():
        axes.scatter(
            *last[i].fidelities,
            s=90,
            color=POINT_COLOURS[names[0]],
            zorder=5,
            edgecolors="white",
            linewidths=1.2,
            label=", ".join(names),
        )
    axes.scatter(
        *last[0].fidelities,
        s=110,
        marker="D",
        facecolors="none",
        edgecolors=INK,
        zorder=6,
        linewidths=1.2,
        label="as taught",
    )
    _finish(axes, report.metric, report.upper_bound)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.105), ncols=6, fontsize=8.5, frameon=False)


def _image_row(figure: Any, axes: Any, report: SweepReport) -> None:
    """Images above the axes by rising subject fidelity, so that they never cover each other."""
    from matplotlib.patches import ConnectionPatch

    chosen = _spread(list(report.selection.front), set(report.names))
    height = 0.158
    width = height * SIZE[1] / SIZE[0]
    pitch = min(0.905 / len(chosen), 0.16)
    margin = 0.075 + (0.905 - pitch * len(chosen)) / 2
    for k, i in enumerate(chosen):
        box = figure.add_axes((margin + pitch * k + (pitch - width) / 2, 0.74, width, height))
        (image,) = open_images(report.images[i][:1])
        box.imshow(np.asarray(image.resize((128, 128), Image.Resampling.LANCZOS)), interpolation="lanczos")
        box.set(xticks=[], yticks=[])
        names = report.names.get(i, [])
        colour = POINT_COLOURS[names[0]] if names else LINE
        for spine in box.spines.values():
            spine.set(color=colour, linewidth=2.4 if names else 1.0)
        title = " ".join([f"{report.numbers[i]}", *names[:1]]) + "".join(f"\n{name}" for name in names[1:])
        box.set_title(title, fontsize=9, color=colour, pad=3, weight="bold" if names else "normal")
        line = ConnectionPatch(
            (0.5, 0),
            report.search.last[i].fidelities,
            "axes fraction",
            "data",
            axesA=box,
            axesB=axes,
            color=colour,
            linewidth=0.8,
            alpha=0.7,
        )
        figure.add_artist(line)


def _spread(front: Sequence[int], required: set[int]) -> list[int]:
    """At most MAX_IMAGES of the front, in its order; operating points are always among them."""
    others = [i for i in front if i not in required]
    places = MAX_IMAGES - len(required)
    if len(others) > places:
        others = [others[int(k)] for k in np.linspace(0, len(others) - 1, places).round()]
    return [i for i in front if i in required or i in others]
