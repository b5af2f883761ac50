"""The command compare."""

from __future__ import annotations

from pathlib import Path

from minikin import files
from minikin.cli import display
from minikin.recipes import Compare
from minikin.studio import Studio


def run(recipe: Compare, out: Path, *, as_json: bool) -> None:
    """Compare the methods; the report goes into the folder."""
    with files.lock(out / ".lock", str(out)):
        studio = Studio.open(recipe.base, device=recipe.device, dtype=recipe.dtype)
        done = display.run(studio.comparing(recipe, out), as_json=as_json)
    if as_json:
        display.emit({"event": "done", **done.facts})
        return
    display.out.print(
        f"{done.result}  page with images\n{out / 'report.md'}  tables\n{out / 'report.csv'}  "
        f"one line per point\n{out / 'report.json'}  everything",
        soft_wrap=True,
    )  # fmt: skip
