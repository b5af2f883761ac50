"""Painted pictures to files: names that do not collide, recipes inside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minikin import __version__
from minikin.files import save_image
from minikin.painting.metadata import png_info
from minikin.painting.paint import Painted
from minikin.painting.schedulers import scheduler_name
from minikin.recipes import Paint


def settings(recipe: Paint, facts: dict[str, Any], one: Painted) -> dict[str, Any]:
    """The `Key: value` pairs of A1111's infotext for one picture."""
    return {
        "Steps": recipe.steps,
        "Sampler": scheduler_name(recipe.scheduler) if recipe.scheduler else "base default",
        "CFG scale": f"{facts['guidance']:g}",
        "Seed": one.seed,
        "Size": f"{one.image.width}x{one.image.height}",
        "Model hash": facts["base"]["fingerprint"][:10],
        "Model": facts["base"]["name"],
        "RNG": "CPU",
        "Version": f"minikin {__version__}",
    }


def save_pictures(
    painted: Sequence[Painted], recipe: Paint, facts: dict[str, Any], out: Path, *, metadata: bool = True
) -> list[Path]:
    """Write PNGs. `out` is a folder, or a .png name (numbered when there are several)."""
    paths = []
    for path, one in zip(_paths(painted, recipe, out), painted, strict=True):
        save_image(one.image, path, info=_info(recipe, facts, one) if metadata else None)
        paths.append(path)
    return paths


def _info(recipe: Paint, facts: dict[str, Any], one: Painted) -> Any:
    own = {**facts, "seed": one.seed}
    return png_info(own, recipe.prompt, recipe.negative, settings(recipe, facts, one))


def _paths(painted: Sequence[Painted], recipe: Paint, out: Path) -> list[Path]:
    if out.suffix.lower() == ".png":
        if len(painted) == 1:
            return [out]
        return [out.with_name(f"{out.stem}-{one.seed}.png") for one in painted]
    words = re.findall(r"[a-z0-9]+", recipe.prompt.lower())
    slug = "-".join(words)[:40].strip("-") or "picture"
    taken = {p.name for p in out.glob(f"{slug}-*")} if out.is_dir() else set()
    paths = []
    for one in painted:
        name, k = f"{slug}-{one.seed}.png", 2
        while name in taken:
            name, k = f"{slug}-{one.seed}.{k}.png", k + 1
        taken.add(name)
        paths.append(out / name)
    return paths
