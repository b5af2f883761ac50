"""Perfusion against the baselines over all example concepts.

    python -m benchmarks.methods --out methods                              everything, then the table
    python -m benchmarks.methods --out methods --concepts my_dog my_cat     a part of it
    python -m benchmarks.methods --out methods --table                      the table of what exists

Every concept is a `minikin compare` of its own below --out, which resumes after an interruption. Values are
means over concepts with bootstrap intervals over concepts, and differences are paired: the same concept,
photos, prompts and seeds. Trained and locked keys are compared in prompt fidelity at equal subject fidelity,
interpolated between their strengths.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minikin import Studio, events
from minikin.evaluation.encoder_registry import open_encoder
from minikin.evaluation.intervals import Estimate, bootstrap_mean
from minikin.evaluation.pareto import pareto
from minikin.files import atomic_write
from minikin.recipes import Compare

EXAMPLES = Path(__file__).parents[1] / "examples"
METHODS = (
    "perfusion-value", "perfusion-gated", "perfusion-value:keys=trained", "perfusion-gated:keys=trained",
    "textual-inversion", "dreambooth", "dreambooth-prior", "dreambooth-lora", "custom-diffusion",
)  # fmt: skip
TWO_SUBJECT_METHODS = (
    "perfusion-value", "perfusion-value:regions=on", "perfusion-gated", "perfusion-gated:regions=on",
    "dreambooth-lora",
)  # fmt: skip
PAIRS = {  # left: right
    "my_dog": "my_teapot", "my_cat": "my_car", "my_chair": "my_robot", "my_teddy": "my_guitar",
    "my_cat2": "my_cat",  # one category: nearly the same locked keys
}  # fmt: skip
TABLE_HEADER = (
    "| method | hypervolume | perfusion-value less this | subject fidelity | held-out | R-precision | drift | "
    "bytes | SD 1.5 | seconds |"
)
LOCKED, TRAINED = "perfusion-value", "perfusion-value:keys=trained"

# sampler -> method -> concept -> result, with the method's costs
Results = dict[str, dict[str, dict[str, dict[str, Any]]]]


def category(name: str) -> str:
    return (EXAMPLES / name / "category.txt").read_text().strip()


def run(
    out: Path, concepts: Sequence[str], methods: Sequence[str], options: dict[str, Any], kinds: Sequence[str]
) -> None:
    """Compare methods on each concept ("single") and in pairs ("pair"); finished comparisons are skipped."""
    studio, encoder = Studio.open("tiny", device="cpu"), open_encoder("tiny")
    for name in concepts:
        jobs: dict[str, dict[str, Any]] = {"single": {"methods": ",".join(methods)}}
        if name in PAIRS:
            jobs["pair"] = {
                "methods": ",".join(TWO_SUBJECT_METHODS), "strengths": "1",
                "beside": str(EXAMPLES / PAIRS[name]), "beside_category": category(PAIRS[name]),
            }  # fmt: skip
        for kind in (k for k in kinds if k in jobs):
            file, values = out / name / f"{kind}.json", {**options, **jobs[kind]}
            if file.is_file():
                if json.loads(file.read_text())["options"] != values:
                    raise SystemExit(f"{file} has other settings. Choose another --out or delete it.")
                continue
            recipe = Compare.make(photos=str(EXAMPLES / name), category=category(name), **values)
            for event in studio.comparing(recipe, out / name, encoder=encoder):
                if isinstance(event, events.Note):
                    print(f"{name}: {event.text}", flush=True)
            report = json.loads((out / name / "report.json").read_text())
            atomic_write(file, json.dumps({"options": values, **report}, indent=1).encode())


def read(out: Path, kind: str) -> Results:
    """Results of all finished comparisons of a kind."""
    results: Results = {}
    for path in sorted(out.glob(f"*/{kind}.json")):
        for m in json.loads(path.read_text())["methods"]:
            costs = {k: m[k] for k in ("bytes", "seconds", "memory")}
            for r in m["samplers"]:
                methods = results.setdefault(r["sampler"], {})
                methods.setdefault(m["method"], {})[path.parent.name] = r | costs
    return results


def gain_at_equal_subject_fidelity(
    locked: dict[str, Any], trained: dict[str, Any], metric: str
) -> float | None:
    """Prompt fidelity of locked less that of trained keys at the highest subject fidelity that both reach.

    Between two strengths it is interpolated; None where no subject fidelity is reached by both.
    """
    lines = []
    for result in (locked, trained):
        points = [(s["subject_fidelity"]["value"], s[metric]["value"]) for s in result["strengths"]]
        front = np.array(sorted(points))
        lines.append(front[np.sort(pareto(front))].T)
    fidelity = min(line[0].max() for line in lines)
    if fidelity < max(line[0].min() for line in lines):
        return None
    a, b = (float(np.interp(fidelity, *line)) for line in lines)
    return a - b


def table(out: Path) -> str:
    """All results in Markdown."""
    lines = []
    for sampler, methods in read(out, "single").items():
        lines += [f"### {sampler}", "", TABLE_HEADER, "|" + "---|" * 10]
        for method, by_concept in methods.items():
            lines.append("| " + " | ".join(_cells(method, by_concept, methods.get(LOCKED, {}))) + " |")
        if LOCKED in methods and TRAINED in methods:
            lines += _trained_keys(methods[LOCKED], methods[TRAINED])
        lines.append("")
    for sampler, methods in read(out, "pair").items():
        lines += [f"### Two subjects, {sampler}", "", "| method | success | bleed |", "|---|---|---|"]
        for method, by_concept in methods.items():
            both = [_mean([r["two_subjects"][k] for r in by_concept.values()]) for k in ("success", "bleed")]
            lines.append(f"| {method} ({len(by_concept)}) | {both[0]} | {both[1]} |")
        lines.append("")
    return "\n".join(lines)


def _cells(method: str, results: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """A row of the table: means over concepts, and paired differences to the reference method."""
    differences = [reference[n]["hypervolume"] - results[n]["hypervolume"] for n in results if n in reference]
    trained = [r["strengths"][0] for r in results.values()]
    drift_free = all(r["drift_free"] for r in results.values())
    cells = [
        f"{method} ({len(results)})",
        bootstrap_mean(np.array([r["hypervolume"] for r in results.values()])),
        bootstrap_mean(np.array(differences)) if differences else "",
        *(_mean([s[k] for s in trained]) for k in ("subject_fidelity", "held_out", "r_precision")),
        "0, same bytes" if drift_free else f"{np.mean([r['drift']['value'] for r in results.values()]):.3f}",
        *(f"{np.mean([r['bytes'][k] for r in results.values()]):,.0f}" for k in ("own", "sd15")),
        f"{np.median([r['seconds'] for r in results.values()]):.0f}",
    ]
    return [str(cell) for cell in cells]


def _trained_keys(locked: Mapping[str, Any], trained: Mapping[str, Any]) -> list[str]:
    lines = []
    for metric in ("r_precision", "text_alignment"):
        gains = [gain_at_equal_subject_fidelity(locked[n], trained[n], metric) for n in locked if n in trained]
        comparable = [g for g in gains if g is not None]
        mean = bootstrap_mean(np.array(comparable)) if comparable else "nowhere"
        count = f"{len(comparable)} of {len(gains)} concepts reach an equal one"
        lines += ["", f"Locked less trained keys at equal subject fidelity, {metric}: {mean} ({count})"]
    return lines


def _mean(estimates: Sequence[dict[str, Any] | None]) -> Estimate | str:
    values = [e["value"] for e in estimates if e]
    return bootstrap_mean(np.array(values)) if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("methods"))
    parser.add_argument("--concepts", nargs="+", default=sorted(p.name for p in EXAMPLES.glob("my_*")))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", default="25,4", help="denoising steps")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", choices=("single", "pair"))
    parser.add_argument("--table", action="store_true", help="only print what exists")
    args = parser.parse_args()
    if not args.table:
        options = {"steps": args.steps, "prompts": args.prompts, "seeds": args.seeds}
        run(args.out, args.concepts, args.methods, options, [args.only] if args.only else ["single", "pair"])
    print(table(args.out))


if __name__ == "__main__":
    main()
