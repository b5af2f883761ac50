"""How painting and teaching scale with workers on one machine, on tiny; and what the driver itself can do.

    python -m benchmarks.fleet [--workers 1,2] [--lines 64] [--steps 20] [--concepts 4] [--teach-steps 100]

Each worker has one thread, so that two workers have twice the machine of one. What is timed is the work: from
the first line to the last, once every worker is up; the start is a number of its own. Run it on a machine
that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minikin import events
from minikin.cluster.concept_table import rows
from minikin.cluster.paint import paint
from minikin.cluster.paint_worker import studio_engine
from minikin.cluster.pool import Cluster
from minikin.cluster.prompts import Prompts
from minikin.cluster.teach import teach

SCENES = ("a photo of a cat on the beach", "a red ball", "a dog in the snow", "a house at night")


def timed(work: Iterator[events.Event]) -> dict[str, float]:
    """Seconds until something is done first, and from then to the end; with how much was done in each."""
    begun, first, last, at_first = time.monotonic(), 0.0, 0.0, 0
    facts: dict[str, Any] = {}
    for event in work:
        now = time.monotonic() - begun
        if isinstance(event, events.Progress) and event.done and not first:
            first, at_first = now, event.done
        if isinstance(event, events.Progress):
            last = now if event.done == event.total and not last else last
            total = event.total
        if isinstance(event, events.Done):
            facts = event.facts
    assert not facts.get("failed"), facts
    return {
        "until the first, s": round(first, 2), "whole, s": round(last, 2),
        "a second": round((total - at_first) / max(last - first, 1e-9), 3),
    }  # fmt: skip


def painting(cluster: Cluster | None, folder: Path, lines: int, steps: int) -> dict[str, float]:
    told = "".join(json.dumps({"prompt": SCENES[i % 4], "seed": i}) + "\n" for i in range(lines))
    (folder / "prompts.jsonl").write_text(told)
    prompts = Prompts(folder / "prompts.jsonl", {"steps": steps})
    opening = partial(studio_engine, "tiny", "cpu", None)
    return timed(paint(prompts, folder / "pictures", cluster, opening, batch=4, chunk=4))


def teaching(cluster: Cluster | None, folder: Path, concepts: int, steps: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for k in range(4):
        Image.fromarray(rng.integers(0, 255, (128, 128, 3), np.uint8)).save(folder / "photos" / f"{k}.png")
    told = "".join(f"photos,pet{i},cat,{i}\n" for i in range(concepts))
    (folder / "m.csv").write_text("photos,name,category,seed\n" + told)
    asked = rows(folder / "m.csv", {"steps": steps, "sample_every": 0, "mask": "none", "preview": False})
    return timed(teach(asked, folder / "concepts", cluster))


def driver(folder: Path, lines: int = 20_000) -> dict[str, float]:
    """Lines a second that one process reads, checks and hashes, with no workers at all."""
    path = folder / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": SCENES[i % 4], "seed": i}) + "\n" for i in range(lines)))
    begun = time.monotonic()
    n = sum(len(chunk) for chunk in Prompts(path, {}).chunks(16))
    return {"lines a second": round(n / (time.monotonic() - begun))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2", help="numbers of workers, 0 for this process without Ray")
    parser.add_argument("--lines", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--concepts", type=int, default=4, help="0 for none")
    parser.add_argument("--teach-steps", type=int, default=100)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps({"driver": driver(Path(name)), "cores": os.cpu_count()}), flush=True)
        for n in map(int, asked.workers.split(",")):
            cluster = Cluster(n, cpus=1, gpus=0) if n else None
            folder = Path(name) / str(n)
            folder.mkdir()
            told: dict[str, Any] = {
                "workers": n,
                "painting": painting(cluster, folder, asked.lines, asked.steps),
            }
            if asked.concepts:
                told["teaching"] = teaching(cluster, folder, asked.concepts, asked.teach_steps)
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
