"""Scaling of generation and training with workers on one machine, on tiny; and the speed of the driver alone.

    python -m benchmarks.fleet [--workers 1,2] [--lines 64] [--steps 20] [--concepts 4] [--teach-steps 100]

Each worker has one thread, so that two workers have twice the machine of one. The time is from the first result
to the last, once every worker runs; the start is a number of its own. Run it on an idle machine.
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
    """Seconds until the first result and until the end, and results a second in between."""
    started, first, last, at_first = time.monotonic(), 0.0, 0.0, 0
    facts: dict[str, Any] = {}
    for event in work:
        now = time.monotonic() - started
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
    text = "".join(json.dumps({"prompt": SCENES[i % 4], "seed": i}) + "\n" for i in range(lines))
    (folder / "prompts.jsonl").write_text(text)
    prompts = Prompts(folder / "prompts.jsonl", {"steps": steps})
    opening = partial(studio_engine, "tiny", "cpu", None)
    return timed(paint(prompts, folder / "images", cluster, opening, batch=4, chunk=4))


def teaching(cluster: Cluster | None, folder: Path, concepts: int, steps: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for k in range(4):
        Image.fromarray(rng.integers(0, 255, (128, 128, 3), np.uint8)).save(folder / "photos" / f"{k}.png")
    text = "".join(f"photos,pet{i},cat,{i}\n" for i in range(concepts))
    (folder / "m.csv").write_text("photos,name,category,seed\n" + text)
    table = rows(folder / "m.csv", {"steps": steps, "sample_every": 0, "mask": "none", "preview": False})
    return timed(teach(table, folder / "concepts", cluster))


def driver(folder: Path, lines: int = 20_000) -> dict[str, float]:
    """Lines a second that one process reads, checks and hashes, without workers."""
    path = folder / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": SCENES[i % 4], "seed": i}) + "\n" for i in range(lines)))
    started = time.monotonic()
    n = sum(len(chunk) for chunk in Prompts(path, {}).chunks(16))
    return {"lines a second": round(n / (time.monotonic() - started))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2", help="numbers of workers, 0 for this process without Ray")
    parser.add_argument("--lines", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--concepts", type=int, default=4, help="0 for none")
    parser.add_argument("--teach-steps", type=int, default=100)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps({"driver": driver(Path(name)), "cores": os.cpu_count()}), flush=True)
        for n in map(int, args.workers.split(",")):
            cluster = Cluster(n, cpus=1, gpus=0) if n else None
            folder = Path(name) / str(n)
            folder.mkdir()
            row: dict[str, Any] = {
                "workers": n,
                "painting": painting(cluster, folder, args.lines, args.steps),
            }
            if args.concepts:
                row["teaching"] = teaching(cluster, folder, args.concepts, args.teach_steps)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
