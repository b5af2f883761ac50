"""How jobs and concepts look from outside."""

from __future__ import annotations

import json
from typing import Any

from minikin.perfusion import operating_points
from minikin.perfusion.concept import Concept
from minikin.perfusion.index import Listed
from minikin.server.concept_store import Entry
from minikin.server.errors import sentence_of
from minikin.server.jobs import Job, verdict_of
from minikin.server.service import Service


def of(service: Service, job: Job) -> dict[str, Any]:
    """A job that is in memory."""
    status = job.status  # first: once it tells the end, all else does
    step, steps = job.done, job.total
    error = None if job.error is None else {"code": job.error.code, "message": sentence_of(job.error)}
    ahead = service.line.position(job)
    return {
        "id": job.id, "kind": job.asked.kind, "status": status, "task": job.asked.task or None,
        "queue_position": ahead if status == "queued" else None,
        "created": job.created, "started": job.started, "completed": job.ended,
        "progress": {"step": step, "steps": steps, "stage": job.stage, "eta_s": _eta(service, job)},
        "results": [
            result(p._asdict(), job.infotexts.get(p.number), job.verdict(p.number)) for p in job.pictures
        ],
        "result": job.result, "warnings": list(job.notes), "error": error,
        "concepts": {name: pinned.sha256 for name, pinned in job.prepared.concepts.items()},
    }  # fmt: skip


def of_row(row: dict[str, Any], pictures: list[dict[str, Any]]) -> dict[str, Any]:
    """A job of before, from the store."""
    error = {"code": row["code"], "message": row["message"]} if row["code"] else None
    return {
        "id": row["id"], "kind": row["kind"], "status": row["status"], "task": row["task"] or None,
        "queue_position": None, "created": row["created"], "started": row["started"], "completed": row["ended"],
        "progress": {"step": 0, "steps": 0, "stage": "", "eta_s": 0.0},
        "results": [
            result(p, verdict=verdict_of(row["result"], p["number"])) for p in pictures if not p["swept"]
        ],
        "result": row["result"], "warnings": row["warnings"], "error": error, "concepts": row["concepts"],
    }  # fmt: skip


def result(
    picture: dict[str, Any], infotext: str | None = None, verdict: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A finished image; `filter` is what the content filter found and did, None for nothing."""
    told = {k: picture[k] for k in ("id", "number", "seed", "width", "height", "sha256")}
    return {**told, "url": f"/api/results/{picture['id']}", "infotext": infotext, "filter": verdict}


def concept(entry: Entry, category: str = "") -> dict[str, Any]:
    return {"name": entry.name, "sha256": entry.sha256, "mine": entry.mine, "category": category}


def inside(concept: Concept) -> dict[str, Any]:
    """What a concept's file says that helps to choose it: its category and its operating points."""
    return _chosen_by(concept.category, concept.points, bool(concept.preview))


def listed(one: Listed) -> dict[str, Any]:
    """The same of a file that only the index has looked at; what is no sound point is left out."""
    try:
        found = operating_points.from_json(json.loads(one.points))
    except (LookupError, ValueError, TypeError, RecursionError):
        found = {}
    return _chosen_by(one.category, found, one.preview)


def _chosen_by(category: str, measured: operating_points.Points, preview: bool) -> dict[str, Any]:
    told = {
        preset: {
            name: {"strength": p.strength, "likeness": p.likeness, "follows": p.follows}
            for name, p in named.items()
        }
        for preset, named in measured.items()
    }
    return {"category": category, "points": told, "preview": preview}


def _eta(service: Service, job: Job) -> float | None:
    """Seconds until its end, as far as one can tell; None for work of unknown length."""
    if job.over:
        return 0.0
    if job.prepared.group is None:
        return None
    before = sum(o.cost_left for o in service.line.waiting() if o.created < job.created and job.started is None)
    return round((before + job.cost_left) * service.line.rate_s, 2)
