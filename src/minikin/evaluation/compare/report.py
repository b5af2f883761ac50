"""Report of a comparison: the same numbers as JSON, CSV, Markdown and one HTML page with images."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minikin.evaluation import plots
from minikin.evaluation.compare.methods import TrainedMethod
from minikin.evaluation.compare.results import MethodResult, StrengthResult
from minikin.evaluation.report import render, spread, svg
from minikin.files import atomic_write

if TYPE_CHECKING:
    from minikin.evaluation.compare.compare import CompareTask

IMAGES, PLAIN_IMAGES = 6, 3  # of a method and a sampler, on the page
SCORES = ("subject_fidelity", "held_out", "r_precision", "text_alignment", "diversity")
NO_SECOND_SUBJECT = (
    "The two-subject test is not part of this comparison; give the photos of a second subject with --beside."
)
TWO_SUBJECT_LEGEND = (
    "Two subjects: share of images of two subjects, trained separately, in which either half rises more to its "
    "own subject than to the other, against the plain image of equal words and seed; bleed is how much a half "
    "rises to the other."
)
LEGEND = (
    "Sizes of Perfusion are whole files (half precision), those of other methods their numbers in float32; "
    "for SD 1.5 and SDXL both are computed from the widths of these models. Seconds are of training, without "
    "what is computed once and cached (C, images of the category for prior preservation). Memory is the peak "
    "with the base in it. Drift is of the plain category's images with the method active, equal seeds; "
    "0 means the same images. Subject and prompt fidelity are at strength 1, as trained; the Pareto front and "
    "its hypervolume above (0, 0) are over all strengths, of which textual inversion has one."
)
HEADER = (
    "method", "size here", "SD 1.5", "SDXL", "training", "memory", "subject fidelity", "held-out photos",
    "prompt fidelity", "drift", "hypervolume",
)  # fmt: skip
TWO_SUBJECT_HEADER = ("two subjects", "bleed")
Table = Sequence[tuple[TrainedMethod, Sequence[MethodResult]]]


def write(task: CompareTask, table: Table, out: Path) -> Path:
    """All four files; returns the page. Raises StorageError."""
    facts = as_json(task, table)
    atomic_write(out / "report.json", json.dumps(facts, indent=1).encode())
    atomic_write(out / "report.csv", _csv(facts).encode())
    atomic_write(out / "report.md", _markdown(facts).encode())
    return atomic_write(out / "report.html", _html(facts, table).encode())


def as_json(task: CompareTask, table: Table) -> dict[str, Any]:
    """Everything that was measured, as plain data."""
    r, references = task.recipe, task.references
    return {
        "category": r.category, "base": r.base, "encoder": asdict(task.encoder.card),
        "prompt_fidelity": task.metric, "photos": len(references.photos),
        "real_image_upper_bound": references.upper_bound,
        "held_out": 0 if references.held_out is None else len(references.held_out),
        "prompts": task.prompts, "plain_prompt": task.plain_prompt,
        "seeds": [r.seed + k for k in range(r.seeds)], "plain_seeds": [r.seed + k for k in range(r.plain)],
        "samplers": [str(s) for s in task.samplers], "skipped": list(task.skipped),
        "second_category": r.beside_category, "two_subject_prompts": [p for p, _ in task.two_subject_prompts()],
        "note": TWO_SUBJECT_LEGEND if task.second_references else NO_SECOND_SUBJECT,
        "methods": [
            {
                "method": trained.method, "digest": trained.digest, "bytes": dict(trained.sizes),
                "steps": trained.steps, "seconds": trained.seconds, "memory": trained.memory,
                "samplers": [_result_json(result) for result in results],
            }
            for trained, results in table
        ],
    }  # fmt: skip


def _result_json(r: MethodResult) -> dict[str, Any]:
    return {
        "sampler": r.sampler, "drift": asdict(r.drift), "drift_free": r.drift_free,
        "hypervolume": r.hypervolume,
        "two_subjects": r.two_subjects and asdict(r.two_subjects),
        "two_subject_images": [p.name for p in r.two_subject_images],
        "front": [r.strengths[i].strength for i in r.front],
        "strengths": [_strength_json(s) for s in r.strengths],
    }  # fmt: skip


def _strength_json(s: StrengthResult) -> dict[str, Any]:
    estimates = {name: getattr(s.scores, name) for name in SCORES}
    row = {"strength": s.strength, "images": [path.name for path in s.images]}
    return row | {name: e and asdict(e) for name, e in estimates.items()}


# ---- tables ---------------------------------------------------------------------------------------


def _csv(facts: dict[str, Any]) -> str:
    """One line for each method, sampler and strength."""
    lines = []
    for m in facts["methods"]:
        costs = {f"bytes_{family}": n for family, n in m["bytes"].items()}
        costs |= {k: m[k] for k in ("steps", "seconds", "memory")}
        for r in m["samplers"]:
            shared = {"method": m["method"], "sampler": r["sampler"], **costs, **_columns("drift", r["drift"])}
            for name in ("success", "bleed"):
                shared[name] = r["two_subjects"][name]["value"] if r["two_subjects"] else None
            shared["hypervolume"] = r["hypervolume"]
            for s in r["strengths"]:
                line = shared | {"strength": s["strength"], "on_front": s["strength"] in r["front"]}
                for name in SCORES:
                    line |= _columns(name, s[name] or {})
                lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _columns(name: str, estimate: dict[str, Any]) -> dict[str, Any]:
    return {
        name: estimate.get("value"),
        f"{name}_low": estimate.get("low"),
        f"{name}_high": estimate.get("high"),
    }


def header(facts: dict[str, Any]) -> tuple[str, ...]:
    """Columns of the table."""
    return (*HEADER, *TWO_SUBJECT_HEADER) if facts["second_category"] else HEADER


def rows(facts: dict[str, Any], sampler: str) -> list[list[str]]:
    """Rows of one sampler's table below `header`, as text."""
    out = []
    for m in facts["methods"]:
        (r,) = (r for r in m["samplers"] if r["sampler"] == sampler)
        trained, n_bytes = r["strengths"][0], m["bytes"]
        names = ("subject_fidelity", "held_out", facts["prompt_fidelity"])
        both = r["two_subjects"]
        out.append([
            m["method"], *(size(n_bytes[f]) for f in ("own", "sd15", "sdxl")), f"{m['seconds']:.0f} s",
            "" if m["memory"] is None else size(m["memory"]), *(_text(trained[name]) for name in names),
            "0, the same images" if r["drift_free"] else _text(r["drift"]), f"{r['hypervolume']:.4f}",
            *([_text(both["success"]), _text(both["bleed"])] if both else []),
        ])  # fmt: skip
    return out


