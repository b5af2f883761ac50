"""How a concept taught on a base carries over to its few-step student: three rules, two fidelities.

    python -m benchmarks.transfer --json transfer.json

W is a value projection of the base, W' the student's, e the category's encoding, d the concept's value
difference, o = W e + d its value target. At the concept's token the student gets

    rebased    W' e + d           as concept files are defined: the difference carries over
    absolute   o                  the target carries over
    inverse    W' W^+ o           the encoding that would have produced the target carries over

and, for the first rule, the gate's bias and temperature on each preset.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.fewstep import CONCEPTS, Bench
from minikin import Studio
from minikin.evaluation import metrics
from minikin.evaluation.intervals import bootstrap_mean
from minikin.perfusion.concept import Concept
from minikin.perfusion.key_lock import category_encoding
from minikin.recipes import Paint

RULES = ("rebased", "absolute", "inverse")
PRESETS: dict[str, dict[str, Any]] = {
    "quality 25": {"steps": 25},
    "lcm 4": {"preset": "lcm", "steps": 4},
    "lcm-lora 4": {"preset": "lcm-lora", "steps": 4},
    "turbo 1": {"preset": "turbo", "steps": 1},
    "turbo 4": {"preset": "turbo", "steps": 4},
    "tdm 4": {"preset": "tdm", "steps": 4},
}
GATES = ((0.4, 0.15), (0.55, 0.15), (0.7, 0.15), (0.85, 0.15), (0.7, 0.05), (0.7, 0.3))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--only", nargs="*", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--mode", default="gated", choices=("gated", "value"), help="of the concepts")
    parser.add_argument("--concepts-folder", type=Path, help="keeps taught concepts for other runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench = Bench(2, args.base, CONCEPTS, args.mode, args.concepts_folder)
    concepts = {n: bench.studio.concepts.loaded[n].concept for n in CONCEPTS}
    rows = []
    for name in args.only:
        recipe = PRESETS[name]
        for rule in RULES if name != "quality 25" else RULES[:1]:
            with transferred(bench.studio, concepts, recipe, rule):
                rows.append({"preset": name, "rule": rule, **scores(bench, recipe)})
            print(rows[-1], flush=True)
        for beta, tau in GATES if args.mode == "gated" else ():
            rows.append({
                "preset": name, "beta": beta, "tau": tau, **scores(bench, {**recipe, "beta": beta, "tau": tau}),
            })  # fmt: skip
            print(rows[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1, default=str))


def scores(bench: Bench, recipe: dict[str, Any]) -> dict[str, Any]:
    """Subject fidelity and R-precision over all concepts and places."""
    fidelity, images, _, plain = bench.subject_scores(recipe)
    texts = bench.encoder.encode_texts(list(dict.fromkeys(plain)))
    return {
        "subject_fidelity": bootstrap_mean(fidelity, 0, plain),
        "r_precision": metrics.r_precision(bench.encoder.encode_images(images), texts, plain),
    }


@contextmanager
def transferred(
    studio: Studio, concepts: dict[str, Concept], recipe: dict[str, Any], rule: str
) -> Iterator[None]:
    """Inside, the concepts carry over to the recipe's student by this rule."""
    if rule == "rebased":
        yield
        return
    try:
        for concept in concepts.values():
            studio.add(replace(concept, delta=_delta(studio, concept, recipe, rule)))
        yield
    finally:
        for concept in concepts.values():
            studio.add(concept)


@torch.no_grad()
def _delta(studio: Studio, concept: Concept, recipe: dict[str, Any], rule: str) -> dict[str, torch.Tensor]:
    """The difference to W' e that gives the student's value of this rule."""
    base = studio.base
    e = category_encoding(base, concept.category)
    adapters = studio.resolve(Paint.make(prompt="", base=base.name, **recipe)).adapters
    before = {layer.path: _values(base, layer.path) for layer in base.layout.layers}
    with studio.adapters.using(adapters):
        after = {layer.path: _values(base, layer.path) for layer in base.layout.layers}
    moved = {}
    for path, delta in concept.delta.items():
        w, w_ = before[path], after[path]
        o = w @ e + delta.float()
        target = o if rule == "absolute" else w_ @ (torch.linalg.pinv(w) @ o)
        moved[path] = (target - w_ @ e).to(delta.dtype)
    return moved


def _values(base: Any, path: str) -> torch.Tensor:
    """Weight (width, D) of a cross-attention layer's value projection, with active LoRAs."""
    to_v = base.denoiser.get_submodule(path).to_v
    return to_v(torch.eye(to_v.in_features)).T.float()


if __name__ == "__main__":
    main()
