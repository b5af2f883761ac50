"""Teaching one example concept on tiny until it stops by itself (bar: <= 60 s on two cores)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from minikin import Studio
from minikin.recipes import Teach

EXAMPLES = Path(__file__).parents[1] / "examples"


def run() -> list[dict[str, Any]]:
    studio = Studio.open("tiny", device="cpu")
    rows = []
    for name, category in (("my_teapot", "teapot"), ("my_backpack", "backpack")):
        for mode in ("gated", "row"):
            recipe = Teach(name=name, category=category, mode=mode, sample_every=0)  # type: ignore[arg-type]
            start = time.perf_counter()
            done = list(studio.teaching(EXAMPLES / name, recipe))[-1]
            seconds = time.perf_counter() - start
            facts = done.facts  # type: ignore[union-attr]
            rows.append({"what": f"teach {name}, {mode}: {facts['steps']} steps, best at {facts['best_step']}",
                         "value": f"{seconds:.1f} s", "bar": "<= 60 s", "holds": seconds <= 60})  # fmt: skip
    return rows