def title(facts: dict[str, Any]) -> str:
    return f"Methods compared: a {facts['category']} on {facts['base']}, {facts['photos']} photos"


def setup(facts: dict[str, Any]) -> str:
    """Encoder, prompts and photos, in a few sentences."""
    encoder, bound = facts["encoder"], facts["real_image_upper_bound"]
    upper = "" if bound is None else f" The real-image upper bound of subject fidelity is {bound:.3f}."
    held_out = f"{facts['held_out']} held-out photos" if facts["held_out"] else "no held-out photos"
    metric = {"r_precision": "R-precision", "text_alignment": "text alignment (CLIP-T)"}[
        facts["prompt_fidelity"]
    ]
    return (
        f"{len(facts['prompts'])} prompts with {len(facts['seeds'])} images each; {held_out}.{upper} "
        f"Intervals are 95 % over prompts. Prompt fidelity is {metric}. Encoder: {encoder['name']} "
        f"({encoder['source']}, {encoder['licence']}, {encoder['digest']}); numbers of two encoders do "
        "not compare."
    )


def _markdown(facts: dict[str, Any]) -> str:
    parts = [f"# {title(facts)}", setup(facts)]
    columns = header(facts)
    for sampler in facts["samplers"]:
        lines = [columns, ["---"] * len(columns), *rows(facts, sampler)]
        parts += [f"## {sampler}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    prompts = "\n".join(f"1. `{p}`" for p in facts["prompts"])
    return "\n\n".join([*parts, *facts["skipped"], LEGEND, facts["note"], "## Prompts", prompts]) + "\n"


def _html(facts: dict[str, Any], table: Table) -> str:
    sections = []
    for k, sampler in enumerate(facts["samplers"]):
        results = {trained.method: results[k] for trained, results in table}
        drawing = plots.draw_methods(results, facts["prompt_fidelity"], facts["real_image_upper_bound"])
        methods = [
            {"name": name, "images": spread(r.strengths[0].images, IMAGES), "after": r.after[:PLAIN_IMAGES]}
            for name, r in results.items()
        ]
        before = next(iter(results.values())).before[:PLAIN_IMAGES]
        sections.append({
            "name": sampler, "drawing": svg(drawing), "rows": rows(facts, sampler), "before": before,
            "methods": methods,
        })  # fmt: skip
    return render(
        "compare.html",
        title=title(facts),
        setup=setup(facts),
        sections=sections,
        header=header(facts),
        plain_prompt=facts["plain_prompt"],
        notes=[*facts["skipped"], facts["note"]],
        legend=LEGEND,
        prompts=facts["prompts"],
    )


def _text(estimate: dict[str, Any] | None) -> str:
    return (
        "" if estimate is None else f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
    )


def size(n: int) -> str:
    """Bytes in the largest unit that fits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if n >= factor:
            return f"{n / factor:.3g} {unit}"
    return f"{n} bytes"
