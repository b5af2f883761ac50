"""A library of 100,000 concepts: listing, searching and loading by the index (bars: milliseconds)."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minikin.models.identity import Origin
from minikin.perfusion import concept_file
from minikin.perfusion.concept import Concept
from minikin.perfusion.index import Index

N = 100_000
CATEGORIES = ("cat", "dog", "teddy bear", "boat", "cup", "car", "bird", "clock", "shoe", "backpack")


def _concept(name: str, category: str) -> bytes:
    site = "mid_block.attentions.0.transformer_blocks.0.attn2"
    none = torch.zeros(1)
    delta = {site: torch.randn(1280, generator=torch.Generator().manual_seed(0))}
    return concept_file.to_bytes(
        Concept(name, category, "value", Origin("sd1", "0" * 64, "0" * 64), (), none, none, delta)
    )


def _ms(work: Callable[[], object], times: int = 9) -> float:
    """The median of a few runs."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - began))
    return sorted(taken)[times // 2]


def run(n: int = N) -> list[dict[str, Any]]:
    """Files are hard links to one a category, 1,000 at a time: the index reads each all the same."""
    rows: list[dict[str, Any]] = []

    def row(what: str, ms: float, bar: float | None = None) -> None:
        told = {"what": what, "value": f"{ms:,.1f} ms", "ms": round(ms, 2)}
        rows.append(told | ({"bar": f"<= {bar:g} ms", "holds": ms <= bar} if bar else {}))

    with tempfile.TemporaryDirectory() as place:
        folder, index = Path(place) / "concepts", Index(Path(place) / "index.sqlite")
        folder.mkdir()
        for k in range(n):
            category = CATEGORIES[k % len(CATEGORIES)]
            source = Path(place) / f"{k // 10_000}-{category}.safetensors"  # links to one file are limited
            if not source.exists():
                source.write_bytes(_concept("pet", category))
            os.link(source, folder / f"pet{k:06}.safetensors")
        past = time.time() - 60
        os.utime(folder, (past, past))
        row(f"the index of {n:,} files, from nothing", _ms(lambda: index.count(folder), 1))
        row("how many there are", _ms(lambda: index.count(folder)), 100)
        row("the first 50 by name", _ms(lambda: index.search(folder, limit=50)), 100)
        row("50 whose names hold '4242'", _ms(lambda: index.search(folder, "4242", limit=50)), 100)
        row("50 of category 'boat'", _ms(lambda: index.search(folder, category="boat", limit=50)), 100)
        row("categories and their numbers", _ms(lambda: index.categories(folder)), 100)
        row("all names", _ms(lambda: index.search(folder), 3))
        row(
            "loading one by its name",
            _ms(lambda: concept_file.load(folder / f"pet{n // 2:06}.safetensors")),
            20,
        )
        (folder / "new.safetensors").write_bytes(_concept("new", "cat"))
        os.utime(folder, (past + 1, past + 1))
        row("the first look after one was added", _ms(lambda: index.count(folder), 1))
    return rows


if __name__ == "__main__":
    for one in run(int(sys.argv[1]) if len(sys.argv) > 1 else N):
        print(f"{one['what']:50} {one['value']:>14} {one.get('bar', '')}")
