"""Packing prompts and switching concepts on tiny.

Bars: a prompt with three concepts <= 10 ms; switching among 100 loaded concepts costs the same as
among 2 (ratio in one run).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from benchmarks.measure import alternating, spread, timed
from minikin.models.base import Base
from minikin.models.loading.registry import open_base
from minikin.models.prompt import parse
from minikin.perfusion import edit
from minikin.perfusion.attach import Concepts
from minikin.perfusion.concept import Concept
from minikin.perfusion.conditioning import condition, unpacked_delta
from minikin.perfusion.covariance import covariance
from minikin.perfusion.key_lock import category_encoding


def random_concept(base: Base, name: str, seed: int) -> Concept:
    g = torch.Generator().manual_seed(seed)
    e = category_encoding(base, "cat").cpu()
    return Concept(
        name=name, category="cat", mode="gated", origin=base.origin,
        word_deltas=tuple(0 * w for w in base.word_vectors("cat")),
        i_star=(i := e + 0.1 * torch.randn(e.shape, generator=g)),
        dual=edit.dual(i, covariance(base).inverse),
        delta=unpacked_delta(base, torch.randn(base.layout.n_values, generator=g)),
        c_hash=covariance(base).hash,
    )  # fmt: skip


def run() -> list[dict[str, Any]]:
    base = open_base("tiny", device="cpu")
    concepts = Concepts(base)
    for k in range(100):
        concepts.add(random_concept(base, f"c{k}", k))
    few = {n: concepts.loaded[n] for n in ("c0", "c1")}
    three = parse("<c0> and <c1:0.8> with <c2> on the beach", concepts.categories)
    t = timed(lambda: condition(base, [three], concepts.loaded), 50)
    rows = [{"what": "pack a prompt with three concepts", "value": f"{t['median_ms']:.1f} ms",
             "bar": "<= 10 ms", "holds": t["median_ms"] <= 10, **t}]  # fmt: skip

    def switching(names: list[str], loaded: Any) -> Any:
        prompts = itertools.cycle([parse(f"a photo of <{n}>", concepts.categories) for n in names])
        return lambda: condition(base, [next(prompts)], loaded)

    among_2 = switching(["c0", "c1"], few)
    among_100 = switching(list(concepts.loaded), concepts.loaded)
    ratios = sorted(b / a for a, b in alternating(among_2, among_100, 7, 30))
    rows.append({"what": "switching among 100 concepts / among 2 (7 runs: least, median, most)",
                 "value": spread(ratios), "bar": "about 1",
                 "holds": ratios[3] <= 1.1})  # fmt: skip
    return rows
