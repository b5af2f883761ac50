"""What a comparison writes: the same numbers as JSON, CSV, Markdown and as one HTML page with images."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minikin.evaluation.compare.method_result import Point, Standing
from minikin.evaluation.compare.methods import Taught
from minikin.files import atomic_write

if TYPE_CHECKING:
    from minikin.evaluation.compare.compare import Task

SCORES = ("likeness", "held_out", "recognised", "alignment", "diversity")
NOT_IN_IT = (
    "Two things in one image are not part of this comparison; give the photos of a second one with --beside."
)
BOTH = (
    "Both: share of images of two things, taught apart, in which either half rises more to its own thing "
    "than to the other, against the plain image of equal words and seed; bleed is how much a half rises to "
    "the other."
)
READING = (
    "Sizes of Perfusion are whole files (half precision), those of other methods their numbers in float32; "
    "for SD 1.5 and SDXL both are computed from the widths of these models. Seconds are of teaching, without "
    "what is computed once and kept (C, images of the category for prior preservation). Memory is the peak "
    "with the base in it. Drift is of the plain category's images with the method's result on, equal seeds; "
    "0 means the same images. Likeness and following are at strength 1, as taught; the front and its "
    "hypervolume above (0, 0) are over all strengths, of which textual inversion has one."
)
HEAD = (
    "method", "size here", "SD 1.5", "SDXL", "teaching", "memory", "likeness", "held-out", "follows",
    "drift", "hypervolume",
)  # fmt: skip
HEAD_BOTH = ("both", "bleed")
Table = Sequence[tuple[Taught, Sequence[Standing]]]


def facts(task: Task, table: Table) -> dict[str, Any]:
    """All that was measured, as plain data."""
    r = task.recipe
    return {
        "category": r.category, "base": r.base, "judge": asdict(task.judge.card), "axis": task.measure,
        "photos": len(task.known.photos), "among_photos": task.known.among,
        "unseen": 0 if task.known.held_out is None else len(task.known.held_out),
        "prompts": task.prompts, "plain": task.plain, "seeds": [r.seed + k for k in range(r.seeds)],
        "plain_seeds": [r.seed + k for k in range(r.plain)],
        "courses": [str(c) for c in task.courses], "skipped": list(task.skipped),
        "beside": r.beside_category, "duets": [p for p, _ in task.duets()],
        "not_measured": BOTH if task.beside else NOT_IN_IT,
        "methods": [_method(taught, standings) for taught, standings in table],
    }  # fmt: skip


def _method(taught: Taught, standings: Sequence[Standing]) -> dict[str, Any]:
    return {
        "method": taught.method, "digest": taught.digest, "bytes": dict(taught.sizes), "steps": taught.steps,
        "seconds": taught.seconds, "memory": taught.memory, "courses": [_course(s) for s in standings],
    }  # fmt: skip


def _course(s: Standing) -> dict[str, Any]:
    return {
        "course": s.course, "drift": asdict(s.drift), "plain_same": s.same, "hypervolume": s.hypervolume,
        "both": None if s.both is None else asdict(s.both), "duets": [p.name for p in s.duets],
        "front": [s.points[i].strength for i in s.front], "points": [_point(p) for p in s.points],
    }  # fmt: skip


def _point(p: Point) -> dict[str, Any]:
    found = {name: getattr(p.scores, name) for name in SCORES}
    named = {"strength": p.strength, "pictures": [path.name for path in p.pictures]}
    return named | {n: None if m is None else asdict(m) for n, m in found.items()}


def write(found: dict[str, Any], table: Table, out: Path) -> Path:
    """All four files; returns the page. Raises StorageError."""
    from minikin.evaluation.compare import page

    atomic_write(out / "report.json", json.dumps(found, indent=1).encode())
    atomic_write(out / "report.csv", _csv(found).encode())
    atomic_write(out / "report.md", _markdown(found).encode())
    return atomic_write(out / "report.html", page.write(found, table).encode())


# ---- tables ---------------------------------------------------------------------------------------


def _csv(found: dict[str, Any]) -> str:
    """One line for each method, course and strength."""
    lines = []
    for m in found["methods"]:
        for c in m["courses"]:
            sizes = {f"bytes_{family}": n for family, n in m["bytes"].items()}
            drift = {"drift": c["drift"]["value"], "drift_low": c["drift"]["low"]}
            own = {"method": m["method"], "course": c["course"], **sizes}
            own |= {k: m[k] for k in ("steps", "seconds", "memory")} | drift
            both = c["both"] or {}
            own |= {n: both[n]["value"] if both else None for n in ("success", "bleed")}
            own |= {"drift_high": c["drift"]["high"], "hypervolume": c["hypervolume"]}
            for p in c["points"]:
                line = own | {"strength": p["strength"], "on_front": p["strength"] in c["front"]}
                for name in SCORES:
                    told = p[name] or {}
                    line |= {name: told.get("value"), f"{name}_low": told.get("low"),
                             f"{name}_high": told.get("high")}  # fmt: skip
                lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def rows(found: dict[str, Any], course: str) -> list[list[str]]:
    """The table of one course below HEAD, as texts."""
    out = []
    for m in found["methods"]:
        (c,) = (c for c in m["courses"] if c["course"] == course)
        usual, b = c["points"][0], m["bytes"]
        scores = [usual["likeness"], usual["held_out"], usual[found["axis"]]]
        out.append([
            m["method"], size(b["own"]), size(b["sd15"]), size(b["sdxl"]), f"{m['seconds']:.0f} s",
            "" if m["memory"] is None else size(m["memory"]), *(_told(s) for s in scores),
            "0, the same images" if c["plain_same"] else _told(c["drift"]), f"{c['hypervolume']:.4f}",
            *([_told(c["both"]["success"]), _told(c["both"]["bleed"])] if c["both"] else []),
        ])  # fmt: skip
    return out


def head(found: dict[str, Any]) -> tuple[str, ...]:
    """The table's columns."""
    return (*HEAD, *HEAD_BOTH) if found["beside"] else HEAD


def heading(found: dict[str, Any]) -> str:
    """What is compared, in one line."""
    return f"Methods compared: a {found['category']} on {found['base']}, {found['photos']} photos"


def whence(found: dict[str, Any]) -> str:
    """Judge, prompts and photos, in a few sentences."""
    judge, among = found["judge"], found["among_photos"]
    near = "" if among is None else f" The photos' likeness among themselves is {among:.3f}."
    unseen = f"{found['unseen']} held-out photos" if found["unseen"] else "no held-out photos"
    return (
        f"{len(found['prompts'])} prompts with {len(found['seeds'])} images each; {unseen}.{near} "
        f"Intervals are 95 % over prompts. 'follows' is {found['axis']}. Judge: {judge['name']} "
        f"({judge['source']}, {judge['licence']}, {judge['digest']}); numbers of two judges do not compare."
    )


def _markdown(found: dict[str, Any]) -> str:
    parts = [f"# {heading(found)}", whence(found)]
    for course in found["courses"]:
        lines = [head(found), ["---"] * len(head(found)), *rows(found, course)]
        parts += [f"## {course}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    prompts = "\n".join(f"1. `{p}`" for p in found["prompts"])
    return (
        "\n\n".join([*parts, *found["skipped"], READING, found["not_measured"], "## Prompts", prompts]) + "\n"
    )


def _told(m: dict[str, Any] | None) -> str:
    return "" if m is None else f"{m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]"


def size(n: int) -> str:
    """Bytes as people say them."""
    for unit, whole in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if n >= whole:
            return f"{n / whole:.3g} {unit}"
    return f"{n} bytes"
