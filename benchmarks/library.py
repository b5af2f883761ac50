"""A library of 100,000 concepts: listing, searching and loading by the index (goals: milliseconds)."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import timed
from minikin.models.identity import Origin
from minikin.perfusion import concept_file
from minikin.perfusion.concept import Concept
from minikin.perfusion.index import Index

N = 100_000
CATEGORIES = ("cat", "dog", "teddy bear", "boat", "cup", "car", "bird", "clock", "shoe", "backpack")


def _concept(name: str, category: str) -> bytes:
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2"
    none = torch.zeros(1)
    delta = {layer: torch.randn(1280, generator=torch.Generator().manual_seed(0))}
    return concept_file.to_bytes(
        Concept(name, category, "value", Origin("sd1", "0" * 64, "0" * 64), (), none, none, delta)
    )


def run(n: int = N) -> list[dict[str, Any]]:
    """Files are hard links to one file per category; the index reads each of them."""
    rows: list[dict[str, Any]] = []

    def row(what: str, times: dict[str, float], bar: float | None = None) -> None:
        ms = times["median_ms"]
        values = {"what": what, "value": f"{ms:,.1f} ms", "ms": round(ms, 2)}
        rows.append(values | ({"bar": f"<= {bar:g} ms", "holds": ms <= bar} if bar else {}))

    with tempfile.TemporaryDirectory() as place:
        folder, index = Path(place) / "concepts", Index(Path(place) / "index.sqlite")
        folder.mkdir()
        for k in range(n):
            category = CATEGORIES[k % len(CATEGORIES)]
            source = Path(place) / f"{k // 10_000}-{category}.safetensors"  # links to a file are limited
            if not source.exists():
                source.write_bytes(_concept("pet", category))
            os.link(source, folder / f"pet{k:06}.safetensors")
        past = time.time() - 60
        os.utime(folder, (past, past))
        row(f"the index of {n:,} files, from nothing", timed(lambda: index.count(folder), 1, 0))
        row("how many there are", timed(lambda: index.count(folder), 9, 0), 100)
        row("the first 50 by name", timed(lambda: index.search(folder, limit=50), 9, 0), 100)
        row("50 whose names hold '4242'", timed(lambda: index.search(folder, "4242", limit=50), 9, 0), 100)
        row("50 of category 'boat'", timed(lambda: index.search(folder, category="boat", limit=50), 9, 0), 100)
        row("categories and their numbers", timed(lambda: index.categories(folder), 9, 0), 100)
        row("all names", timed(lambda: index.search(folder), 3, 0))
        file = folder / f"pet{n // 2:06}.safetensors"
        row("loading one by its name", timed(lambda: concept_file.load(file), 9, 0), 20)
        (folder / "new.safetensors").write_bytes(_concept("new", "cat"))
        os.utime(folder, (past + 1, past + 1))
        row("the first look after one was added", timed(lambda: index.count(folder), 1, 0))
    return rows


if __name__ == "__main__":
    for row in run(int(sys.argv[1]) if len(sys.argv) > 1 else N):
        print(f"{row['what']:50} {row['value']:>14} {row.get('bar', '')}")
