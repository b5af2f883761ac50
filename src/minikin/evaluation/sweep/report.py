"""Report of a sweep: what was measured as JSON, the front as PNG, and one HTML page that needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minikin.evaluation import plots, report
from minikin.evaluation.sweep.points import Selection
from minikin.evaluation.sweep.search import GridResult, SearchResult
from minikin.files import atomic_write

IMAGES = 6  # per row of the table
SCORES = ("subject_fidelity", "held_out", "text_alignment", "r_precision")


@dataclass(frozen=True)
class SweepReport:
    """Everything that page and drawing show.

    facts   run, encoder, prompts and seeds, as plain data
    images  files of the last round's images, for each of its results, by prompt and seed
    """

    title: str
    facts: Mapping[str, Any]
    search: SearchResult
    selection: Selection
    metric: str
    upper_bound: float | None
    images: list[list[Path]]

    @cached_property
    def order(self) -> list[int]:
        """Results of the last round by rising subject fidelity, as they stand in the drawing."""
        last = self.search.last
        return sorted(range(len(last)), key=lambda i: last[i].scores.subject_fidelity.value)

    @cached_property
    def names(self) -> dict[int, list[str]]:
        """Operating points by result; a result may be several."""
        names: dict[int, list[str]] = {}
        for name, i in self.selection.points.items():
            names.setdefault(i, []).append(name)
        return names

    @cached_property
    def numbers(self) -> dict[int, int]:
        """Numbers of the results in the table."""
        return {i: k + 1 for k, i in enumerate(self.order)}

    def write(self, folder: Path, name: str) -> None:
        """NAME.json, NAME.png and NAME.html in the folder. Raises StorageError."""
        atomic_write(folder / f"{name}.json", json.dumps(self.as_json(), indent=1).encode())
        atomic_write(folder / f"{name}.png", plots.draw_sweep(self, "png"))
        atomic_write(folder / f"{name}.html", self.html().encode())

    def as_json(self) -> dict[str, Any]:
        last, selection = self.search.last, self.selection
        return {
            **self.facts,
            "prompt_fidelity": self.metric, "real_image_upper_bound": self.upper_bound,
            "tried": self.search.tried, "second_round": len(self.search.second),
            "hypervolume": selection.hypervolume,
            "as_taught": _row(last[0]), "front": [_row(last[i]) for i in selection.front],
            "measured": [_row(r) for r in last],
            "points": {name: _row(last[i]) for name, i in selection.points.items()},
        }  # fmt: skip

    def html(self) -> str:
        rows = [
            {
                "result": self.search.last[i], "number": self.numbers[i], "names": self.names.get(i, []),
                "default": i == 0, "on_front": i in self.selection.front,
                "images": report.spread(self.images[i], IMAGES),
            }
            for i in self.order
        ]  # fmt: skip
        return report.render(
            "sweep.html",
            title=f"Sweep of {self.title}",
            facts=self.as_json(),
            name=self.facts["concept"]["name"],
            prompts=self.facts["prompts"],
            rows=rows,
            colours=plots.POINT_COLOURS,
            drawing=report.svg(plots.draw_sweep(self, "svg")),
        )


def _row(result: GridResult) -> dict[str, Any]:
    estimates = {name: getattr(result.scores, name) for name in SCORES}
    return asdict(result.point) | {name: e and asdict(e) for name, e in estimates.items()}
