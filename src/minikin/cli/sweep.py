"""The command sweep."""

from __future__ import annotations

from pathlib import Path

from minikin import files
from minikin.cli import display
from minikin.cli.demo import examples_folder
from minikin.errors import AssetError
from minikin.perfusion import library
from minikin.perfusion.concept_file import load
from minikin.recipes import Sweep
from minikin.studio import Studio


def run(recipe: Sweep, out: Path | None, *, as_json: bool) -> None:
    """Find operating points, write the report into the folder and the points into the concept's file."""
    path = library.resolve(recipe.concept)
    name = load(path).name
    if recipe.photos is None:
        recipe = recipe.model_copy(update={"photos": _example_photos(name)})
    out = out or path.with_name(f"{name}-sweep")
    with files.lock(out / ".lock", str(out)):
        studio = Studio.open(recipe.base, device=recipe.device, dtype=recipe.dtype)
        done = display.run(studio.sweeping(recipe, out), as_json=as_json)
    preset = done.facts["preset"]
    if as_json:
        display.emit({"event": "done", **done.facts, "points": {n: p.record() for n, p in done.result.items()}})
        return
    for point_name, p in done.result.items():
        tau = "" if p.tau is None else f"  tau {p.tau:g}"
        span = "" if p.interval == (0.0, 1.0) else f" from {p.interval[0]:.0%} to {p.interval[1]:.0%}"
        first = f"  category first {p.concept_start:.0%}" if p.concept_start else ""
        display.out.print(
            f"{point_name:9} strength {p.strength:g}{tau}  guidance {p.guidance:g}{span}{first}"
            f"  (subject fidelity {p.subject_fidelity:.3f}, prompt fidelity {p.prompt_fidelity:.3f})",
            soft_wrap=True,
        )
    stored = done.facts["stored"]
    display.out.print(
        (f"{stored}  has them now: <{name}> means balanced with preset {preset}\n" if stored else "")
        + f"{out / preset}.html  page\n{out / preset}.png  front\n{out / preset}.json  numbers",
        soft_wrap=True,
    )  # fmt: skip


def _example_photos(name: str) -> str | None:
    """The photos of an example of this name; None when there is no such example."""
    try:
        folder = examples_folder() / name
    except AssetError:
        return None
    return str(folder) if folder.is_dir() else None
