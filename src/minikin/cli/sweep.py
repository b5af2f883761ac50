"""minikin sweep: one call into the Studio, its lock, and what is printed at the end."""

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
    """Sweep into the folder and the concept's own file."""
    path = library.resolve(recipe.concept)
    name = load(path).name
    if recipe.photos is None:
        recipe = recipe.model_copy(update={"photos": _of_example(name)})
    out = out or path.with_name(f"{name}-sweep")
    with files.lock(out / ".lock", str(out)):
        studio = Studio.open(recipe.base, device=recipe.device, dtype=recipe.dtype)
        done = display.run(studio.sweeping(recipe, out), as_json=as_json)
    preset = done.facts["preset"]
    if as_json:
        display.emit({"event": "done", **done.facts, "points": {n: vars(p) for n, p in done.result.items()}})
        return
    for point_name, p in done.result.items():
        tau = "" if p.tau is None else f"  tau {p.tau:g}"
        span = "" if p.interval == (0.0, 1.0) else f" from {p.interval[0]:.0%} to {p.interval[1]:.0%}"
        first = f"  category first {p.switch:.0%}" if p.switch else ""
        display.out.print(
            f"{point_name:9} strength {p.strength:g}{tau}  guidance {p.guidance:g}{span}{first}"
            f"  (likeness {p.likeness:.3f}, follows {p.follows:.3f})",
            soft_wrap=True,
        )
    stored = done.facts["stored"]
    display.out.print(
        (f"{stored}  has them now: <{name}> means balanced with preset {preset}\n" if stored else "")
        + f"{out / preset}.html  page\n{out / preset}.png  front\n{out / preset}.json  numbers",
        soft_wrap=True,
    )  # fmt: skip


def _of_example(name: str) -> str | None:
    """The photos of an example concept that was taught under its own name."""
    try:
        folder = examples_folder() / name
    except AssetError:
        return None
    return str(folder) if folder.is_dir() else None
