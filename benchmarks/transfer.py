"""How a concept taught on a base goes to its few-step sibling: three rules, likeness and text alignment.

    python -m benchmarks.transfer --json transfer.json

W is a value projection of the base, W' the student's, e the category's encoding, d the concept's value
difference, o = W e + d its value target. At the concept's token the student is given

    rebased    W' e + d           what a concept file means: the difference travels
    absolute   o                  the target travels
    inverse    W' W^+ o           the target travels as the encoding that would have made it

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

from benchmarks.fewstep import CONCEPTS, PLACES, Bench
from benchmarks.many import paint_many
from minikin import Studio
from minikin.evaluation import metrics
from minikin.models.prompt import parse
from minikin.perfusion.concept import Concept
from minikin.perfusion.key_lock import category_encoding
from minikin.recipes import Paint

RULES = ("rebased", "absolute", "inverse")
PRESETS: dict[str, dict[str, Any]] = {
    "quality 25": {"steps": 25}, "lcm 4": {"preset": "lcm", "steps": 4},
    "lcm-lora 4": {"preset": "lcm-lora", "steps": 4},
    "turbo 1": {"preset": "turbo", "steps": 1}, "turbo 4": {"preset": "turbo", "steps": 4},
    "tdm 4": {"preset": "tdm", "steps": 4},
}  # fmt: skip
GATES = ((0.4, 0.15), (0.55, 0.15), (0.7, 0.15), (0.85, 0.15), (0.7, 0.05), (0.7, 0.3))
COPIES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--only", nargs="*", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--mode", default="gated", choices=("gated", "value"), help="of teaching")
    parser.add_argument("--kept", type=Path, help="folder of the taught concepts, to use them again")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench = Bench(2, args.base, CONCEPTS, args.mode, args.kept)
    own = {n: bench.studio.concepts.loaded[n].concept for n in CONCEPTS}
    rows = []
    for name in args.only:
        how = PRESETS[name]
        for rule in RULES if name != "quality 25" else RULES[:1]:
            with following(bench.studio, own, how, rule):
                rows.append({"preset": name, "rule": rule, **judged(bench, how)})
            print(rows[-1], flush=True)
        for beta, tau in GATES if args.mode == "gated" else ():  # a row has no gate
            found = judged(bench, {**how, "beta": beta, "tau": tau})
            rows.append({"preset": name, "beta": beta, "tau": tau, **found})
            print(rows[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1, default=str))


def judged(bench: Bench, how: dict[str, Any]) -> dict[str, Any]:
    """Likeness and alignment over all concepts and places."""
    texts, plain = [], []
    for name in bench.photos:
        category = bench.studio.concepts.loaded[name].concept.category
        texts += [f"a photo of <{name}> {p}" for p in PLACES for _ in range(COPIES)]
        plain += [f"a photo of a {category} {p}" for p in PLACES for _ in range(COPIES)]
    pictures = paint_many(bench.studio, texts, range(len(texts)), **how)
    things, seen, each = (
        bench.judge.likeness(pictures),
        bench.judge.images(pictures),
        len(texts) // len(bench.photos),
    )
    values = torch.cat([(things[i * each : (i + 1) * each].double() @ photos.double().T).mean(1)
                        for i, photos in enumerate(bench.photos.values())])  # fmt: skip
    different = list(dict.fromkeys(plain))
    return {
        "likeness": metrics.mean(values.numpy(), 0, plain),
        "recognised": metrics.recognised(seen, bench.judge.texts(different), plain),
    }  # fmt: skip


@contextmanager
def following(studio: Studio, own: dict[str, Concept], how: dict[str, Any], rule: str) -> Iterator[None]:
    """Inside, the concepts follow this rule."""
    if rule == "rebased":
        yield
        return
    try:
        for concept in own.values():
            studio.add(replace(concept, delta=_moved(studio, concept, how, rule)))
        yield
    finally:
        for concept in own.values():
            studio.add(concept)


@torch.no_grad()
def _moved(studio: Studio, concept: Concept, how: dict[str, Any], rule: str) -> dict[str, torch.Tensor]:
    """The difference to W' e that puts the student's value where the rule wants it."""
    base = studio.base
    e = category_encoding(base, concept.category)
    recipe: Paint = Paint.make(prompt="", base=base.name, **how)
    _, wanted = studio.prepared(recipe, parse("", {}))
    before = {s.path: _values(base, s.path) for s in base.layout.layers}
    with studio.adapters.using(wanted):
        after = {s.path: _values(base, s.path) for s in base.layout.layers}
    found = {}
    for path, delta in concept.delta.items():
        w, w_ = before[path], after[path]
        o = w @ e + delta.float()
        target = o if rule == "absolute" else w_ @ (torch.linalg.pinv(w) @ o)
        found[path] = (target - w_ @ e).to(delta.dtype)
    return found


def _values(base: Any, path: str) -> torch.Tensor:
    """The weight of a site's value projection (width, D) as it works now: with LoRAs, if any are on."""
    to_v = base.unet.get_submodule(path).to_v
    return to_v(torch.eye(to_v.in_features)).T.float()


if __name__ == "__main__":
    main()
