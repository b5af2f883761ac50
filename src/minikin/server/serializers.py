"""JSON of jobs, images and concepts, as clients receive it."""

from __future__ import annotations

import json
from typing import Any

from minikin.perfusion import operating_points
from minikin.perfusion.concept import Concept
from minikin.perfusion.index import IndexEntry
from minikin.server.concept_store import Entry
from minikin.server.errors import sentence_of
from minikin.server.jobs import Job, stored_verdict
from minikin.server.service import Service


def job_json(service: Service, job: Job) -> dict[str, Any]:
    """A job that is in memory."""
    status = job.status  # read first: when it says the job ended, so does everything read after it
    step, steps = job.done, job.total
    error = None if job.error is None else {"code": job.error.code, "message": sentence_of(job.error)}
    position = service.queue.position(job)
    return {
        "id": job.id, "kind": job.request.kind, "status": status, "task": job.request.task or None,
        "queue_position": position if status == "queued" else None,
        "created": job.created, "started": job.started, "completed": job.ended,
        "progress": {"step": step, "steps": steps, "stage": job.stage, "eta_s": _eta(service, job)},
        "results": [
            image_json(p._asdict(), job.infotexts.get(p.number), job.verdict(p.number)) for p in job.images
        ],
        "result": job.result, "warnings": list(job.notes), "error": error,
        "concepts": {name: pinned.sha256 for name, pinned in job.prepared.concepts.items()},
    }  # fmt: skip


def stored_job_json(row: dict[str, Any], images: list[dict[str, Any]]) -> dict[str, Any]:
    """An older job, from the store."""
    error = {"code": row["code"], "message": row["message"]} if row["code"] else None
    return {
        "id": row["id"], "kind": row["kind"], "status": row["status"], "task": row["task"] or None,
        "queue_position": None, "created": row["created"], "started": row["started"], "completed": row["ended"],
        "progress": {"step": 0, "steps": 0, "stage": "", "eta_s": 0.0},
        "results": [
            image_json(p, verdict=stored_verdict(row["result"], p["number"])) for p in images if not p["swept"]
        ],
        "result": row["result"], "warnings": row["warnings"], "error": error, "concepts": row["concepts"],
    }  # fmt: skip


def image_json(
    image: dict[str, Any], infotext: str | None = None, verdict: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A finished image; `filter` is the content filter's verdict, None where it had no objection."""
    fields = {k: image[k] for k in ("id", "number", "seed", "width", "height", "sha256")}
    return {**fields, "url": f"/api/results/{image['id']}", "infotext": infotext, "filter": verdict}


def concept_json(entry: Entry, category: str = "") -> dict[str, Any]:
    return {"name": entry.name, "sha256": entry.sha256, "mine": entry.mine, "category": category}


def concept_details(concept_json: Concept) -> dict[str, Any]:
    """What helps to choose a concept: its category, its operating points, whether it has a preview."""
    return _details(concept_json.category, concept_json.points, bool(concept_json.preview))


def index_entry_details(entry: IndexEntry) -> dict[str, Any]:
    """The same from the library's index, without opening the file; invalid operating points are left out."""
    try:
        points = operating_points.from_json(json.loads(entry.points))
    except (LookupError, ValueError, TypeError, RecursionError):
        points = {}
    return _details(entry.category, points, entry.preview)


def _details(category: str, points: operating_points.Points, preview: bool) -> dict[str, Any]:
    points_json = {
        preset: {
            name: {
                "strength": p.strength,
                "likeness": p.subject_fidelity,  # word: JSON field
                "follows": p.prompt_fidelity,
            }  # word: JSON
            for name, p in by_name.items()
        }
        for preset, by_name in points.items()
    }
    return {"category": category, "points": points_json, "preview": preview}


def _eta(service: Service, job: Job) -> float | None:
    """Estimated seconds until its end; None for jobs of unknown length."""
    if job.over:
        return 0.0
    if job.prepared.group is None:
        return None
    ahead = sum(o.cost_left for o in service.queue.waiting() if o.created < job.created and job.started is None)
    return round((ahead + job.cost_left) * service.queue.rate_s, 2)
