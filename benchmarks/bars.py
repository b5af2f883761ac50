"""Perfusion against the baselines over all example concepts: fronts, drift, trained keys, pairs.

    python -m benchmarks.bars --out bars                          everything, then the table
    python -m benchmarks.bars --out bars --concepts my_dog my_cat   some of it; another process does the others
    python -m benchmarks.bars --out bars --table                  the table of what is there

Every concept is a `minikin compare` of its own below --out, which goes on where it stopped. Values are
means over concepts; their 95 % intervals are of the concepts drawn again, and differences are paired:
the same concept, photos, prompts and seeds. Trained and locked keys are compared in following the prompt
at equal likeness, read off the lines between their strengths.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minikin import Studio, events
from minikin.evaluation.encoders import open_judge
from minikin.evaluation.intervals import Measured, mean
from minikin.evaluation.pareto import pareto
from minikin.files import atomic_write
from minikin.recipes import Compare

EXAMPLES = Path(__file__).parents[1] / "examples"
METHODS = (
    "perfusion-row", "perfusion-gated", "perfusion-row:keys=trained", "perfusion-gated:keys=trained",
    "textual-inversion", "dreambooth", "dreambooth-prior", "dreambooth-lora", "custom-diffusion",
)  # fmt: skip
PAIRED = (
    "perfusion-row", "perfusion-row:regions=on", "perfusion-gated", "perfusion-gated:regions=on",
    "dreambooth-lora",
)  # fmt: skip
PAIRS = {  # the second of each is painted on the right
    "my_dog": "my_teapot", "my_cat": "my_car", "my_chair": "my_robot", "my_teddy": "my_guitar",
    "my_cat2": "my_cat",  # one category: nearly the same locked keys
}  # fmt: skip
OWN, TRAINED = "perfusion-row", "perfusion-row:keys=trained"


def category(name: str) -> str:
    return (EXAMPLES / name / "category.txt").read_text().strip()


def run(
    out: Path, concepts: Sequence[str], methods: Sequence[str], how: dict[str, Any], *, singles: bool = True,
    pairs: bool = True,
) -> None:  # fmt: skip
    """Compare on each concept, and in pairs; what is there is kept."""
    studio, judge = Studio.open("tiny", device="cpu"), open_judge("tiny")
    for name in concepts:
        jobs: list[tuple[str, dict[str, Any]]] = []
        if singles:
            jobs.append(("single", {"methods": ",".join(methods)}))
        if pairs and name in PAIRS:
            second = PAIRS[name]
            jobs.append(("pair", {
                "methods": ",".join(PAIRED), "strengths": "1", "beside": str(EXAMPLES / second),
                "beside_category": category(second),
            }))  # fmt: skip
        for kind, more in jobs:
            kept, asked = out / name / f"{kind}.json", {**how, **more}
            if kept.is_file():
                if json.loads(kept.read_text())["asked"] != asked:
                    raise SystemExit(f"{kept} was made with other settings. Choose another --out or delete it.")
                continue
            recipe = Compare.make(photos=str(EXAMPLES / name), category=category(name), **asked)
            for event in studio.comparing(recipe, out / name, judge=judge):
                if isinstance(event, events.Note):
                    print(f"{name}: {event.text}", flush=True)
            report = json.loads((out / name / "report.json").read_text())
            atomic_write(kept, json.dumps({"asked": asked, **report}, indent=1).encode())


def found(out: Path, kind: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Course -> method -> concept -> what was measured, with the method's own facts beside it."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(out.glob(f"*/{kind}.json")):
        for m in json.loads(path.read_text())["methods"]:
            for c in m["courses"]:
                whole = {**c, **{k: m[k] for k in ("bytes", "seconds", "memory")}}
                rows.setdefault(c["course"], {}).setdefault(m["method"], {})[path.parent.name] = whole
    return rows


def at_equal_likeness(locked: dict[str, Any], trained: dict[str, Any], axis: str) -> float | None:
    """How much better the locked keys' image follows the prompt at the most likeness that both reach.

    Between two strengths by the line between them; None where no likeness is reached by both.
    """
    lines = []
    for one in (locked, trained):
        places = np.array(sorted((p["likeness"]["value"], p[axis]["value"]) for p in one["points"]))
        lines.append(places[np.sort(pareto(places))].T)
    likeness = min(line[0].max() for line in lines)
    if likeness < max(line[0].min() for line in lines):
        return None
    a, b = (float(np.interp(likeness, *line)) for line in lines)
    return a - b


def table(out: Path) -> str:
    """Everything in Markdown."""
    lines = []
    for course, methods in found(out, "single").items():
        lines += [f"### {course}", "", "| method | hypervolume | row less this | likeness | held-out | "
                  "recognised | drift | bytes | SD 1.5 | seconds |", "|" + "---|" * 10]  # fmt: skip
        for method, by in methods.items():
            both = [n for n in by if n in methods.get(OWN, {})]
            more = [methods[OWN][n]["hypervolume"] - by[n]["hypervolume"] for n in both]
            first = [r["points"][0] for r in by.values()]
            same = all(r["plain_same"] for r in by.values())
            cells = [
                f"{method} ({len(by)})", mean(np.array([r["hypervolume"] for r in by.values()])),
                mean(np.array(more)) if both else "",
                *(_of(first, k) for k in ("likeness", "held_out", "recognised")),
                "0, same bytes" if same else f"{np.mean([r['drift']['value'] for r in by.values()]):.3f}",
                *(f"{np.mean([r['bytes'][k] for r in by.values()]):,.0f}" for k in ("own", "sd15")),
                f"{np.median([r['seconds'] for r in by.values()]):.0f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        if OWN in methods and TRAINED in methods:
            own, other = methods[OWN], methods[TRAINED]
            for axis in ("recognised", "alignment"):
                each = [at_equal_likeness(own[n], other[n], axis) for n in own if n in other]
                equal = [v for v in each if v is not None]
                told = mean(np.array(equal)) if equal else "nowhere"
                lines += ["", f"Locked less trained keys at equal likeness, {axis}: {told} "
                          f"({len(equal)} of {len(each)} concepts reach an equal one)"]  # fmt: skip
        lines.append("")
    for course, methods in found(out, "pair").items():
        lines += [f"### Two in one image, {course}", "", "| method | both | bleed |", "|---|---|---|"]
        lines += [
            f"| {m} ({len(by)}) | {_both(by, 'success')} | {_both(by, 'bleed')} |" for m, by in methods.items()
        ]
        lines.append("")
    return "\n".join(lines)


def _of(points: Sequence[dict[str, Any]], name: str) -> Measured | str:
    values = [p[name]["value"] for p in points if p[name]]
    return mean(np.array(values)) if values else ""


def _both(by: dict[str, dict[str, Any]], name: str) -> Measured:
    return mean(np.array([r["both"][name]["value"] for r in by.values()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bars"))
    parser.add_argument("--concepts", nargs="+", default=sorted(p.name for p in EXAMPLES.glob("my_*")))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", default="25,4", help="of painting")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", choices=("singles", "pairs"))
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args()
    if not args.table:
        how = {"steps": args.steps, "prompts": args.prompts, "seeds": args.seeds}
        kinds = {k: args.only in (None, k) for k in ("singles", "pairs")}
        run(args.out, args.concepts, args.methods, how, **kinds)
    print(table(args.out))


if __name__ == "__main__":
    main()
